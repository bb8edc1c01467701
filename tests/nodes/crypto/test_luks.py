# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Master keys in their slots, and their coming and going in a volume."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

import pytest

from nbdjobs.errors import CommandError
from nbdjobs.nodes.crypto import luks
from nbdjobs.nodes.crypto.algorithms import QCryptoHashAlgorithm
from nbdjobs.nodes.crypto.amend import (
    LuksAmendOptions,
    QCryptoBlockLUKSKeyslotState,
    amend,
)
from nbdjobs.nodes.crypto.creation import LuksCreateOptions, create_luks
from nbdjobs.nodes.crypto.luks import FilledSlot
from nbdjobs.nodes.crypto.spec import CipherSpec
from nbdjobs.nodes.crypto.volume import LuksVolume
from nbdjobs.nodes.secrets import Secrets
from nbdjobs.qapi.visitor import visit
from tests.nodes.faults import MemoryNode, Op

START: Final = 65536
SPEC: Final = CipherSpec.parse("aes", "cbc-plain64", 16)
"""The one with the shortest keys."""


def secrets() -> Secrets:
    found = Secrets()
    for name in ("old", "new", "other"):
        found.add(name, f"the {name} password".encode())
    return found


@pytest.fixture(scope="module")
def filled() -> FilledSlot:
    """A new volume whose password is the old one."""
    return luks.new_volume(SPEC, QCryptoHashAlgorithm.SHA1, b"the old password", 0)


def test_the_key_is_found_with_the_password_alone(filled: FilledSlot) -> None:
    header, slot = filled.header, filled.header.slots[0]
    key = luks.find_key(header, slot, filled.material, b"the old password")
    assert key is not None
    assert len(key) == 16
    for wrong in (b"the old passwore", b"", b"the old password "):
        assert luks.find_key(header, slot, filled.material, wrong) is None


def test_any_lost_sector_of_key_material_loses_the_key(filled: FilledSlot) -> None:
    header, slot = filled.header, filled.header.slots[0]
    for sector in (0, 60, 124):
        material = bytearray(filled.material)
        material[512 * sector : 512 * (sector + 1)] = bytes(512)
        assert luks.find_key(header, slot, bytes(material), b"the old password") is None


def test_keys_whose_material_ends_inside_a_sector_are_found() -> None:
    """192 bits 4000 times are 187.5 sectors."""
    spec = CipherSpec.parse("aes", "cbc-plain64", 24)
    filled = luks.new_volume(spec, QCryptoHashAlgorithm.SHA256, b"p", 0)
    assert len(filled.material) == 188 * 512
    assert luks.find_key(filled.header, filled.header.slots[0], filled.material, b"p")


def with_volume(
    filled: FilledSlot, scenario: Callable[[LuksVolume, MemoryNode], Awaitable[None]]
) -> None:
    """Run a scenario on a volume that begins inside a node, and is read again afterwards."""

    async def run() -> None:
        node = MemoryNode(START + filled.header.payload_offset)
        before = b"\xaa" * START
        node.content[:START] = before
        volume = await LuksVolume.write(node, START, filled)
        await scenario(volume, node)
        assert node.content[:START] == before
        assert (await LuksVolume.read(node, START)).header == volume.header

    asyncio.run(run())


def change(state: str, **options: object) -> LuksAmendOptions:
    named = {name.replace("_", "-"): value for name, value in options.items()}
    return visit(LuksAmendOptions, {"state": state, **named})


async def do(volume: LuksVolume, state: str, *, is_forced: bool = False, **options: Any) -> None:
    if state == "active":
        options = {"new_secret": "new", "iter_time": 0, **options}
    chosen = change(state, **options)
    await amend(volume, chosen, secrets(), key_secret="old", is_forced=is_forced)


def active(volume: LuksVolume) -> list[int]:
    return [number for number, slot in enumerate(volume.header.slots) if slot.is_active]


