# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Reading the content of a disk at one instant, while copy-before-write guards it.

    to_copy  1 1 1 0 0 1 1 1     1: still in the source, and nowhere else; 0: on the target
    given up . . . . x x . .     whoever reads it is refused

A reader of clusters that are still in the source freezes its range: a guest's write there waits,
once the old content is on the target, until all readers are gone who found it in the source.
Readers that come later find it on the target. So no reader waits for anybody, and a guest waits
for those readers only who were there before its copy was done.

Source: QEMU `block/copy-before-write.c` (cbw_co_preadv_snapshot and its companions) for the
behaviour.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bitarray import bitarray

from nbdjobs.errors import NodeError
from nbdjobs.nodes.block_copy import BlockCopy
from nbdjobs.nodes.graph import Edge
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.rounding import round_down, round_up
from nbdjobs.nodes.status import BlockStatus
from nbdjobs.nodes.tracked import Kind, TrackedRequests


class PointInTime:
    """The old content of a disk, wherever it is.

    Attributes:
        size: Bytes of the disk at that instant.
        readers: Reads of the source in flight; while there are any, a write to the source has to
            wait for `readers_gone`, even where nothing is left to copy.
    """

    def __init__(self, copy: BlockCopy, source: Edge, target: Edge):
        self.size = copy.size
        self.readers = 0
        self._copy = copy
        self._source = source
        self._target = target
        self._frozen = TrackedRequests()
        self._given_up: bitarray | None = None

    async def pread(self, offset: int, buffer: memoryview) -> None:
        """Read from where the old content is.

        Raises:
            NodeError: EACCES where there is none any more: the snapshot is broken or over, or the
                range was discarded.
        """
        position, end = offset, offset + len(buffer)
        while position < end:
            async with self._held(position, end) as (node, stop):
                await node.pread(position, buffer[position - offset : stop - offset])
            position = stop

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """Describe the first run of the old content; errors as of `pread`."""
        async with self._held(offset, offset + length) as (node, stop):
            return await node.block_status(offset, stop - offset)

    async def pdiscard(self, offset: int, length: int) -> None:
        """Give up the old content of all clusters that lie in the range.

        Nobody can read them again, no write has to save them, and the target need not keep them.
        """
        unit = self._copy.cluster_size
        begin, end = round_up(offset, unit), round_down(offset + length, unit)
        if offset + length >= self.size:
            end = round_up(self.size, unit)
        if begin >= end:
            return
        if self._given_up is None:
            self._given_up = bitarray(len(self._copy.to_copy), endian="little")
            self._given_up.setall(0)
        self._given_up[begin // unit : end // unit] = 1
        self._copy.give_up(begin, end)
        await self._target.node.pdiscard(begin, min(end, self.size) - begin)

    async def readers_gone(self, offset: int, length: int) -> None:
        """Wait until nobody reads the range of the source who began before this call.

        To be called when nothing of the range is left to copy: readers that come now do not read
        it in the source, hence none of them ever waits for this call.
        """
        async with self._frozen.request(offset, length, Kind.WRITE, is_serialising=True):
            pass

    # Where the old content is

    @asynccontextmanager
    async def _held(self, offset: int, end: int) -> AsyncIterator[tuple[Node, int]]:
        """Keep the first run of a range where it is; gives the node that has it, and its end."""
        self.check_readable(offset, end)
        is_in_source, end = self._copy.run_at(offset, end)
        if not is_in_source:
            yield self._target.node, end
            self._check_kept(offset, end)  # a discard may have overtaken the request
            return
        # No await may stand between the look at the bitmap and the entry in the table.
        self.readers += 1
        try:
            async with self._frozen.request(offset, end - offset, Kind.READ, is_serialising=False):
                yield self._source.node, end
        finally:
            self.readers -= 1

    def check_readable(self, offset: int, end: int) -> None:
        """Refuse a range that cannot be read any more, by raising `NodeError` (EACCES)."""
        if self._copy.is_cancelled:
            raise NodeError(errno.EACCES, "the snapshot is broken")
        self._check_kept(offset, end)

    def _check_kept(self, offset: int, end: int) -> None:
        unit = self._copy.cluster_size
        given_up = self._given_up
        if given_up is not None and given_up.find(1, offset // unit, -(-end // unit)) >= 0:
            raise NodeError(errno.EACCES, "this part of the snapshot was discarded")
