# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Which clusters of the image file are in use: choosing free ones, and counting users.

In memory, a counter goes up before anything refers to the cluster, and down only when nothing
on stable storage refers to it any more (see `reclaim`). So what the file says is never too low,
whenever it is written.

Choosing clusters is done in memory and without a wait, unless a block has to be read first.
"""

from __future__ import annotations

import errno

from nbdjobs.errors import NodeError
from nbdjobs.nodes.qcow2.constants import OFFSET_MASK
from nbdjobs.nodes.qcow2.files import Files
from nbdjobs.nodes.qcow2.geometry import Geometry
from nbdjobs.nodes.qcow2.header_file import HeaderFile
from nbdjobs.nodes.qcow2.mapping import Words
from nbdjobs.nodes.qcow2.overlap import MetadataMap
from nbdjobs.nodes.qcow2.reclaim import Reclaim
from nbdjobs.nodes.qcow2.refcount_blocks import CachedBlock, RefcountBlocks


class Refcounts:
    """The refcounts of one open image.

    Args:
        geometry: Of the image.
        files: Its nodes.
        header: Where the refcount table's place is written down.
        table: The refcount table.
        metadata: Where metadata is.
        reclaim: Takes what is given up.
        capacity: Most blocks in memory, at least 2.

    Attributes:
        blocks: Where the refcounts are.
        virgin: Host clusters from this one on were never written: they read as zeroes.
    """

    def __init__(
        self,
        geometry: Geometry,
        files: Files,
        header: HeaderFile,
        table: Words,
        metadata: MetadataMap,
        reclaim: Reclaim,
        capacity: int,
    ):
        self.virgin = 1 << 62
        self.blocks = RefcountBlocks(
            geometry, files, header, table, metadata, reclaim, capacity, self.claim_virgin
        )
        self._geometry = geometry
        self._reclaim = reclaim
        self._cached = self.blocks.cached
        self._cursor = 0

    @property
    def table(self) -> Words:
        """The refcount table."""
        return self.blocks.table

    async def write_back(self) -> None:
        """Write all that is not in the file yet; stable only after a flush by the caller.

        Raises:
            NodeError: Something is still to be written.
        """
        await self.blocks.write_back()

    # Choosing clusters

    def allocate_now(self, wanted: int) -> tuple[int, int] | None:
        """Take free clusters that follow each other, if that needs no wait.

        Args:
            wanted: The most to take, at least 1.

        Returns:
            The first cluster and how many there are, or None.

        Raises:
            CorruptionError: A cluster counted as free holds metadata.
        """
        per_block = self._geometry.refcounts_per_block
        index, start = divmod(self._cursor, per_block)
        cached = self._cached.get(index)
        if cached is None:
            return None
        block = cached.block
        first = block.find_zero(start)
        if first < 0:
            self._cursor = (index + 1) * per_block
            return None
        end = first + 1
        last = min(first + wanted, len(block))
        while end < last and not block[end]:
            end += 1
        return self._take(index, cached, first, end)

    def _take(self, index: int, cached: CachedBlock, first: int, end: int) -> tuple[int, int]:
        cluster = index * self._geometry.refcounts_per_block + first
        if (cluster + end - first) << self._geometry.cluster_bits > OFFSET_MASK:
            raise NodeError(errno.EFBIG)
        self.blocks.check_free(cluster, end - first)
        for position in range(first, end):
            cached.block[position] = 1
        cached.is_dirty = True
        self._cursor = cluster + end - first
        return cluster, end - first

    async def allocate(self, wanted: int) -> tuple[int, int]:
        """Take free clusters that follow each other: at most `wanted`, and at least one.

        Raises:
            CorruptionError: As `allocate_now`.
            NodeError: A block cannot be read, or the image cannot grow.
        """
        while (found := self.allocate_now(wanted)) is None:
            index = self._cursor // self._geometry.refcounts_per_block
            if index not in self._cached:
                await self.blocks.get(index, create=True)
        return found

    async def allocate_table(self, count: int) -> int:
        """Take exactly `count` clusters that follow each other; returns the first."""
        per_block = self._geometry.refcounts_per_block
        # The blocks that count them have to be in memory at the same time.
        self.blocks.reserve(count // per_block + 3)
        first = self._cursor
        while True:
            end = first
            while end < first + count:
                index, position = divmod(end, per_block)
                if index not in self._cached:
                    await self.blocks.get(index, create=True)
                    break
                if self._cached[index].block[position]:
                    break
                end += 1
            else:
                self._take_all(first, count)
                return first
            index, position = divmod(end, per_block)
            if index in self._cached and self._cached[index].block[position]:
                first = end + 1
            # Otherwise something was awaited, and all have to be looked at again.

    def _take_all(self, first: int, count: int) -> None:
        """Take clusters that are free, and whose blocks are in memory."""
        self.blocks.check_free(first, count)
        for cluster in range(first, first + count):
            index, position = divmod(cluster, self._geometry.refcounts_per_block)
            cached = self._cached[index]
            cached.block[position] = 1
            cached.is_dirty = True

    def claim_virgin(self, first: int, count: int) -> bool:
        """Whether clusters just taken read as zeroes; from now on nobody may think so."""
        was_virgin = first >= self.virgin
        self.virgin = max(self.virgin, first + count)
        return was_virgin

    # Counting users

    async def count(self, cluster: int) -> int:
        """How many users a cluster has; 0 where nothing is counted."""
        index, position = divmod(cluster, self._geometry.refcounts_per_block)
        if index >= len(self.table) or not self.table[index]:
            return 0
        return (await self.blocks.get(index)).block[position]

    async def holds(self, cluster: int, wanted: Words) -> bool:
        """Whether users are counted so from a cluster on, all of them in one block."""
        index, position = divmod(cluster, self._geometry.refcounts_per_block)
        if index >= len(self.table) or not self.table[index]:
            return not any(wanted)
        return (await self.blocks.get(index)).block.holds(position, wanted)

    def cached_count(self, cluster: int) -> int | None:
        """The same if that needs no wait, else None."""
        index, position = divmod(cluster, self._geometry.refcounts_per_block)
        cached = self._cached.get(index)
        return None if cached is None else cached.block[position]

    async def add(self, cluster: int, count: int, change: int) -> None:
        """Count users of clusters in (+1) or out (-1).

        Raises:
            NodeError: EINVAL, as a counter would leave its range; those before it have changed.
        """
        per_block = self._geometry.refcounts_per_block
        end = cluster + count
        while cluster < end:
            index, position = divmod(cluster, per_block)
            cached = await self.blocks.get(index, create=change > 0)
            stop = min(end - index * per_block, per_block)
            for place in range(position, stop):
                value = cached.block[place] + change
                if not 0 <= value <= self._geometry.max_refcount:
                    raise NodeError(errno.EINVAL, "a refcount leaves its range")
                cached.block[place] = value
                cached.is_dirty = True
                if not value:
                    self._cursor = min(self._cursor, index * per_block + place)
            cluster = index * per_block + stop

    def release(self, first: int, count: int) -> None:
        """Give up clusters that were taken and that nothing ever referred to.

        A write to them may still be on its way, so they wait as others do.
        """
        self._reclaim.drop(first, count)