def test_passwords_come_and_go_and_the_key_stays(filled: FilledSlot) -> None:
    async def scenario(volume: LuksVolume, node: MemoryNode) -> None:
        key = await volume.master_key(b"the old password")
        await do(volume, "active")
        await do(volume, "active", keyslot=5, secret="new")
        assert active(volume) == [0, 1, 5]
        assert await volume.master_key(b"the new password") == key
        assert await volume.key_in(5, b"the new password") == key
        await do(volume, "inactive", old_secret="old")
        assert active(volume) == [1, 5]
        with pytest.raises(CommandError, match="Invalid password, cannot unlock any keyslot"):
            await volume.unlock(b"the old password")
        await do(volume, "inactive", keyslot=1)
        assert active(volume) == [5]
        assert await volume.master_key(b"the new password") == key

    with_volume(filled, scenario)


def test_nothing_is_left_of_a_key_that_was_taken_out(filled: FilledSlot) -> None:
    async def scenario(volume: LuksVolume, node: MemoryNode) -> None:
        await do(volume, "active")
        begin = START + volume.header.slots[0].offset
        before = bytes(node.content[begin : begin + volume.header.material_length])
        await do(volume, "inactive", keyslot=0)
        after = bytes(node.content[begin : begin + volume.header.material_length])
        assert not any(
            before[place : place + 512] == after[place : place + 512]
            for place in range(0, len(before), 512)
        )
        assert volume.header.slots[0].salt == bytes(32)

    with_volume(filled, scenario)


REFUSALS: Final[list[tuple[str, dict[str, object], str]]] = [
    ("active", {"new_secret": None}, "'new-secret' is required to activate a keyslot"),
    (
        "active",
        {"old_secret": "old"},
        "'old-secret' must not be given when activating keyslots",
    ),
    ("active", {"new_secret": "nope"}, "No secret with id 'nope'"),
    ("active", {"keyslot": 8}, "Invalid keyslot 8 specified, must be between 0 and 7"),
    ("active", {"keyslot": -1}, "Invalid keyslot 4294967295 specified, must be between 0 and 7"),
    (
        "active",
        {"keyslot": 0},
        "Refusing to overwrite active keyslot 0 - please erase it first",
    ),
    (
        "active",
        {"secret": "other"},
        "Invalid password, cannot unlock any keyslot",
    ),
    (
        "inactive",
        {},
        "To erase keyslot(s), either explicit keyslot index or the password currently contained"
        " in them must be given",
    ),
    (
        "inactive",
        {"new_secret": "new"},
        "'new-secret' must not be given when erasing keyslots",
    ),
    ("inactive", {"iter_time": 5}, "'iter-time' must not be given when erasing keyslots"),
    ("inactive", {"keyslot": 9}, "Invalid keyslot 9 specified, must be between 0 and 7"),
    ("inactive", {"keyslot": 7}, "Given keyslot 7 is already erased (inactive) "),
    (
        "inactive",
        {"keyslot": 0, "old_secret": "new"},
        "Given keyslot 0 doesn't contain the given old password for erase operation",
    ),
    (
        "inactive",
        {"old_secret": "new"},
        "No keyslots match given (old) password for erase operation",
    ),
    (
        "inactive",
        {"keyslot": 0},
        "Attempt to erase the only active keyslot 0 which will erase all the data in the image"
        " irreversibly - refusing operation",
    ),
    (
        "inactive",
        {"old_secret": "old"},
        "All the active keyslots match the (old) password that was given and erasing them will"
        " erase all the data in the image irreversibly - refusing operation",
    ),
]


@pytest.mark.parametrize(("state", "options", "refusal"), REFUSALS)
def test_changes_that_do_not_fit_are_refused(
    filled: FilledSlot, state: str, options: dict[str, Any], refusal: str
) -> None:
    async def scenario(volume: LuksVolume, node: MemoryNode) -> None:
        before = bytes(node.content)
        given = {name: value for name, value in options.items() if value is not None}
        if state == "active" and "new_secret" not in options:
            given["new_secret"] = "new"
        with pytest.raises(CommandError) as caught:
            await amend(volume, change(state, **given), secrets(), key_secret="old")
        assert caught.value.description == refusal
        assert node.content == before

    with_volume(filled, scenario)


