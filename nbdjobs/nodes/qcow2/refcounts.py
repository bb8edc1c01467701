# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Which clusters of the image file are in use: choosing free ones, and counting users.

In memory, a counter goes up before anything refers to the cluster, and down only when nothing
on stable storage refers to it any more (see `reclaim`). So a block may be written at any time:
what it says is never too low. Only one order has to be kept, that of a new block: it must be
stable before the refcount table points at it.

Choosing clusters is done in memory and without a wait, unless a block has to be read first.
"""

from __future__ import annotations

import asyncio
import errno
from typing import Final

from nbdjobs.errors import NodeError
from nbdjobs.nodes.events import DebugEvent
from nbdjobs.nodes.qcow2.constants import (
    ENTRY_SIZE,
    MAX_REFCOUNT_TABLE_BYTES,
    OFFSET_MASK,
    REFCOUNT_OFFSET_MASK,
)
from nbdjobs.nodes.qcow2.errors import CorruptionError, hexed
from nbdjobs.nodes.qcow2.files import Files, bytes_of
from nbdjobs.nodes.qcow2.geometry import Geometry
from nbdjobs.nodes.qcow2.header_file import HeaderFile
from nbdjobs.nodes.qcow2.mapping import Words
from nbdjobs.nodes.qcow2.overlap import Metadata, MetadataMap
from nbdjobs.nodes.qcow2.reclaim import Reclaim
from nbdjobs.nodes.qcow2.refcount_table import RefcountBlock, unpack_block
from nbdjobs.nodes.rounding import round_down, round_up

_SECTOR_ENTRIES: Final = 512 // ENTRY_SIZE


class _Cached:
    """A block in memory.

    Attributes:
        block: Its counters.
        is_dirty: They are not all in the file.
        is_pinned: They are being written.
    """

    __slots__ = ("block", "is_dirty", "is_pinned")

    def __init__(self, block: RefcountBlock, *, is_dirty: bool):
        self.block = block
        self.is_dirty = is_dirty
        self.is_pinned = False


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
        self._geometry = geometry
        self._files = files
        self._header = header
        self._table = table
        self._metadata = metadata
        self._reclaim = reclaim
        self._capacity = capacity
        self._blocks: dict[int, _Cached] = {}
        self._unhooked: set[int] = set()
        self._cursor = 0
        self._loading: dict[int, asyncio.Future[None]] = {}
        self._growing = asyncio.Lock()
        self._writing = asyncio.Lock()

    @property
    def table(self) -> Words:
        """The refcount table."""
        return self._table

    @property
    def table_end(self) -> int:
        """First cluster that the refcount table cannot count."""
        return len(self._table) * self._geometry.refcounts_per_block

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
        cached = self._blocks.get(index)
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

    def _check_free(self, first: int, count: int) -> None:
        """Refuse to use clusters that hold metadata, whatever their refcounts say."""
        bits = self._geometry.cluster_bits
        self._metadata.check(first << bits, count << bits)

    def _take(self, index: int, cached: _Cached, first: int, end: int) -> tuple[int, int]:
        cluster = index * self._geometry.refcounts_per_block + first
        if (cluster + end - first) << self._geometry.cluster_bits > OFFSET_MASK:
            raise NodeError(errno.EFBIG)
        self._check_free(cluster, end - first)
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
            if index not in self._blocks:
                await self._block(index, create=True)
        return found

    async def allocate_table(self, count: int) -> int:
        """Take exactly `count` clusters that follow each other; returns the first."""
        per_block = self._geometry.refcounts_per_block
        # The blocks that count them have to be in memory at the same time.
        self._capacity = max(self._capacity, count // per_block + 3)
        first = self._cursor
        while True:
            end = first
            while end < first + count:
                index, position = divmod(end, per_block)
                if index not in self._blocks:
                    await self._block(index, create=True)
                    break
                if self._blocks[index].block[position]:
                    break
                end += 1
            else:
                self._take_all(first, count)
                return first
            index, position = divmod(end, per_block)
            if index in self._blocks and self._blocks[index].block[position]:
                first = end + 1
            # Otherwise something was awaited, and all have to be looked at again.

    def _take_all(self, first: int, count: int) -> None:
        """Take clusters that are free, and whose blocks are in memory."""
        self._check_free(first, count)
        for cluster in range(first, first + count):
            index, position = divmod(cluster, self._geometry.refcounts_per_block)
            cached = self._blocks[index]
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
        if index >= len(self._table) or not self._table[index]:
            return 0
        return (await self._block(index)).block[position]

    async def holds(self, cluster: int, wanted: Words) -> bool:
        """Whether users are counted so from a cluster on, all of them in one block."""
        index, position = divmod(cluster, self._geometry.refcounts_per_block)
        if index >= len(self._table) or not self._table[index]:
            return not any(wanted)
        return (await self._block(index)).block.holds(position, wanted)

    def cached_count(self, cluster: int) -> int | None:
        """The same if that needs no wait, else None."""
        index, position = divmod(cluster, self._geometry.refcounts_per_block)
        cached = self._blocks.get(index)
        return None if cached is None else cached.block[position]

    def drop_block(self, index: int) -> None:
        """Forget where a block is, as something else is there."""
        self._blocks.pop(index, None)
        self._table[index] = 0

    def add_block(self, index: int, cluster: int) -> None:
        """Begin to count anew, in a block at a cluster that nobody uses; all counters are zero."""
        block = unpack_block(bytes(self._geometry.cluster_size), self._geometry.refcount_order)
        self._blocks[index] = _Cached(block, is_dirty=True)
        self._table[index] = cluster << self._geometry.cluster_bits
        self._unhooked.add(index)
        self._metadata.refcount_blocks.add(cluster)

    async def add(self, cluster: int, count: int, change: int) -> None:
        """Count users of clusters in (+1) or out (-1).

        Raises:
            NodeError: EINVAL, as a counter would leave its range; those before it have changed.
        """
        per_block = self._geometry.refcounts_per_block
        end = cluster + count
        while cluster < end:
            index, position = divmod(cluster, per_block)
            cached = await self._block(index, create=change > 0)
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

    # Blocks

    async def _block(self, index: int, *, create: bool = False) -> _Cached:
        """Get a block, from the file or new."""
        while (cached := self._blocks.get(index)) is None:
            under_way = self._loading.get(index)
            if under_way is not None:
                await asyncio.shield(under_way)
                continue
            self._loading[index] = asyncio.get_running_loop().create_future()
            try:
                await self._make_room()
                if index < len(self._table) and self._table[index]:
                    await self._load(index)
                elif create:
                    await self._create(index)
                else:
                    raise NodeError(errno.EINVAL, "a cluster in use has no refcount")
            finally:
                self._loading.pop(index).set_result(None)
        return cached

    async def _load(self, index: int) -> None:
        offset = self._table[index] & REFCOUNT_OFFSET_MASK
        if offset % self._geometry.cluster_size:
            raise CorruptionError(
                f"Refblock offset {hexed(offset)} unaligned (reftable index: {hexed(index)})"
            )
        file = self._files.file
        if file.takes_debug_events:
            await file.debug_event(DebugEvent.REFBLOCK_LOAD)
        data = await self._files.read(offset, self._geometry.cluster_size)
        block = unpack_block(data, self._geometry.refcount_order)
        self._blocks[index] = _Cached(block, is_dirty=False)

    async def _create(self, index: int) -> None:
        """Begin to count clusters that no block has counted so far: all of them are free.

        The new block is in the first of them, and so counts itself.
        """
        if index >= len(self._table):
            await self._grow_table(index)
        if index in self._blocks:  # growing has made it
            return
        cluster = index * self._geometry.refcounts_per_block
        self._check_free(cluster, 1)
        self.add_block(index, cluster)
        self._blocks[index].block[0] = 1
        self.claim_virgin(cluster, 1)

    async def _make_room(self) -> None:
        """Forget blocks until there is room for another."""
        while len(self._blocks) >= self._capacity:
            if self._evict():
                continue
            dirty = any(cached.is_dirty for cached in self._blocks.values())
            if not dirty and not self._writing.locked():
                return
            await self.write_back()

    def _evict(self) -> bool:
        for index, cached in self._blocks.items():
            if not cached.is_dirty and not cached.is_pinned:
                del self._blocks[index]
                return True
        return False

    # Writing

    async def write_back(self) -> None:
        """Write all that is not in the file yet; stable only after a flush by the caller.

        Raises:
            NodeError: Something is still to be written.
        """
        async with self._writing:
            new = sorted(self._unhooked)
            if new:
                await self._write_blocks(new)
                await self._files.file.flush()
                await self._hook(new)
            await self._write_blocks(
                sorted(index for index, cached in self._blocks.items() if cached.is_dirty)
            )

    async def _write_blocks(self, indexes: list[int]) -> None:
        # A block that came after the list was made has to wait for its own turn.
        for index in indexes:
            cached = self._blocks.get(index)
            if cached is None or not cached.is_dirty:
                continue
            cached.is_dirty, cached.is_pinned = False, True
            try:
                offset = self._table[index] & REFCOUNT_OFFSET_MASK
                await self._files.write(offset, cached.block.pack())
            except BaseException:
                cached.is_dirty = True
                raise
            finally:
                cached.is_pinned = False

    async def _hook(self, new: list[int]) -> None:
        """Let the table in the file point at blocks that are stable."""
        hidden = self._unhooked - set(new)
        offset = self._header.header.refcount_table_offset
        for sector in sorted({round_down(index, _SECTOR_ENTRIES) for index in new}):
            entries = self._table[sector : sector + _SECTOR_ENTRIES]
            for index in hidden:
                if sector <= index < sector + len(entries):
                    entries[index - sector] = 0
            await self._files.write(offset + sector * ENTRY_SIZE, bytes_of(entries))
        self._unhooked.difference_update(new)

    async def _grow_table(self, index: int) -> None:
        """Move the refcount table to where it has room for more; it is in the new area itself."""
        async with self._growing:
            if index < len(self._table):
                return
            geometry = self._geometry
            # So that all in the old table can be pointed at.
            await self.write_back()
            async with self._writing:
                await self._move_table(index, geometry)

    async def _move_table(self, index: int, geometry: Geometry) -> None:
        per_block, size = geometry.refcounts_per_block, geometry.cluster_size
        begin = len(self._table)
        entries = max(index + 1, begin + begin // 2 + 1)
        while True:
            clusters = geometry.clusters(entries * ENTRY_SIZE)
            blocks = 1
            while blocks * per_block < blocks + clusters:
                blocks += 1
            if begin + blocks <= clusters * size // ENTRY_SIZE:
                break
            entries = begin + blocks
        if clusters * size > MAX_REFCOUNT_TABLE_BYTES:
            raise NodeError(errno.EFBIG)
        first = begin * per_block
        self._check_free(first, blocks + clusters)
        table = self._table[:]
        table.extend([0] * (clusters * size // ENTRY_SIZE - begin))
        new_blocks = [unpack_block(bytes(size), geometry.refcount_order) for _ in range(blocks)]
        for position in range(blocks + clusters):
            new_blocks[position // per_block][position % per_block] = 1
        for number, block in enumerate(new_blocks):
            table[begin + number] = (first + number) * size
            await self._files.write((first + number) * size, block.pack())
        offset = (first + blocks) * size
        entries_in_file = table[:]
        for unhooked in self._unhooked:
            entries_in_file[unhooked] = 0
        await self._files.write(offset, bytes_of(entries_in_file))
        await self._files.file.flush()
        old = self._header.header
        await self._header.change(refcount_table_offset=offset, refcount_table_clusters=clusters)
        # Entries may have come meanwhile, but none beyond the old end: that is what growing is.
        table[:begin] = self._table
        self._table = table
        self.claim_virgin(first, blocks + clusters)
        for number, block in enumerate(new_blocks):
            self._blocks[begin + number] = _Cached(block, is_dirty=False)
            self._metadata.refcount_blocks.add(first + number)
        self._metadata.set_area(Metadata.REFCOUNT_TABLE, offset, clusters * size)
        self._reclaim.drop(
            old.refcount_table_offset >> geometry.cluster_bits, old.refcount_table_clusters
        )


def table_entries(clusters: int, cluster_size: int) -> int:
    """How many entries a refcount table of that many clusters has."""
    return round_up(clusters * cluster_size, ENTRY_SIZE) // ENTRY_SIZE
