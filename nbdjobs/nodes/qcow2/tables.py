# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The L1 table, and as much of the L2 tables as the cache may hold.

L2 tables are cached in slices, equal parts of a table, so that memory follows what is used and
not the cluster size. A slice is known by its number, which is the guest offset in units of what
a slice describes; where it is in the file follows from the L1 table.

Nobody keeps a slice across an `await`: it may be gone afterwards. What is changed here reaches
the file through `commit`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from nbdjobs.nodes.events import DebugEvent
from nbdjobs.nodes.qcow2.constants import COMPRESSED, COPIED, ENTRY_SIZE, OFFSET_MASK
from nbdjobs.nodes.qcow2.errors import CorruptionError, hexed
from nbdjobs.nodes.qcow2.files import Files, bytes_of
from nbdjobs.nodes.qcow2.geometry import Geometry
from nbdjobs.nodes.qcow2.mapping import Kind, Words, first_run
from nbdjobs.nodes.qcow2.overlap import MetadataMap
from nbdjobs.nodes.qcow2.reclaim import Reclaim
from nbdjobs.nodes.qcow2.refcounts import Refcounts

L1_SECTOR: Final = 512 // ENTRY_SIZE

_MOST_UNLINKED: Final = 64 * 1024
"""Runs of clusters that may wait for a commit before one is made for them."""


class Slice:
    """A part of an L2 table.

    Attributes:
        words: Its entries.
        is_dirty: They are not all in the file.
        is_pinned: They are being written.
        was_used: Somebody has looked at it since the cache last thought of forgetting it.
        is_safe: None of its entries points at metadata or behind the end of the file.
    """

    __slots__ = ("is_dirty", "is_pinned", "is_safe", "was_used", "words")

    def __init__(self, words: Words):
        self.words = words
        self.is_dirty = False
        self.is_pinned = False
        self.was_used = True
        self.is_safe = False


class Extent(NamedTuple):
    """A run of the disk whose content is at places of one kind.

    Attributes:
        kind: Where the content is.
        length: Bytes, at least 1.
        host: Where its first byte is, for kinds with a place; for compressed clusters the entry.
        is_private: Its host clusters belong to nobody else.
    """

    kind: Kind
    length: int
    host: int
    is_private: bool


