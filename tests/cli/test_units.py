# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Sizes, rates and times as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.cli import units

KIB = 1024
MIB = 1024 * KIB


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1048576", MIB),
        ("512B", 512),
        ("64k", 64 * KIB),
        ("50M", 50 * MIB),
        ("10MiB", 10 * MIB),
        ("10 MB", 10 * MIB),
        ("1.5G", 1536 * MIB),
        ("0.5", 0),
        ("8191P", 8191 << 50),
        (" 1T ", 1 << 40),
    ],
)
def test_sizes_are_binary(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1X", "1e3", "0x10", "1,5M", "1..5M", "8E", "5MM"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="expected") as refused:
        units.parse_size(text)
    assert f"'{text}'" in str(refused.value)


@given(st.integers(0, 2**63 - 1))
def test_a_number_of_bytes_is_read_as_it_is(size: int) -> None:
    assert units.parse_size(str(size)) == size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (10 * KIB, "10 KiB"),
        (MIB - 1, "1.0 MiB"),
        (97.4 * MIB, "97 MiB"),
        (1 << 60, "1.0 EiB"),
    ],
)
def test_sizes_are_written_short(size: float, text: str) -> None:
    assert units.format_size(size) == text


@given(st.integers(0, 2**62))
def test_a_size_written_and_read_is_within_a_twentieth(size: int) -> None:
    assert abs(units.parse_size(units.format_size(size)) - size) <= size / 20


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ms"),
        (0.04, "40 ms"),
        (0.42, "0.4 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_are_written_short(seconds: float, text: str) -> None:
    assert units.format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (12, 18, "12-18 s"),
        (12.2, 12.4, "about 12 s"),
        (0, 0.4, "under 1 s"),
        (0.2, 3, "0-3 s"),
        (100, 119, "100-120 s"),
        (90, 300, "2-5 min"),
        (3600, 9000, "1-2 h"),
        (40, None, "over 40 s"),
        (0, None, "over 0 s"),
    ],
)
def test_a_remaining_time_is_a_range(low: float, high: float | None, text: str) -> None:
    assert units.format_range(low, high) == text


def test_one_is_not_plural() -> None:
    assert units.plural(1, "client write") == "1 client write"
    assert units.plural(2048, "client write") == "2,048 client writes"


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0 ns"),
        (999.4, "999 ns"),
        (999.6, "1.0 µs"),
        (9949, "9.9 µs"),
        (85_432, "85 µs"),
        (999_600, "1.0 ms"),
        (340e6, "340 ms"),
        (2.14e9, "2.1 s"),
        (17e9, "17 s"),
    ],
)
def test_latencies_have_the_unit_that_fits(nanoseconds: float, text: str) -> None:
    assert units.format_latency(nanoseconds) == text
