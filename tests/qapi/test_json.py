# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.qapi.jsonparse import (
    JsonError,
    JsonLimits,
    JsonStream,
    JsonValue,
    Parsed,
    parse_json,
)

SMALL = JsonLimits(depth=4, tokens=20, size=40)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="ascii"), max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


def outcomes(*pieces: bytes, limits: JsonLimits = SMALL) -> list[str]:
    """What a stream yields, as text that can be compared."""
    stream = JsonStream(limits)
    found = [outcome for piece in pieces for outcome in stream.feed(piece)]
    found += stream.end()
    return [repr(each) if isinstance(each, Parsed) else each.description for each in found]


@given(st.binary(max_size=60))
def test_any_bytes_mean_the_same_whole_or_one_by_one(data: bytes) -> None:
    assert outcomes(data) == outcomes(*[data[i : i + 1] for i in range(len(data))])


@given(st.text(alphabet="{}[]:,\"'\\u0x1-.e@ \n\x01\xe9tn", max_size=60), st.integers(1, 7))
def test_any_text_means_the_same_in_any_pieces(text: str, size: int) -> None:
    data = text.encode()
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    assert outcomes(data) == outcomes(*pieces)


@given(json_values, st.booleans())
def test_what_json_writes_is_read(value: JsonValue, is_ascii: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=is_ascii)) == value


def test_integers_keep_64_bits_and_larger_ones_become_floats() -> None:
    assert parse_json(str((1 << 64) - 1)) == (1 << 64) - 1
    assert parse_json(str(1 << 64)) == float(1 << 64)
    assert isinstance(parse_json("1.0"), float)


@pytest.mark.parametrize("number", ["1e400", "-1e400", "9" * 5000])
def test_a_number_that_is_infinite_is_refused(number: str) -> None:
    assert math.isinf(float(number))
    with pytest.raises(JsonError, match="number out of range"):
        parse_json(number)


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_no_value_at_all_is_refused(text: str) -> None:
    with pytest.raises(JsonError, match="Expecting a JSON value"):
        parse_json(text)


def test_depth_is_limited_and_the_stream_goes_on() -> None:
    assert outcomes(b"[[[[]]]]") == ["Parsed(value=[[[[]]]])"]
    assert outcomes(b"[[[[[\n1 ") == ["JSON nesting depth limit exceeded", "Parsed(value=1)"]


def test_the_number_of_tokens_is_limited() -> None:
    limits = JsonLimits(depth=4, tokens=5, size=100)
    assert outcomes(b"[1,2]", limits=limits) == ["Parsed(value=[1, 2])"]
    assert outcomes(b"[1,2,", limits=limits) == ["JSON parse error, premature EOI"]
    assert outcomes(b"[1,2,3", limits=limits) == ["JSON token count limit exceeded"]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_string_is_given_up_once_it_is_too_long(size: int) -> None:
    data = b'"' + b"x" * 1000 + b'"\n5 '
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    assert outcomes(*pieces) == ["JSON token size limit exceeded", "Parsed(value=5)"]


def test_a_message_is_given_up_once_it_is_too_long() -> None:
    assert outcomes(b'["0123456789","0123456789"]')[0].startswith("Parsed")
    too_long = b'["0123456789","0123456789","0123456789","0123456789"'
    assert outcomes(too_long) == ["JSON token size limit exceeded"]


def test_a_long_number_is_given_up_too() -> None:
    assert outcomes(b"1" * 100 + b"\n5 ") == ["JSON token size limit exceeded", "Parsed(value=5)"]