class Tables:
    """The mapping of one open image.

    Args:
        geometry: Of the image.
        files: Its nodes.
        l1: The active L1 table.
        refcounts: Gives clusters for new tables.
        reclaim: Takes those of old ones.
        metadata: Is told of tables.
        slice_size: Bytes of a slice, a power of two from 512 to the cluster size.
        capacity: Most slices in memory, at least 2.
        commit: Brings changes to the file, so that slices can be forgotten.
        changed: Called at each change.

    Attributes:
        l1: The active L1 table.
        slices: The slices in memory, by number.
        slice_shift: Guest offsets shifted by it are numbers of slices.
        index_mask: Of cluster numbers, what is the index within a slice.
        dirty: Slices with changes not yet in the file.
        dirty_l1: Entries of L1 with changes, rounded down to the first of their sector.
    """

    def __init__(
        self,
        geometry: Geometry,
        files: Files,
        l1: Words,
        refcounts: Refcounts,
        reclaim: Reclaim,
        metadata: MetadataMap,
        slice_size: int,
        capacity: int,
        commit: Callable[[], Awaitable[None]],
        changed: Callable[[], None],
    ):
        self.l1 = l1
        self.slices: dict[int, Slice] = {}
        self.slice_size = slice_size
        entries = slice_size // (ENTRY_SIZE * geometry.stride)
        self.slice_shift = geometry.cluster_bits + entries.bit_length() - 1
        self.index_mask = entries - 1
        self.dirty: dict[int, Slice] = {}
        self.dirty_l1: set[int] = set()
        self._geometry = geometry
        self._files = files
        self._refcounts = refcounts
        self._reclaim = reclaim
        self._metadata = metadata
        self._capacity = capacity
        self._commit = commit
        self._changed = changed
        self._table_shift = geometry.l1_shift - self.slice_shift
        self._loading: dict[int, asyncio.Future[None]] = {}
        self._making: dict[int, asyncio.Future[None]] = {}

    # Looking up

    def slice_offset(self, number: int) -> int:
        """Where a slice is in the file; 0 if its table does not exist.

        Raises:
            CorruptionError: The L1 table points to where no table can be.
        """
        index = number >> self._table_shift
        entry = self.l1[index]
        offset = entry & OFFSET_MASK
        if not offset:
            return 0
        if offset % self._geometry.cluster_size:
            raise CorruptionError(
                f"L2 table offset {hexed(offset)} unaligned (L1 index: {hexed(index)})"
            )
        if offset >= self._files.file.size:
            raise CorruptionError(
                f"L2 table offset {hexed(offset)} is outside of the image file"
                f" (L1 index: {hexed(index)})"
            )
        within = number & ((1 << self._table_shift) - 1)
        return offset + within * self.slice_size

    async def slice(self, number: int) -> Slice | None:
        """Get a slice, from memory or from the file; None if its table does not exist."""
        while True:
            found = self.slices.get(number)
            if found is not None:
                found.was_used = True
                return found
            under_way = self._loading.get(number)
            if under_way is not None:
                await asyncio.shield(under_way)
                continue
            if not self.l1[number >> self._table_shift] & OFFSET_MASK:
                return None
            self._loading[number] = asyncio.get_running_loop().create_future()
            try:
                await self._make_room()
                offset = self.slice_offset(number)
                file = self._files.file
                if file.takes_debug_events:
                    await file.debug_event(DebugEvent.L2_LOAD)
                words = await self._files.read_words(offset, self.slice_size // ENTRY_SIZE)
                if self._geometry.has_data_file:
                    self._check_places(words, number)
                self.slices[number] = Slice(words)
            finally:
                self._loading.pop(number).set_result(None)

    async def find(self, offset: int, length: int) -> Extent:
        """Describe the first run of a range inside the disk.

        Raises:
            CorruptionError: What the tables say cannot be.
            NodeError: They cannot be read.
        """
        geometry = self._geometry
        number = offset >> self.slice_shift
        found = await self.slice(number)
        if found is None:
            end = ((offset >> geometry.l1_shift) + 1) << geometry.l1_shift
            return Extent(Kind.UNALLOCATED, min(length, end - offset), 0, False)
        return self.extent_in(found, number, offset, length)

    def extent_in(self, found: Slice, number: int, offset: int, length: int) -> Extent:
        """Describe the first run of a range, as far as a slice reaches."""
        geometry = self._geometry
        index = (offset >> geometry.cluster_bits) & self.index_mask
        unit = (offset >> geometry.subcluster_bits) & (geometry.subclusters - 1)
        within = offset & (geometry.subcluster_size - 1)
        length = min(length, ((number + 1) << self.slice_shift) - offset)
        units = (within + length + geometry.subcluster_size - 1) >> geometry.subcluster_bits
        try:
            run = first_run(geometry, found.words, index, unit, units)
        except CorruptionError as error:
            l2_index = (offset >> geometry.cluster_bits) & (geometry.l2_entries - 1)
            table = self.l1[number >> self._table_shift] & OFFSET_MASK
            raise CorruptionError(
                f"{error.message} (L2 offset: {hexed(table)}, L2 index: {hexed(l2_index)})"
            ) from error
        length = min(length, run.units * geometry.subcluster_size - within)
        if run.kind in (Kind.DATA, Kind.RESERVED, Kind.ZERO_RESERVED):
            return Extent(run.kind, length, run.host + within, run.is_private)
        return Extent(run.kind, length, run.host, False)

    def _check_places(self, words: Words, number: int) -> None:
        """Refuse places in a data file that are not those of the disk, as the format wants."""
        bits = self._geometry.cluster_bits
        guest = number << self.slice_shift
        for index, entry in enumerate(words[:: self._geometry.stride]):
            host = entry & OFFSET_MASK
            has_host = entry & COPIED or host
            if has_host and host != guest + (index << bits) and not entry & COMPRESSED:
                raise CorruptionError(
                    f"External data file host cluster offset {hexed(host)} does not match guest"
                    f" cluster offset: {hexed(guest + (index << bits))}, L2 index: {hexed(index)}"
                )

    async def _make_room(self) -> None:
        """Forget slices until there is room for another."""
        while len(self.slices) >= self._capacity and not self._evict():
            await self._commit()

    def _evict(self) -> bool:
        """Forget the slice that was unused for longest; those with changes have to stay."""
        for _ in range(2 * len(self.slices)):
            number = next(iter(self.slices))
            slice_ = self.slices[number]
            if not (slice_.is_dirty or slice_.is_pinned or slice_.was_used):
                del self.slices[number]
                return True
            slice_.was_used = False
            self.slices[number] = self.slices.pop(number)
        return False

    def forget_unused(self) -> None:
        """Forget every slice that was not used since the last call."""
        for number, slice_ in list(self.slices.items()):
            if not (slice_.is_dirty or slice_.is_pinned or slice_.was_used):
                del self.slices[number]
            slice_.was_used = False

    # Changing

    def writable_now(self, number: int) -> Slice | None:
        """The same as `writable_slice`, if that needs no wait, no check and nothing new."""
        slice_ = self.slices.get(number)
        if slice_ is None or not slice_.is_safe or len(self._reclaim.unlinked) > _MOST_UNLINKED:
            return None
        slice_.was_used = True
        return slice_ if self.l1[number >> self._table_shift] & COPIED else None

    async def writable_slice(self, number: int) -> Slice:
        """Get a slice whose table belongs to this disk alone; the table is made if need be.

        The caller changes the slice before its next `await`, and calls `mark`.
        """
        while True:
            if len(self._reclaim.unlinked) > _MOST_UNLINKED:
                await self._commit()
            index = number >> self._table_shift
            if not self._is_own(index):
                await self._own_table(index)
            slice_ = await self.slice(number)
            if slice_ is not None and self._is_own(index):
                if not slice_.is_safe:
                    self._check(slice_)
                return slice_

    def _is_own(self, index: int) -> bool:
        """Whether there is a table that belongs to this disk alone; damage may say so of none."""
        entry = self.l1[index]
        return bool(entry & COPIED and entry & OFFSET_MASK)

    def mark(self, number: int, slice_: Slice) -> None:
        """Take note that a slice was changed."""
        if not slice_.is_dirty:
            slice_.is_dirty = True
            self.dirty[number] = slice_
        self._changed()

    def mark_l1(self, index: int) -> None:
        """Take note that an entry of the L1 table was changed."""
        self.dirty_l1.add(index - index % L1_SECTOR)
        self._changed()

    def _check(self, slice_: Slice) -> None:
        """Find out whether writing through a slice is safe."""
        if self._geometry.has_data_file:
            slice_.is_safe = True
            return
        bits, mask = self._geometry.cluster_bits, self._geometry.host_mask
        kind_at = self._metadata.kind_at
        end = self._files.file.size
        slice_.is_safe = not any(
            entry & COPIED and ((entry & mask) >= end or kind_at((entry & mask) >> bits))
            for entry in slice_.words[:: self._geometry.stride]
        )

    async def _own_table(self, index: int) -> None:
        """Make a table of the disk's own: an empty one, or a copy of one shared with snapshots."""
        while not self._is_own(index):
            under_way = self._making.get(index)
            if under_way is not None:
                await asyncio.shield(under_way)
                continue
            self._making[index] = asyncio.get_running_loop().create_future()
            try:
                await self._make_table(index)
            finally:
                self._making.pop(index).set_result(None)

    async def _make_table(self, index: int) -> None:
        size, bits = self._geometry.cluster_size, self._geometry.cluster_bits
        old = self.slice_offset(index << self._table_shift)
        cluster, _ = await self._refcounts.allocate(1)
        self._refcounts.claim_virgin(cluster, 1)
        file = self._files.file
        if file.takes_debug_events:
            await file.debug_event(DebugEvent.L2_UPDATE)
        try:
            content = await self._files.read(old, size) if old else bytes(size)
            await self._files.write(cluster << bits, content)
        except BaseException:
            self._refcounts.release(cluster, 1)
            raise
        self._metadata.l2_tables.add(cluster)
        if old:
            # The snapshot's table is not one of the active ones any more.
            self._metadata.l2_tables.discard(old >> bits)
            self._reclaim.drop(old >> bits)
        self.l1[index] = cluster << bits | COPIED
        self.mark_l1(index)

    # What a commit writes

    def l1_sector(self, first: int) -> bytes:
        """The entries of a sector of the L1 table as they are in the file."""
        return bytes_of(self.l1[first : first + L1_SECTOR])
