# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A LUKS volume in a node: its header read, its key found, and keys changed.

Everything is written so that a crash leaves a header that is whole: key material first, then the
header that refers to it. What is erased goes the other way round in effect: material that is
overwritten fits no password, whatever the header says.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Self, TypeVar

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.crypto import luks
from nbdjobs.nodes.crypto.block_cipher import BlockCipher
from nbdjobs.nodes.crypto.luks import FilledSlot
from nbdjobs.nodes.crypto.luks_header import LENGTH, LuksHeader
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.workers import Workers

T = TypeVar("T")


class LuksVolume:
    """The header and the key material of a volume, which begin somewhere in a node.

    Attributes:
        header: The header as it is there.
    """

    def __init__(self, node: Node, start: int, header: LuksHeader):
        self.header = header
        self._node = node
        self._start = start

    @classmethod
    async def read(cls, node: Node, start: int = 0) -> Self:
        """Read the header.

        Args:
            node: Where it is.
            start: Bytes from the start of the node to the header.

        Raises:
            CommandError: It cannot be read, or is none.
        """
        data = bytearray(max(0, min(LENGTH, node.size - start)))
        if data:
            await _unfailing("read", node.pread(start, memoryview(data)))
        return cls(node, start, LuksHeader.parse(bytes(data)))

    @classmethod
    async def write(cls, node: Node, start: int, filled: FilledSlot) -> Self:
        """Write a new volume's header and its first key.

        Raises:
            CommandError: It cannot be written.
        """
        volume = cls(node, start, filled.header)
        await volume.store(filled)
        return volume

    # Keys

    async def unlock(self, password: bytes) -> BlockCipher:
        """The cipher for the payload; `CommandError` if no key slot has the password."""
        return self.header.spec.cipher(await self.master_key(password))

    async def master_key(self, password: bytes) -> bytes:
        """The key that encrypts the payload; `CommandError` likewise."""
        for number in range(len(self.header.slots)):
            key = await self.key_in(number, password)
            if key is not None:
                return key
        raise CommandError("Invalid password, cannot unlock any keyslot")

    async def key_in(self, number: int, password: bytes) -> bytes | None:
        """The master key, if there is one in a slot and the password is that of the slot."""
        slot = self.header.slots[number]
        if not slot.is_active:
            return None
        material = await self._read(slot.offset, self.header.material_length)
        return await in_thread(partial(luks.find_key, self.header, slot, material, password))

    async def store(self, filled: FilledSlot) -> None:
        """Write key material and the header that has a slot for it.

        Raises:
            CommandError: It cannot be written; the keys that were there before are still.
        """
        offset = filled.header.slots[filled.number].offset
        await self._write(offset, filled.material)
        await self._write(0, filled.header.pack())
        self.header = filled.header

    async def erase(self, number: int) -> None:
        """Overwrite the key material of a slot, and empty the slot.

        Raises:
            CommandError: It cannot be written.
        """
        offset = self.header.slots[number].offset
        await self._write(offset, os.urandom(self.header.material_length))
        header = luks.empty_slot(self.header, number)
        await self._write(0, header.pack())
        self.header = header

    async def _read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        await _unfailing("read", self._node.pread(self._start + offset, memoryview(data)))
        return bytes(data)

    async def _write(self, offset: int, data: bytes) -> None:
        begin = self._start + offset
        await _unfailing("write", self._node.pwrite(begin, memoryview(data)))
        await _unfailing("write", self._node.flush())


async def in_thread(call: Callable[[], T]) -> T:
    """Do what takes its time without holding the interpreter."""
    workers = Workers("keys")
    try:
        return await workers.run(call)
    finally:
        workers.close()


async def _unfailing(verb: str, operation: Awaitable[None]) -> None:
    try:
        await operation
    except NodeError as error:
        raise CommandError(f"Unable to {verb} LUKS header: {error}") from error
