# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The nodes that an image is made of, looked up anew each time: the graph may exchange them."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nbdjobs.nodes.qcow2.mapping import Words

if TYPE_CHECKING:
    from nbdjobs.nodes.graph import Edge
    from nbdjobs.nodes.node import Node
    from nbdjobs.nodes.qcow2.encryption import PayloadCipher


class Files:
    """The children of one image by what they are for.

    Attributes:
        cipher: What guest clusters are encrypted with, or None; compressed ones never are.
    """

    def __init__(self, edges: Mapping[str, Edge]):
        self.cipher: PayloadCipher | None = None
        self._edges = edges

    @property
    def file(self) -> Node:
        """Where the metadata is."""
        return self._edges["file"].node

    @property
    def data(self) -> Node:
        """Where guest clusters are."""
        edge = self._edges.get("data-file")
        return self._edges["file"].node if edge is None else edge.node

    @property
    def backing(self) -> Node | None:
        """Where unallocated clusters are read from, if anywhere."""
        edge = self._edges.get("backing")
        return None if edge is None else edge.node

    async def read(self, offset: int, length: int) -> bytes:
        """Read metadata; beyond the end of the file it is zeroes."""
        buffer = bytearray(length)
        await self.file.pread(offset, memoryview(buffer))
        return bytes(buffer)

    async def read_words(self, offset: int, count: int) -> Words:
        """Read a table of 64-bit words."""
        return words_from(await self.read(offset, 8 * count))

    async def write(self, offset: int, data: bytes) -> None:
        """Write metadata."""
        await self.file.pwrite(offset, memoryview(data))

    async def flush(self) -> None:
        """Bring completed writes to stable storage, those of the data file first."""
        if "data-file" in self._edges:
            await self.data.flush()
        await self.file.flush()


def words_from(data: bytes) -> Words:
    """Read a table of big-endian words."""
    words = array("Q", data)
    if sys.byteorder == "little":
        words.byteswap()
    return words


def bytes_of(words: Words) -> bytes:
    """A table as it is in the file."""
    if sys.byteorder == "big":
        return words.tobytes()
    swapped = words[:]
    swapped.byteswap()
    return swapped.tobytes()
