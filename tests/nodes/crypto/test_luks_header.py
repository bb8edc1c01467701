# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The header of a LUKS volume: read, checked, and written."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.errors import CommandError
from nbdjobs.nodes.crypto.algorithms import QCryptoHashAlgorithm
from nbdjobs.nodes.crypto.luks_header import LENGTH, KeySlot, LuksHeader
from nbdjobs.nodes.crypto.spec import CipherSpec

SLOT_0 = 208
SLOT_1 = 256


def new() -> LuksHeader:
    header = LuksHeader.new(CipherSpec(), QCryptoHashAlgorithm.SHA256)
    slot = KeySlot(True, 1000, bytes(range(32)), header.slots[0].offset)
    return replace(header, iterations=2000, digest=b"d" * 20).with_slot(0, slot)


def patched(offset: int, data: bytes) -> bytes:
    packed = bytearray(new().pack())
    packed[offset : offset + len(data)] = data
    return bytes(packed)


def number(value: int) -> bytes:
    return value.to_bytes(4)


def text(value: str) -> bytes:
    return value.encode().ljust(32, b"\0")


def test_what_is_written_is_read_again() -> None:
    header = new()
    packed = header.pack()
    assert len(packed) == LENGTH
    assert LuksHeader.parse(packed) == header
    assert LuksHeader.parse(packed + b"more") == header


def test_a_new_volume_is_laid_out_like_those_of_qemu() -> None:
    header = LuksHeader.new(CipherSpec(), QCryptoHashAlgorithm.SHA256)
    assert [slot.offset for slot in header.slots] == [4096 + n * 258048 for n in range(8)]
    assert (header.payload_offset, header.material_length) == (2068480, 256000)
    assert not any(slot.is_active for slot in header.slots)


def test_every_volume_is_another() -> None:
    first, second = new(), new()
    assert first.uuid != second.uuid
    assert first.salt != second.salt


def test_a_name_may_take_all_the_room_there_is() -> None:
    data = patched(168, b"x" * 40)
    header = LuksHeader.parse(data)
    assert header.uuid == "x" * 40
    assert header.pack() == data


@pytest.mark.parametrize(
    ("offset", "data", "refusal"),
    [
        (0, b"X", "Volume is not in LUKS format"),
        (6, b"\0\2", "LUKS version 2 is not supported"),
        (8, b"a" * 32, "LUKS header cipher name is not NUL terminated"),
        (40, b"a" * 32, "LUKS header cipher mode is not NUL terminated"),
        (72, b"a" * 32, "LUKS header hash spec is not NUL terminated"),
        (8, text("foo"), "Algorithm 'foo' with key size 32 bytes not supported"),
        (40, text("xts"), "Unexpected cipher mode string format 'xts'"),
        (72, text("foo"), "Hash algorithm 'foo' not supported"),
        (72, text("ripemd160"), "Hash algorithm 'ripemd160' not supported"),
        (104, number(7), "LUKS payload is overlapping with the header"),
        (104, number(8), "Keyslot 0 is overlapping with the encrypted payload"),
        (104, number(4039), "Keyslot 7 is overlapping with the encrypted payload"),
        (108, number(0), "Algorithm 'aes' with key size 0 bytes not supported"),
        (108, number(128), "Keyslots 0 and 1 are overlapping in the header"),
        (108, number(0xFFFFFFFF), "Keyslot 0 is overlapping with the encrypted payload"),
        (164, number(0), "LUKS key iteration count is zero"),
        (164, number(1 << 31), "LUKS key iteration count 2147483648 is larger than 268435456"),
        (SLOT_0, number(0), "Keyslot 0 state (active/disable) is corrupted"),
        (SLOT_0 + 4, number(0), "Keyslot 0 iteration count is zero"),
        (
            SLOT_0 + 4,
            number(0xFFFFFFFF),
            "Keyslot 0 iteration count 4294967295 is larger than 268435456",
        ),
        (SLOT_0 + 40, number(7), "Keyslot 0 is overlapping with the LUKS header"),
        (SLOT_0 + 40, number(9), "Keyslots 0 and 1 are overlapping in the header"),
        (
            SLOT_0 + 40,
            number(0xFFFFFFFF),
            "Keyslot 0 is overlapping with the encrypted payload",
        ),
        (SLOT_1 + 40, number(8), "Keyslots 0 and 1 are overlapping in the header"),
        (SLOT_1 + 44, number(3999), "Keyslot 1 is corrupted (stripes 3999 != 4000)"),
    ],
)
def test_what_cannot_be_is_refused(offset: int, data: bytes, refusal: str) -> None:
    with pytest.raises(CommandError) as caught:
        LuksHeader.parse(patched(offset, data))
    assert caught.value.description == refusal


def test_an_empty_slot_may_have_any_iterations() -> None:
    assert LuksHeader.parse(patched(SLOT_1 + 4, number(5))).slots[1].iterations == 5


@pytest.mark.parametrize("length", [0, 5, 8, 200, 591])
def test_a_short_file_is_no_volume(length: int) -> None:
    with pytest.raises(CommandError):
        LuksHeader.parse(new().pack()[:length])


@given(st.lists(st.tuples(st.integers(6, LENGTH - 1), st.integers(0, 255)), max_size=4))
def test_any_header_is_read_or_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(new().pack())
    for place, value in changes:
        data[place] = value
    try:
        header = LuksHeader.parse(bytes(data))
    except CommandError:
        return
    assert LuksHeader.parse(header.pack()) == header
    assert header.material_length <= header.payload_offset
