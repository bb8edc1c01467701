# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.errors import CommandError
from nbdjobs.qapi.keyval import MAX_DEPTH, HelpRequestError, parse_keyval, parse_option
from tests.qapi.cases import KEYVAL_REFUSED


@pytest.mark.parametrize(("text", "sentence"), KEYVAL_REFUSED.items())
def test_malformed_text_is_refused_in_known_words(text: str, sentence: str) -> None:
    with pytest.raises(CommandError) as refused:
        parse_option(text, implied_key="driver")
    assert refused.value.description == sentence


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", {}),
        ("raw", {"driver": "raw"}),
        ("raw,", {"driver": "raw"}),
        ("driver=raw,file=a=b", {"driver": "raw", "file": "a=b"}),
        ("a=b,,c,d=,,", {"a": "b,c", "d": ","}),
        ("a=1,a=2", {"a": "2"}),
        ("a.b=1,a.c.d=2", {"a": {"b": "1", "c": {"d": "2"}}}),
        ("a.1=y,a.0=x", {"a": ["x", "y"]}),
        ("a.0.b=1,a.00.c=2", {"a": [{"b": "1", "c": "2"}]}),
        ("__org.example_x=1", {"__org.example_x": "1"}),
        ("node-name=help", {"node-name": "help"}),
    ],
)
def test_text_becomes_nested_strings(text: str, value: object) -> None:
    assert parse_keyval(text, implied_key="driver") == value


def test_a_first_value_needs_an_implied_key() -> None:
    with pytest.raises(CommandError, match="Expected '=' after parameter 'raw'"):
        parse_keyval("raw")


def test_a_brace_begins_json() -> None:
    assert parse_option('{"a": [1, {"b": null}]}') == ({"a": [1, {"b": None}]}, False)
    assert parse_option("a.b=1") == ({"a": {"b": "1"}}, True)


def test_help_is_told_apart() -> None:
    with pytest.raises(HelpRequestError):
        parse_keyval("raw,help", implied_key="driver")


def test_a_key_of_too_many_parts_is_refused() -> None:
    assert parse_keyval(".".join(["a"] * MAX_DEPTH) + "=1")
    with pytest.raises(CommandError, match="is too long"):
        parse_keyval(".".join(["a"] * (MAX_DEPTH + 1)) + "=1")


@given(st.text(alphabet="ab01.,=-_?{}[]\"'\\ ", max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        value, _ = parse_option(text, implied_key="driver")
    except CommandError:
        return
    assert isinstance(value, dict)


@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9-]{0,5}", fullmatch=True), st.text()))
def test_any_value_can_be_written(options: dict[str, str]) -> None:
    text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())
    assert parse_keyval(text) == options
