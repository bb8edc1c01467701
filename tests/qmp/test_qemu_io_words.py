# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Words of qemu-io commands, and the lines about requests; the real program is asked elsewhere."""

from __future__ import annotations

import getopt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.qmp.qemu_io.report import dump_text, size_text, transfer_text
from nbdjobs.qmp.qemu_io.words import (
    RefusedError,
    parse_bytes,
    parse_lengths,
    parse_pattern,
    split_options,
)

LETTERS = "abP:q"
USAGE = "read off len -- reads\n"
WORDS = st.lists(st.text("-abPqx19", min_size=1, max_size=4), max_size=6)


@given(WORDS)
def test_options_are_told_from_operands_as_getopt_does(words: list[str]) -> None:
    try:
        pairs, operands = getopt.gnu_getopt(words, LETTERS)
    except getopt.GetoptError as error:
        with pytest.raises(RefusedError) as refusal:
            split_options("read", words, LETTERS, USAGE)
        letter = error.opt[:1] if len(error.opt) == 1 else "-"
        assert str(refusal.value).endswith(f" -- '{letter}'\n{USAGE}")
        return
    found = split_options("read", words, LETTERS, USAGE)
    assert found.operands == operands
    assert found.options == {name.removeprefix("-"): value for name, value in pairs}


@given(st.text(max_size=20))
def test_any_text_is_a_number_or_refused(text: str) -> None:
    for parse in (parse_bytes, parse_pattern, lambda text: parse_lengths([text])):
        try:
            number = parse(text)
        except RefusedError as error:
            complaint = str(error)
        else:
            complaint = "\n"
            assert 0 <= number < 1 << 63
        assert complaint.endswith("\n")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 bytes"),
        (0.378026, "0.378026 bytes"),
        (512, "512 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.500 KiB"),
        (3 << 60, "3 EiB"),
        (float("inf"), "inf EiB"),
    ],
)
def test_sizes_are_in_the_largest_unit_with_one_of_it(value: float, text: str) -> None:
    assert size_text(value) == text


@pytest.mark.parametrize(
    ("duration_s", "line"),
    [
        (0.5, "2 KiB, 1 ops; 00.50 sec (4 KiB/sec and 2.0000 ops/sec)"),
        (1.25, "2 KiB, 1 ops; 0:00:01.25 (1.600 KiB/sec and 0.8000 ops/sec)"),
        (7384.0, "2 KiB, 1 ops; 2:03:04.00 (0.277356 bytes/sec and 0.0001 ops/sec)"),
        (0.0, "2 KiB, 1 ops; 00.00 sec (inf EiB/sec and inf ops/sec)"),
    ],
)
def test_a_request_is_told_with_its_rate(duration_s: float, line: str) -> None:
    told = transfer_text("read", 512, 2048, duration_s)
    assert told == f"read 2048/2048 bytes at offset 512\n{line}\n"


def test_programs_are_told_in_one_line() -> None:
    told = transfer_text("wrote", 0, 2048, 0.5, is_terse=True)
    assert told == "2048,1,0:00:00.50,4096.000,2.000\n"


def test_a_dump_has_rows_of_sixteen_bytes() -> None:
    assert dump_text(memoryview(b"qemu-io \x00\x7f\xff 12345"), 16) == (
        "00000010:  71 65 6d 75 2d 69 6f 20 00 7f ff 20 31 32 33 34  qemu.io.....1234\n"
        "00000020:  35  5\n"
    )
