# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Where the content of a disk is: in which image of a chain, and where in its file.

Source: `qemu-img map` for what counts as what, and which runs are told together.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from nbdjobs.nodes.node import Node
from nbdjobs.nodes.qcow2.mapping import Kind
from nbdjobs.nodes.qcow2.node import Qcow2Node
from nbdjobs.nodes.raw import RawNode
from nbdjobs.nodes.status import Status

_LONGEST_LOOK = 1024 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class MapEntry:
    """A run of the disk.

    Attributes:
        start: First byte.
        length: Bytes, at least 1.
        depth: How many images lie above the one that has it.
        is_present: An image of the chain has it.
        is_zero: It reads as zeroes.
        is_data: It is stored.
        offset: Where in the file, if it is stored there as it is.
        filename: That file.
    """

    start: int
    length: int
    depth: int = 0
    is_present: bool = False
    is_zero: bool = False
    is_data: bool = False
    offset: int | None = None
    filename: str | None = None

    @property
    def end(self) -> int:
        """Behind its last byte."""
        return self.start + self.length

    def joined(self, following: MapEntry) -> MapEntry | None:
        """Both as one, if they are of one kind and follow each other in the file, too."""
        expected = None if self.offset is None else self.offset + self.length
        same = replace(following, start=self.start, length=self.length, offset=self.offset)
        if same != self or following.offset != expected:
            return None
        return replace(self, length=self.length + following.length)


class Mapper:
    """Maps one disk.

    Args:
        node: Its node.
    """

    def __init__(self, node: Node):
        self._node = node
        self._sparse: dict[Node, bool] = {}

    async def entries(self, start: int, end: int) -> AsyncIterator[MapEntry]:
        """The runs of a range inside the disk, joined where that can be."""
        pending: MapEntry | None = None
        while start < end:
            entry = await self._look(self._node, start, min(end - start, _LONGEST_LOOK), 0)
            start = entry.end
            joined = None if pending is None else pending.joined(entry)
            if joined is None and pending is not None:
                yield pending
            pending = joined or entry
        if pending is not None:
            yield pending

    async def _look(self, node: Node, start: int, length: int, depth: int) -> MapEntry:
        """The first run of a range, as a node and those below it have it."""
        if isinstance(node, Qcow2Node):
            return await self._look_at_qcow2(node, start, length, depth)
        if isinstance(node, RawNode):
            return await self._look(node.edges["file"].node, start, length, depth)
        run, status = await node.block_status(start, length)
        entry = MapEntry(
            start=start,
            length=run,
            depth=depth,
            is_present=True,
            is_zero=bool(status & Status.ZERO),
            is_data=bool(status & Status.DATA),
        )
        if node.is_format:
            return entry
        return replace(entry, offset=start, filename=node.filename)

    async def _look_at_qcow2(
        self, node: Qcow2Node, start: int, length: int, depth: int
    ) -> MapEntry:
        kind, run, host, _ = await node.find(start, length)
        entry = MapEntry(start=start, length=run, depth=depth)
        storage = node.edges["data-file" if node.header.has_data_file else "file"].node
        if kind in (Kind.DATA, Kind.ZERO_RESERVED, Kind.RESERVED) and not node.is_encrypted:
            entry = replace(entry, offset=host, filename=storage.filename)
        if kind in (Kind.ZERO, Kind.ZERO_RESERVED):
            return replace(entry, is_present=True, is_zero=True)
        if kind in (Kind.DATA, Kind.COMPRESSED):
            entry = replace(entry, is_present=True, is_data=True)
            if kind is Kind.DATA and entry.offset is not None and await self._is_sparse(node):
                found, status = await storage.block_status(host, run)
                entry = replace(entry, length=found, is_zero=bool(status & Status.ZERO))
            return entry
        backing = next((e.node for e in node.edges.values() if e.name == "backing"), None)
        if backing is None or start >= backing.size:
            return replace(entry, is_zero=True)
        return await self._look(backing, start, min(run, backing.size - start), depth + 1)

    async def _is_sparse(self, node: Qcow2Node) -> bool:
        if node not in self._sparse:
            self._sparse[node] = await node.is_sparse_inside()
        return self._sparse[node]
