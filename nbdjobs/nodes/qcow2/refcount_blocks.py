# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The refcount blocks of an open image in a bounded cache, and the table that points at them.

A block may be written at any time: what it says is never too low (see `refcounts`). Only one
order has to be kept: a new block must be stable before the table in the file points at it. Until
then it is called unhooked.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Final

from nbdjobs.errors import NodeError
from nbdjobs.nodes.events import DebugEvent
from nbdjobs.nodes.qcow2.constants import (
    ENTRY_SIZE,
    MAX_REFCOUNT_TABLE_BYTES,
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
from nbdjobs.nodes.qcow2.unbroken import unbroken
from nbdjobs.nodes.rounding import round_down

_SECTOR_ENTRIES: Final = 512 // ENTRY_SIZE


class CachedBlock:
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


class RefcountBlocks:
    """The blocks of one image.

    Args:
        geometry: Of the image.
        files: Its nodes.
        header: Where the table's place is written down.
        table: The refcount table.
        metadata: Where metadata is.
        reclaim: Takes what is given up.
        capacity: Most blocks in memory, at least 2.
        claim: Told of clusters that are taken for blocks and tables: the first, and how many.

    Attributes:
        table: The refcount table.
        cached: The blocks in memory, by their index in the table.
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
        claim: Callable[[int, int], object],
    ):
        self.table = table
        self.cached: dict[int, CachedBlock] = {}
        self._geometry = geometry
        self._files = files
        self._header = header
        self._metadata = metadata
        self._reclaim = reclaim
        self._capacity = capacity
        self._claim = claim
        self._unhooked: set[int] = set()
        self._loading: dict[int, asyncio.Future[None]] = {}
        self._growing = asyncio.Lock()
        self._writing = asyncio.Lock()

    def reserve(self, count: int) -> None:
        """Keep at least so many blocks in memory from now on."""
        self._capacity = max(self._capacity, count)

    def check_free(self, first: int, count: int) -> None:
        """Refuse to use clusters that hold metadata, whatever their refcounts say."""
        bits = self._geometry.cluster_bits
        self._metadata.check(first << bits, count << bits)

    def drop(self, index: int) -> None:
        """Forget where a block is, as something else is there."""
        self.cached.pop(index, None)
        self.table[index] = 0

    def add(self, index: int, cluster: int) -> None:
        """Begin to count anew, in a block at a cluster that nobody uses; all counters are zero."""
        block = unpack_block(bytes(self._geometry.cluster_size), self._geometry.refcount_order)
        self.cached[index] = CachedBlock(block, is_dirty=True)
        self.table[index] = cluster << self._geometry.cluster_bits
        self._unhooked.add(index)
        self._metadata.refcount_blocks.add(cluster)

    async def get(self, index: int, *, create: bool = False) -> CachedBlock:
        """Get a block, from memory or the file, or a new one.

        Raises:
            CorruptionError: The table points to where no block can be.
            NodeError: EINVAL, as there is none, or it cannot be read or made.
        """
        while (cached := self.cached.get(index)) is None:
            under_way = self._loading.get(index)
            if under_way is not None:
                await asyncio.shield(under_way)
                continue
            self._loading[index] = asyncio.get_running_loop().create_future()
            try:
                await self._make_room()
                if index < len(self.table) and self.table[index]:
                    await self._load(index)
                elif create:
                    await self._create(index)
                else:
                    raise NodeError(errno.EINVAL, "a cluster in use has no refcount")
            finally:
                self._loading.pop(index).set_result(None)
        return cached

    async def _load(self, index: int) -> None:
        offset = self.table[index] & REFCOUNT_OFFSET_MASK
        if offset % self._geometry.cluster_size:
            raise CorruptionError(
                f"Refblock offset {hexed(offset)} unaligned (reftable index: {hexed(index)})"
            )
        file = self._files.file
        if offset >= file.size:
            raise CorruptionError(
                f"Refblock offset {hexed(offset)} is outside of the image file"
                f" (reftable index: {hexed(index)})"
            )
        if file.takes_debug_events:
            await file.debug_event(DebugEvent.REFBLOCK_LOAD)
        data = await self._files.read(offset, self._geometry.cluster_size)
        block = unpack_block(data, self._geometry.refcount_order)
        self.cached[index] = CachedBlock(block, is_dirty=False)

    async def _create(self, index: int) -> None:
        """Begin to count clusters that no block has counted so far: all of them are free.

        The new block is in the first of them, and so counts itself.
        """
        if index >= len(self.table):
            await self._grow_table(index)
        if index in self.cached:  # growing has made it
            return
        cluster = index * self._geometry.refcounts_per_block
        self.check_free(cluster, 1)
        self.add(index, cluster)
        self.cached[index].block[0] = 1
        self._claim(cluster, 1)

    async def _make_room(self) -> None:
        """Forget blocks until there is room for another."""
        while len(self.cached) >= self._capacity:
            if self._evict():
                continue
            dirty = any(cached.is_dirty for cached in self.cached.values())
            if not dirty and not self._writing.locked():
                return
            await self.write_back()

    def _evict(self) -> bool:
        for index, cached in self.cached.items():
            if not cached.is_dirty and not cached.is_pinned:
                del self.cached[index]
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
                sorted(index for index, cached in self.cached.items() if cached.is_dirty)
            )

    async def _write_blocks(self, indexes: list[int]) -> None:
        # A block that came after the list was made has to wait for its own turn.
        for index in indexes:
            cached = self.cached.get(index)
            if cached is None or not cached.is_dirty:
                continue
            cached.is_dirty, cached.is_pinned = False, True
            try:
                offset = self.table[index] & REFCOUNT_OFFSET_MASK
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
            entries = self.table[sector : sector + _SECTOR_ENTRIES]
            for index in hidden:
                if sector <= index < sector + len(entries):
                    entries[index - sector] = 0
            await self._files.write(offset + sector * ENTRY_SIZE, bytes_of(entries))
        self._unhooked.difference_update(new)

    async def _grow_table(self, index: int) -> None:
        """Move the refcount table to where it has room for more; it is in the new area itself."""
        async with self._growing:
            if index < len(self.table):
                return
            # So that all in the old table can be pointed at.
            await self.write_back()
            async with self._writing:
                await unbroken(self._move_table(index))

    def _size_of_next_table(self, index: int) -> tuple[int, int]:
        """How many blocks and table clusters the new area begins with, so that it counts itself."""
        geometry = self._geometry
        begin = len(self.table)
        entries = max(index + 1, begin + begin // 2 + 1)
        while True:
            clusters = geometry.clusters(entries * ENTRY_SIZE)
            blocks = 1
            while blocks * geometry.refcounts_per_block < blocks + clusters:
                blocks += 1
            if begin + blocks <= clusters * geometry.cluster_size // ENTRY_SIZE:
                return blocks, clusters
            entries = begin + blocks

    async def _move_table(self, index: int) -> None:
        geometry = self._geometry
        per_block, size = geometry.refcounts_per_block, geometry.cluster_size
        begin = len(self.table)
        blocks, clusters = self._size_of_next_table(index)
        if clusters * size > MAX_REFCOUNT_TABLE_BYTES:
            raise NodeError(errno.EFBIG)
        first = begin * per_block
        self.check_free(first, blocks + clusters)
        table = self.table[:]
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
        table[:begin] = self.table
        self.table = table
        self._claim(first, blocks + clusters)
        for number, block in enumerate(new_blocks):
            self.cached[begin + number] = CachedBlock(block, is_dirty=False)
            self._metadata.refcount_blocks.add(first + number)
        self._metadata.set_area(Metadata.REFCOUNT_TABLE, offset, clusters * size)
        self._reclaim.drop(
            old.refcount_table_offset >> geometry.cluster_bits, old.refcount_table_clusters
        )
