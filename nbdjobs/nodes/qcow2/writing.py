# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Writes that change the mapping: clusters are chosen, filled, and only then referred to.

        ┌─ copied ─┬──── data ────┬─ copied ─┐
    ────┴──────────┴──────────────┴──────────┴────   one piece: new host clusters in a row

A piece is written while the tables still say what was there before; reads see the old content
until the tables change, all at once. Other writes to clusters of the piece wait for it, and then
look again: by then most of them find their cluster allocated. Pieces of different clusters do
not know of each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, NamedTuple

from nbdjobs.nodes.events import DebugEvent
from nbdjobs.nodes.qcow2.compressed import CompressedClusters
from nbdjobs.nodes.qcow2.constants import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    SUBCLUSTERS,
)
from nbdjobs.nodes.qcow2.errors import CorruptionError
from nbdjobs.nodes.qcow2.files import Files
from nbdjobs.nodes.qcow2.geometry import Geometry
from nbdjobs.nodes.qcow2.mapping import ALL_ALLOCATED, Kind, Words, unit_mask
from nbdjobs.nodes.qcow2.overlap import MetadataMap
from nbdjobs.nodes.qcow2.reading import Reader
from nbdjobs.nodes.qcow2.reclaim import Reason, Reclaim
from nbdjobs.nodes.qcow2.refcounts import Refcounts
from nbdjobs.nodes.qcow2.tables import Extent, Slice, Tables
from nbdjobs.nodes.rounding import round_down, round_up

_JOINED: Final = 1024 * 1024
"""Up to here, data is copied together with what surrounds it, for one write of all."""


class _Piece(NamedTuple):
    """Clusters that are being filled.

    Attributes:
        first: Guest cluster.
        clusters: How many.
        host: Where the first of them is in its file.
        is_new: They were chosen for this piece; otherwise they were there and held nothing.
        is_blank: They read as zeroes already.
    """

    first: int
    clusters: int
    host: int
    is_new: bool
    is_blank: bool


class Filling:
    """Clusters that are being filled by one piece; most of the time nobody waits for it."""

    __slots__ = ("_ended", "clusters", "first")

    def __init__(self, first: int, clusters: int):
        self.first = first
        self.clusters = clusters
        self._ended: asyncio.Future[None] | None = None

    async def ended(self) -> None:
        """Wait for the end, however it comes."""
        if self._ended is None:
            self._ended = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._ended)

    def end(self) -> None:
        """Let those go on who wait."""
        if self._ended is not None:
            self._ended.set_result(None)


class Pending:
    """Which guest clusters are being filled, so that their entries will change."""

    def __init__(self) -> None:
        self._clusters: dict[int, Filling] = {}

    def at(self, first: int, end: int) -> Filling | None:
        """What is going on at one of the clusters, if anything."""
        if not self._clusters:
            return None
        for cluster in range(first, end):
            found = self._clusters.get(cluster)
            if found is not None:
                return found
        return None

    def free_from(self, first: int, end: int) -> int:
        """How many clusters from `first` on are not being filled."""
        return next((c - first for c in range(first, end) if c in self._clusters), end - first)

    def begin(self, first: int, clusters: int) -> Filling:
        """Enter clusters at which nothing is going on."""
        filling = Filling(first, clusters)
        for cluster in range(first, first + clusters):
            self._clusters[cluster] = filling
        return filling

    def end(self, filling: Filling) -> None:
        """Take them out again and let those go on who waited."""
        for cluster in range(filling.first, filling.first + filling.clusters):
            del self._clusters[cluster]
        filling.end()


