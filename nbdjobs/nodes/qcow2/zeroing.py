# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Zeroes and discards: changes of the mapping alone.

Source: QEMU `block/qcow2.c` and `block/qcow2-cluster.c` for what becomes of which cluster.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Final

from nbdjobs.errors import NodeError
from nbdjobs.nodes.qcow2.constants import COMPRESSED, COPIED, OFFSET_MASK, SUBCLUSTERS, ZERO
from nbdjobs.nodes.qcow2.files import Files
from nbdjobs.nodes.qcow2.geometry import Geometry
from nbdjobs.nodes.qcow2.mapping import ALL_ZERO, unit_mask
from nbdjobs.nodes.qcow2.reading import Reader
from nbdjobs.nodes.qcow2.reclaim import Reason, Reclaim
from nbdjobs.nodes.qcow2.tables import Slice, Tables
from nbdjobs.nodes.qcow2.writing import Writer
from nbdjobs.nodes.rounding import round_down, round_up

_ZEROES: Final = memoryview(bytes(64 * 1024))
_TURN: Final = 64
"""Slices changed before others get a turn."""


class Zeroer:
    """Makes ranges of the disk in one image read as zeroes."""

    def __init__(
        self,
        geometry: Geometry,
        files: Files,
        tables: Tables,
        reader: Reader,
        writer: Writer,
        reclaim: Reclaim,
        disk_size: Callable[[], int],
        *,
        is_data_file_raw: bool,
    ):
        self._geometry = geometry
        self._files = files
        self._tables = tables
        self._reader = reader
        self._writer = writer
        self._reclaim = reclaim
        self._disk_size = disk_size
        self._is_data_file_raw = is_data_file_raw

    async def zero(self, offset: int, length: int, *, may_unmap: bool, fast_only: bool) -> None:
        """Make the range read as zeroes.

        Raises:
            NodeError: ENOTSUP, with nothing changed: only writing zeroes would help.
        """
        if self._geometry.version < 3 and not (may_unmap and self._files.backing is None):
            raise NodeError(errno.ENOTSUP)
        unit = self._unit
        begin, end = self._whole(offset, length, unit)
        ragged = [(offset, min(begin, offset + length)), (max(end, begin), offset + length)]
        ragged = [(first, last) for first, last in ragged if first < last]
        if fast_only:
            for first, last in ragged:
                if not await self._reader.is_zero(first, last - first):
                    raise NodeError(errno.ENOTSUP)
        if self._is_data_file_raw:
            await self._files.data.pwrite_zeroes(
                offset, length, may_unmap=may_unmap, fast_only=fast_only
            )
        for first, last in ragged:
            with self._reclaim.request():
                await self.write_zeroes(first, last)
        if begin < end:
            await self._change(begin, end, is_unmapped=may_unmap)

    async def discard(self, offset: int, length: int) -> None:
        """Drop the content of the clusters that lie wholly in the range; they read as zeroes.

        Raises:
            NodeError: ENOTSUP, as what is in the backing file would come to light.
        """
        if self._geometry.version < 3 and self._files.backing is not None:
            raise NodeError(errno.ENOTSUP)
        begin, end = self._whole(offset, length, self._geometry.cluster_size)
        if begin >= end:
            return
        if self._is_data_file_raw:
            await self._files.data.pwrite_zeroes(begin, min(end, self._disk_size()) - begin)
        await self._change(begin, end, is_unmapped=True, keeps_unallocated=True)

    async def write_zeroes(self, begin: int, end: int) -> None:
        """Write zero bytes where the range does not read as zeroes anyway."""
        while begin < end:
            extent = await self._tables.find(begin, end - begin)
            stop = begin + extent.length
            is_zero = self._reader.reads_as_zeroes(extent, begin)
            while begin < stop and not is_zero:
                count = min(stop - begin, len(_ZEROES))
                await self._writer.write(begin, _ZEROES[:count])
                begin += count
            begin = stop

    @property
    def _unit(self) -> int:
        if self._geometry.version < 3:
            return self._geometry.cluster_size
        return self._geometry.subcluster_size

    def _whole(self, offset: int, length: int, unit: int) -> tuple[int, int]:
        """The units wholly inside a range; the disk's last one may be incomplete."""
        end = offset + length
        end = round_up(end, unit) if end >= self._disk_size() else round_down(end, unit)
        return round_up(offset, unit), end

    async def _change(
        self, begin: int, end: int, *, is_unmapped: bool, keeps_unallocated: bool = False
    ) -> None:
        """Change the entries of whole units."""
        tables = self._tables
        turns = 0
        while begin < end:
            turns += 1
            if turns % _TURN == 0:
                await asyncio.sleep(0)
            stop = min(end, ((begin >> tables.slice_shift) + 1) << tables.slice_shift)
            # One request may be about the whole disk. What it makes free must not wait for it.
            with self._reclaim.request():
                begin = await self._change_some(
                    begin, stop, is_unmapped=is_unmapped, keeps_unallocated=keeps_unallocated
                )

    async def _change_some(
        self, begin: int, end: int, *, is_unmapped: bool, keeps_unallocated: bool
    ) -> int:
        """Change entries of one slice; returns from where on there is more to do."""
        tables = self._tables
        number = begin >> tables.slice_shift
        has_nothing = keeps_unallocated and self._files.backing is None
        if has_nothing and await tables.slice(number) is None:
            return end
        slice_ = await tables.writable_slice(number)
        bits = self._geometry.cluster_bits
        under_way = self._writer.pending.at(begin >> bits, ((end - 1) >> bits) + 1)
        if under_way is not None:
            await under_way.ended()
            return begin
        partial = self._partial_compressed(slice_, begin, end)
        if partial is not None:
            # A compressed cluster has no subclusters: it is written anew, with the first of them
            # zeroed as a whole, since a crash may come before the others.
            stop = min(partial + self._geometry.subcluster_size, self._disk_size())
            await self._writer.write(partial, _ZEROES[: stop - partial])
            return begin
        if self._change_slice(
            slice_, begin, end, is_unmapped=is_unmapped, keeps_unallocated=keeps_unallocated
        ):
            tables.mark(number, slice_)
        return end

    def _partial_compressed(self, slice_: Slice, begin: int, end: int) -> int | None:
        """Where the range holds a part, but not all, of a compressed cluster."""
        size = self._geometry.cluster_size
        for cluster, offset in (
            (round_down(begin, size), begin),
            (round_down(end - 1, size), max(begin, round_down(end - 1, size))),
        ):
            is_whole = begin <= cluster and end >= cluster + size
            if not is_whole and slice_.words[self._index(cluster)] & COMPRESSED:
                return offset
        return None

    def _index(self, offset: int) -> int:
        cluster = (offset >> self._geometry.cluster_bits) & self._tables.index_mask
        return cluster * self._geometry.stride

    def _change_slice(
        self, slice_: Slice, begin: int, end: int, *, is_unmapped: bool, keeps_unallocated: bool
    ) -> bool:
        size = self._geometry.cluster_size
        has_changed = False
        skips = keeps_unallocated and self._files.backing is None
        while begin < end:
            index = self._index(begin)
            stop = min(end, round_down(begin, size) + size)
            old = slice_.words[index]
            if self._geometry.stride == 2:
                old_bitmap = slice_.words[index + 1]
                first = (begin & (size - 1)) >> self._geometry.subcluster_bits
                count = (stop - begin) >> self._geometry.subcluster_bits
                new, bitmap = self._extended(old, old_bitmap, first, count, is_unmapped)
                if skips and not old and not old_bitmap:
                    bitmap = 0
                if bitmap != old_bitmap:
                    slice_.words[index + 1] = bitmap
                    has_changed = True
            else:
                new = old if skips and not old else self._standard(old, is_unmapped)
            if new != old:
                slice_.words[index] = new
                has_changed = True
                if not new & (OFFSET_MASK | COMPRESSED) or old & COMPRESSED:
                    self._writer.drop(old, Reason.REQUEST)
            begin = stop
        return has_changed

    def _standard(self, old: int, is_unmapped: bool) -> int:
        if self._geometry.version < 3:
            return 0
        if self._keeps_host(old, is_unmapped):
            return old | ZERO
        return ZERO

    def _extended(
        self, old: int, bitmap: int, first: int, count: int, is_unmapped: bool
    ) -> tuple[int, int]:
        if count == SUBCLUSTERS:
            return (old if self._keeps_host(old, is_unmapped) else 0), ALL_ZERO
        mask = unit_mask(first, count)
        return old, bitmap & ~mask | mask << SUBCLUSTERS

    def _keeps_host(self, entry: int, is_unmapped: bool) -> bool:
        """Whether a cluster that reads as zeroes keeps its host cluster, for later writes."""
        if entry & COMPRESSED or not entry & COPIED:
            return False
        return not is_unmapped or self._geometry.has_data_file
