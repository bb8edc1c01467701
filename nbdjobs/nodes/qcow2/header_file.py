# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The header of an open image: read once, and changed on stable storage before it counts."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, Final, Self

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.qcow2.errors import CorruptionError
from nbdjobs.nodes.qcow2.files import Files
from nbdjobs.nodes.qcow2.header import V2_LENGTH, V3_LENGTH, Header

_START: Final = 512
_NAME_FIELDS: Final = slice(8, 20)
_LENGTH_FIELD: Final = slice(100, 104)
_LAID_OUT: Final = frozenset({"extensions", "backing_file", "additional"})
"""What cannot be changed without moving what stands behind it."""


class HeaderFile:
    """The header, in memory and in the file.

    Attributes:
        header: As it is in the file.
    """

    def __init__(self, files: Files, header: Header, packed: bytes):
        self.header = header
        self._files = files
        self._packed = packed.rstrip(b"\0")
        self._fixed_length = V2_LENGTH if header.version == 2 else V3_LENGTH
        self._lock = asyncio.Lock()

    @classmethod
    async def read(cls, files: Files) -> Self:
        """Read and check the header.

        Raises:
            CommandError: It is none, or one that cannot be opened.
            NodeError: It cannot be read.
        """
        cluster = await read_first_cluster(files.file)
        return cls(files, Header.parse(cluster), cluster)

    async def change(self, **fields: Any) -> None:
        """Write and flush a header with other fields.

        A change of numbers alone is one write within a sector: after a crash it is there or not.

        Raises:
            NodeError: It cannot be written; the old one is in force.
            CorruptionError: Nor can the old one be written again: nobody knows which is there.
            CommandError: The header gets too large; nothing was written.
        """
        async with self._lock:
            header = replace(self.header, **fields)
            packed = header.pack()
            if not _LAID_OUT & fields.keys():
                packed = self._with_places_kept(packed)
            try:
                await self._write(packed)
            except NodeError as error:
                await self._restore(len(packed), error)
                raise
            self.header = header
            self._packed = packed + self._packed[len(packed) :]

    def _with_places_kept(self, packed: bytes) -> bytes:
        """The fixed fields, but those that say where what follows is as they are in the file."""
        fixed = bytearray(packed[: self._fixed_length])
        # The file may have its name elsewhere than `pack` puts it.
        fixed[_NAME_FIELDS] = self._packed[_NAME_FIELDS]
        if self._fixed_length == V3_LENGTH:
            fixed[_LENGTH_FIELD] = self._packed[_LENGTH_FIELD]
        return bytes(fixed)

    async def _write(self, packed: bytes) -> None:
        await self._files.write(0, packed)
        await self._files.file.flush()

    async def _restore(self, length: int, reason: NodeError) -> None:
        """Write what was there, since the failed write may have reached the file in part."""
        try:
            await self._write(self._packed[:length].ljust(length, b"\0"))
        except NodeError as error:
            raise CorruptionError(f"The image header cannot be written: {reason}") from error


async def read_first_cluster(file: Node) -> bytes:
    """Read what `Header.parse` needs; a file without a qcow2 header is refused by it.

    Raises:
        CommandError: It is no qcow2 image.
    """
    length = min(_START, file.size)
    if not length:
        raise CommandError("Image is not in qcow2 format")
    start = bytearray(length)
    await file.pread(0, memoryview(start))
    whole = bytearray(min(Header.cluster_size_of(bytes(start)), file.size))
    await file.pread(0, memoryview(whole))
    return bytes(whole)