def test_a_full_volume_takes_no_more_passwords(filled: FilledSlot) -> None:
    async def scenario(volume: LuksVolume, node: MemoryNode) -> None:
        slot = volume.header.slots[0]
        for number in range(1, 8):
            offset = volume.header.slots[number].offset
            volume.header = volume.header.with_slot(number, replace(slot, offset=offset))
        node.content[START : START + 592] = volume.header.pack()
        with pytest.raises(CommandError, match="Can't add a keyslot - all keyslots are in use"):
            await do(volume, "active", is_forced=True)

    with_volume(filled, scenario)


def test_force_overwrites_keys_in_use_and_takes_out_the_last(filled: FilledSlot) -> None:
    async def scenario(volume: LuksVolume, node: MemoryNode) -> None:
        key = await volume.master_key(b"the old password")
        await do(volume, "active", keyslot=0, is_forced=True)
        assert await volume.master_key(b"the new password") == key
        await do(volume, "inactive", old_secret="new", is_forced=True)
        assert active(volume) == []

    with_volume(filled, scenario)


def test_a_volume_that_cannot_be_written_keeps_its_keys(filled: FilledSlot) -> None:
    async def scenario(volume: LuksVolume, node: MemoryNode) -> None:
        node.fail(Op.WRITE, errno.ENOSPC)
        with pytest.raises(CommandError, match="Unable to write LUKS header: No space left"):
            await do(volume, "active")
        assert active(volume) == [0]
        assert await volume.master_key(b"the old password")

    with_volume(filled, scenario)


# Making volumes


class Storage(MemoryNode):
    """A file, whose size changes."""

    async def _truncate(self, size: int) -> None:
        self.content = self.content[:size].ljust(size, b"\0")


def create(node: MemoryNode, size: int, **options: object) -> LuksVolume:
    named = {name.replace("_", "-"): value for name, value in options.items()}
    chosen = visit(LuksCreateOptions, {"key-secret": "old", "iter-time": 0, **named})
    return asyncio.run(create_luks(node, chosen, size, secrets()))


def test_a_new_volume_opens_with_its_password() -> None:
    node = Storage(b"\xaa" * 8192)
    volume = create(node, 1 << 20, cipher_mode="cbc", ivgen_alg="essiv", hash_alg="sha512")
    assert volume.header.spec.mode_text == "cbc-essiv:sha256"
    assert node.size == volume.header.payload_offset + (1 << 20)
    assert not any(node.content[volume.header.payload_offset :])

    async def reopen() -> None:
        again = await LuksVolume.read(node)
        assert again.header == volume.header
        await again.unlock(b"the old password")

    asyncio.run(reopen())


@pytest.mark.parametrize(
    ("size", "options", "refusal"),
    [
        (0, {"key_secret": "nope"}, "No secret with id 'nope'"),
        (0, {"cipher_alg": "3des"}, "Algorithm '3des' not supported"),
        (0, {"cipher_mode": "ctr"}, "Unsupported cipher mode ctr"),
        (
            0,
            {"ivgen_alg": "essiv", "ivgen_hash_alg": "sha512"},
            "No AES cipher with key size 64 available",
        ),
        (0, {"hash_alg": "ripemd160"}, "Hash algorithm 'ripemd160' not supported"),
        (0, {"iter_time": -1}, "PBKDF time of -1 ms is out of range"),
        (-512, {}, "The requested file size is too large"),
        ((1 << 63) - 512, {}, "The requested file size is too large"),
    ],
)
def test_impossible_volumes_are_not_made(
    size: int, options: dict[str, object], refusal: str
) -> None:
    node = Storage(b"\xaa" * 8192)
    before = bytes(node.content)
    with pytest.raises(CommandError) as caught:
        create(node, size, **options)
    assert caught.value.description == refusal
    assert node.content == before


def test_a_new_volume_needs_a_password() -> None:
    with pytest.raises(CommandError, match="Parameter 'key-secret' is required for cipher"):
        asyncio.run(create_luks(MemoryNode(512), LuksCreateOptions(), 0, secrets()))


def test_states_are_the_words_of_qapi() -> None:
    assert [str(state) for state in QCryptoBlockLUKSKeyslotState] == ["active", "inactive"]