class Writer:
    """Writes to the disk in one image.

    Attributes:
        pending: The clusters being filled.
    """

    def __init__(
        self,
        geometry: Geometry,
        files: Files,
        tables: Tables,
        refcounts: Refcounts,
        reclaim: Reclaim,
        metadata: MetadataMap,
        reader: Reader,
        compressed: CompressedClusters,
        disk_size: Callable[[], int],
    ):
        self.pending = Pending()
        self._geometry = geometry
        self._files = files
        self._tables = tables
        self._refcounts = refcounts
        self._reclaim = reclaim
        self._metadata = metadata
        self._reader = reader
        self._compressed = compressed
        self._disk_size = disk_size

    async def write(self, offset: int, data: memoryview) -> None:
        """Write `data`; the range is inside the disk."""
        done = 0
        while done < len(data):
            done += await self._write_some(offset + done, data[done:])

    async def _write_some(self, offset: int, data: memoryview) -> int:
        """Write the beginning of `data`; returns how much, 0 to be called again."""
        tables, geometry = self._tables, self._geometry
        bits = geometry.cluster_bits
        first = offset >> bits
        number = offset >> tables.slice_shift
        slice_ = tables.writable_now(number) or await tables.writable_slice(number)
        extent = None
        # An entry of nothing but zeroes says of itself that its cluster is not there.
        if slice_.words[(first & tables.index_mask) * geometry.stride]:
            extent = tables.extent_in(slice_, number, offset, len(data))
            if extent.kind is Kind.DATA and extent.is_private:
                await self._write_in_place(slice_, extent, offset, data)
                return extent.length
        under_way = self.pending.at(first, first + 1)
        if under_way is not None:
            await under_way.ended()
            return 0
        if extent is not None and extent.is_private:
            length = extent.length
        else:
            extent = None
            length = self._length_to_choose(slice_, number, offset, len(data))
        last = (offset + length - 1) >> bits
        count = self.pending.free_from(first, last + 1) if last > first else 1
        entries = self._entries(slice_, first, count)
        filling = self.pending.begin(first, count)
        try:
            piece = await self._piece(extent, offset, first, count)
            length = min(length, ((first + piece.clusters) << bits) - offset)
            await self._fill_and_link(piece, entries, number, offset, data[:length])
        finally:
            self.pending.end(filling)
        return length

    def _length_to_choose(self, slice_: Slice, number: int, offset: int, length: int) -> int:
        """How many bytes from `offset` on are in clusters that need a new place."""
        bits, stride = self._geometry.cluster_bits, self._geometry.stride
        end = min(offset + length, (number + 1) << self._tables.slice_shift)
        last = (end - 1) >> bits
        for cluster in range((offset >> bits) + 1, last + 1):
            if slice_.words[(cluster & self._tables.index_mask) * stride] & COPIED:
                return (cluster << bits) - offset
        return end - offset

    def _entries(self, slice_: Slice, first: int, count: int) -> Words:
        """A copy of the entries of some clusters."""
        stride = self._geometry.stride
        index = (first & self._tables.index_mask) * stride
        return slice_.words[index : index + count * stride]

    async def _piece(self, extent: Extent | None, offset: int, first: int, count: int) -> _Piece:
        """Find the host clusters to fill: those of the extent, or new ones, maybe fewer."""
        size, bits = self._geometry.cluster_size, self._geometry.cluster_bits
        if extent is not None:
            host = extent.host - (offset & (size - 1))
            self._check_place(host, count << bits)
            self._check_inside(host, count << bits)
            return _Piece(first, count, host, is_new=False, is_blank=False)
        if self._geometry.has_data_file:
            return _Piece(first, count, first << bits, is_new=True, is_blank=False)
        file = self._files.file
        if file.takes_debug_events:
            await file.debug_event(DebugEvent.CLUSTER_ALLOC)
        found = self._refcounts.allocate_now(count) or await self._refcounts.allocate(count)
        # What reads as zeroes in the file is noise once it is decrypted.
        is_blank = self._refcounts.claim_virgin(*found) and self._files.cipher is None
        return _Piece(first, found[1], found[0] << bits, is_new=True, is_blank=is_blank)

    async def _fill_and_link(
        self, piece: _Piece, entries: Words, number: int, offset: int, data: memoryview
    ) -> None:
        tables, stop = self._tables, offset + len(data)
        begin, end = self._bounds(piece, entries, offset, stop)
        try:
            if begin == offset and end == stop:
                await self._write_to(piece, offset, data)
            else:
                await self._fill(piece, begin, end, offset, data)
            slice_ = tables.writable_now(number) or await tables.writable_slice(number)
        except BaseException:
            if piece.is_new and not self._geometry.has_data_file:
                self._refcounts.release(piece.host >> self._geometry.cluster_bits, piece.clusters)
            raise
        self._link(piece, entries, slice_, begin, end)
        tables.mark(number, slice_)

    # Filling

    def _bounds(self, piece: _Piece, entries: Words, offset: int, end: int) -> tuple[int, int]:
        """Widen a range to what has to be filled, so that no old content is lost."""
        stride = self._geometry.stride
        head = self._unit(piece, entries[0])
        tail = self._unit(piece, entries[(piece.clusters - 1) * stride])
        return round_down(offset, head), round_up(end, tail)

    def _unit(self, piece: _Piece, entry: int) -> int:
        """What has to be filled at once: all of a cluster that leaves its old place."""
        if piece.is_new and _has_content(entry):
            return self._geometry.cluster_size
        return self._geometry.subcluster_size

    async def _fill(
        self, piece: _Piece, begin: int, end: int, offset: int, data: memoryview
    ) -> None:
        """Write data, and around it what reads find there now."""
        stop = offset + len(data)
        end = max(min(end, self._disk_size()), stop)
        head_is_zero = begin == offset or await self._reader.is_zero(begin, offset - begin)
        tail_is_zero = stop == end or await self._reader.is_zero(stop, end - stop)
        if piece.is_blank and head_is_zero:
            begin = offset
        if piece.is_blank and tail_is_zero:
            end = stop
        if begin == offset and end == stop:
            await self._write_to(piece, offset, data)
            return
        head = memoryview(bytearray(offset - begin))
        tail = memoryview(bytearray(end - stop))
        if not head_is_zero:
            await self._copy(begin, head)
        if not tail_is_zero:
            await self._copy(stop, tail)
        if len(data) <= _JOINED:
            await self._write_to(piece, begin, memoryview(b"".join((head, data, tail))))
            return
        for place, part in ((begin, head), (offset, data), (stop, tail)):
            if part:
                await self._write_to(piece, place, part)

    async def _copy(self, offset: int, buffer: memoryview) -> None:
        file = self._files.file
        if file.takes_debug_events:
            await file.debug_event(DebugEvent.COW_READ)
        await self._reader.read(offset, buffer)

    async def _write_to(self, piece: _Piece, offset: int, data: memoryview) -> None:
        host = piece.host + offset - (piece.first << self._geometry.cluster_bits)
        await self._write_data(offset, host, data)

    # Referring to what was filled

    def _link(self, piece: _Piece, entries: Words, slice_: Slice, begin: int, end: int) -> None:
        size, bits = self._geometry.cluster_size, self._geometry.cluster_bits
        stride = self._geometry.stride
        index = (piece.first & self._tables.index_mask) * stride
        for number in range(piece.clusters):
            old = entries[number * stride]
            if old and piece.is_new:
                self.drop(old)
            slice_.words[index] = piece.host + number * size | COPIED
            if stride == 2:
                start = (piece.first + number) << bits
                slice_.words[index + 1] = self._bitmap(
                    piece, old, entries[2 * number + 1], max(begin - start, 0), end - start
                )
            index += stride

    def _bitmap(self, piece: _Piece, entry: int, bitmap: int, begin: int, end: int) -> int:
        """The bitmap of a cluster of which `[begin, end)` was filled."""
        if piece.is_new and _has_content(entry):
            return ALL_ALLOCATED
        bits = self._geometry.subcluster_bits
        first = begin >> bits
        last = min((end - 1) >> bits, SUBCLUSTERS - 1)
        mask = unit_mask(first, last - first + 1)
        return bitmap & ~(mask << SUBCLUSTERS) | mask

    def drop(self, entry: int, reason: Reason = Reason.OTHER) -> None:
        """Give up what an entry refers to, which is no longer in the tables."""
        if entry & COMPRESSED:
            self._reclaim.drop(*self._compressed.users(entry), reason)
        elif entry & OFFSET_MASK and not self._geometry.has_data_file:
            cluster = (entry & OFFSET_MASK) >> self._geometry.cluster_bits
            self._reclaim.drop(cluster, 1, reason)

    # Compressed writes

    async def write_compressed(self, offset: int, content: memoryview) -> None:
        """Replace a whole cluster, whose end may lie beyond that of the disk.

        What does not get smaller is written as it is.
        """
        cluster = offset >> self._geometry.cluster_bits
        number = offset >> self._tables.slice_shift
        await self._tables.writable_slice(number)
        while (under_way := self.pending.at(cluster, cluster + 1)) is not None:
            await under_way.ended()
        filling = self.pending.begin(cluster, 1)
        try:
            entry = await self._compressed.write(content)
            if entry is not None:
                await self._link_compressed(number, cluster, entry)
        finally:
            self.pending.end(filling)
        if entry is None:
            await self.write(offset, content[: self._disk_size() - offset])

    async def _link_compressed(self, number: int, cluster: int, entry: int) -> None:
        try:
            slice_ = await self._tables.writable_slice(number)
        except BaseException:
            self.drop(entry)
            raise
        stride = self._geometry.stride
        index = (cluster & self._tables.index_mask) * stride
        self.drop(slice_.words[index])
        slice_.words[index] = entry
        if stride == 2:
            slice_.words[index + 1] = 0
        self._tables.mark(number, slice_)

    # Writing in place

    async def _write_in_place(
        self, slice_: Slice, extent: Extent, offset: int, data: memoryview
    ) -> None:
        if not slice_.is_safe:
            self._check_place(extent.host, extent.length)
            self._check_inside(extent.host, extent.length)
        await self._write_data(offset, extent.host, data[: extent.length])

    async def _write_data(self, offset: int, host: int, data: memoryview) -> None:
        node = self._files.data
        if node.takes_debug_events:
            await node.debug_event(DebugEvent.WRITE_AIO)
        if self._files.cipher is not None:
            data = self._files.cipher.encrypted(offset, host, data)
        await node.pwrite(host, data)

    def _check_inside(self, host: int, length: int) -> None:
        """Refuse a place behind the end of the file, where data cannot have been before."""
        if host >= self._files.file.size and not self._geometry.has_data_file:
            raise CorruptionError(
                "Preventing invalid write on data (outside of the image file)",
                offset=host,
                size=length,
            )

    def _check_place(self, host: int, length: int) -> None:
        if not self._geometry.has_data_file:
            self._metadata.check(host, length)


def _has_content(entry: int) -> bool:
    """Whether an entry refers to a host cluster, or to compressed bytes."""
    return bool(entry & (COMPRESSED | OFFSET_MASK))
