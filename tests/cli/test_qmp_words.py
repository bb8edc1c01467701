# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""QMP commands as people type them: arguments get the types of the schema, Tab knows what fits."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.cli.exits import CliError
from nbdjobs.cli.qmp_schema import Schema
from nbdjobs.cli.qmp_words import complete, read_arguments


def builtin(name: str, json_type: str) -> dict[str, Any]:
    return {"name": name, "meta-type": "builtin", "json-type": json_type}


def struct(name: str, *members: str, **more: Any) -> dict[str, Any]:
    """An object; members are `name type` or, if they are optional, `name? type`."""
    listed = []
    for member in members:
        field, _, type_ = member.partition(" ")
        optional = {"default": None} if field.endswith("?") else {}
        listed.append({"name": field.rstrip("?"), "type": type_, **optional})
    return {"name": name, "meta-type": "object", "members": listed, **more}


def enum(name: str, *values: str) -> dict[str, Any]:
    members = [{"name": value} for value in values]
    return {"name": name, "meta-type": "enum", "members": members, "values": list(values)}


def command(name: str, arguments: str) -> dict[str, Any]:
    return {"name": name, "meta-type": "command", "arg-type": arguments, "ret-type": "0"}


SCHEMA = Schema(
    [
        builtin("str", "string"),
        builtin("int", "int"),
        builtin("number", "number"),
        builtin("bool", "boolean"),
        builtin("null", "null"),
        builtin("any", "value"),
        struct("0"),
        struct("1", "device str", "speed? int", "force? bool", "ratio? number", "sync? 2"),
        enum("2", "full", "none", "top"),
        struct("3", "driver 4", "node-name? str", "cache? 5", tag="driver")
        | {"variants": [{"case": "file", "type": "6"}, {"case": "raw", "type": "7"}]},
        enum("4", "file", "raw"),
        struct("5", "direct? bool", "no-flush? bool"),
        struct("6", "filename str"),
        struct("7", "file 8", "offset? int"),
        {
            "name": "8",
            "meta-type": "alternate",
            "members": [{"type": "3"}, {"type": "str"}],
        },
        struct("9", "bitmaps? [8]", "free? any", "name? 10", "sizes? [int]", "nothing? null"),
        {"name": "[8]", "meta-type": "array", "element-type": "8"},
        {"name": "[int]", "meta-type": "array", "element-type": "int"},
        {
            "name": "10",
            "meta-type": "alternate",
            "members": [{"type": "int"}, {"type": "null"}],
        },
        command("query-jobs", "0"),
        command("job-test", "1"),
        command("blockdev-add", "3"),
        command("odd", "9"),
        {"name": "EVENT", "meta-type": "event", "arg-type": "0"},
    ]
)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("job-test device=1 speed=50", {"device": "1", "speed": 50}),
        ("job-test device=true force=on", {"device": "true", "force": True}),
        ("job-test force=no speed=0x10", {"force": False, "speed": 16}),
        ("job-test ratio=1.5 sync=full", {"ratio": 1.5, "sync": "full"}),
        ("job-test speed=-1", {"speed": -1}),
        ("job-test device=a,b=c", {"device": "a,b=c"}),
        ("job-test device=", {"device": ""}),
        ('job-test {"device":"x"} speed=1', {"device": "x", "speed": 1}),
        ("job-test device=a device=b", {"device": "b"}),
        (
            "blockdev-add driver=file node-name=n filename=/a cache.direct=on",
            {"driver": "file", "node-name": "n", "filename": "/a", "cache": {"direct": True}},
        ),
        ("blockdev-add driver=raw file=1", {"driver": "raw", "file": "1"}),
        (
            "blockdev-add driver=raw file.driver=file file.filename=2",
            {"driver": "raw", "file": {"driver": "file", "filename": "2"}},
        ),
        (
            'blockdev-add driver=raw file={"driver":"raw"}',
            {"driver": "raw"} | {"file": {"driver": "raw"}},
        ),
        ('blockdev-add {"driver":"raw"} offset=7', {"driver": "raw", "offset": 7}),
        ("odd bitmaps.0=1 bitmaps.1=b", {"bitmaps": ["1", "b"]}),
        ('odd bitmaps=["a"]', {"bitmaps": ["a"]}),
        ("odd sizes.0=1", {"sizes": [1]}),
        ("odd free=1 name=2 nothing=", {"free": 1, "name": 2, "nothing": None}),
        ("odd free=text", {"free": "text"}),
        ("odd unknown=1 other.x=y", {"unknown": 1, "other": {"x": "y"}}),
        ("no-such-command a=1 b=c", {"a": 1, "b": "c"}),
    ],
)
def test_arguments_have_the_types_of_the_schema(words: str, arguments: dict[str, Any]) -> None:
    name, *rest = words.split()
    assert read_arguments(SCHEMA, name, rest) == arguments


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("job-test device", "'device' is not an argument: expected NAME=VALUE or a JSON object"),
        ("job-test speed=fast", "'fast' is not a value for 'speed': expected a whole number"),
        ("job-test force=maybe", "'maybe' is not a value for 'force': expected on or off"),
        ("job-test ratio=x", "'x' is not a value for 'ratio': expected a number"),
        ("blockdev-add cache=on", "'on' is not a value for 'cache': expected its members or JSON"),
        ("odd bitmaps=a", "'a' is not a value for 'bitmaps': expected JSON"),
        ("odd sizes.0=x", "'x' is not a value for 'sizes.0': expected a whole number"),
        ('job-test {"a"', "is not JSON"),
        ("job-test =x", "the arguments cannot be read: Invalid parameter ''"),
        ("job-test a.b=1 a=2", "Parameters 'a.*' used inconsistently"),
    ],
)
def test_what_cannot_be_read_is_named(words: str, reason: str) -> None:
    name, *rest = words.split()
    with pytest.raises(CliError) as refused:
        read_arguments(SCHEMA, name, rest)
    assert reason in str(refused.value)


@given(st.text())
def test_a_string_arrives_as_it_was_typed(text: str) -> None:
    assert read_arguments(SCHEMA, "job-test", [f"device={text}"]) == {"device": text}


@given(st.lists(st.text(), max_size=4), st.text())
def test_whatever_is_typed_can_be_completed(before: list[str], word: str) -> None:
    names = ["blockdev-add", *before]
    assert all(isinstance(each, str) for each in complete(SCHEMA, names, word))


@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        ("", ["blockdev-add ", "job-test ", "odd ", "query-jobs "]),
        ("j", ["job-test "]),
        ("query-jobs ", []),
        ("no-such-command ", []),
        ("job-test ", ["device=", "force=", "ratio=", "speed=", "sync="]),
        ("job-test device=x s", ["speed=", "sync="]),
        ("job-test sync=x s", ["speed="]),
        ("job-test sync=", ["sync=full ", "sync=none ", "sync=top "]),
        ("job-test force=o", ["force=off ", "force=on "]),
        ("job-test device=", []),
        ("job-test unknown=", []),
        ("blockdev-add ", ["cache.", "driver=", "node-name="]),
        ("blockdev-add driver=file f", ["filename="]),
        ("blockdev-add driver=raw ", ["cache.", "file=", "node-name=", "offset="]),
        ("blockdev-add cache.", ["cache.direct=", "cache.no-flush="]),
        ("blockdev-add cache.direct=on cache.", ["cache.no-flush="]),
        ("blockdev-add cache.direct=", ["cache.direct=off ", "cache.direct=on "]),
        ("blockdev-add driver=raw file.d", ["file.driver="]),
        ("blockdev-add driver=raw file.driver=file file.f", ["file.filename="]),
        ("blockdev-add nothing.x", []),
        ("odd bitmaps.0.driver=", ["bitmaps.0.driver=file ", "bitmaps.0.driver=raw "]),
    ],
)
def test_tab_offers_what_fits(line: str, candidates: list[str]) -> None:
    *before, word = line.split(" ")
    assert complete(SCHEMA, before, word) == candidates


def test_words_of_older_servers_are_known() -> None:
    old = {"name": "e", "meta-type": "enum", "values": ["a", "b"]}
    assert Schema([old]).words(old) == ["a", "b"]
