# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Copying a disk, cluster by cluster, each exactly once, while others ask for parts of it first.

    to_copy  1 1 1 0 0 1 1 1      a bit per cluster; clear: the target has it, nobody need wait
                   ──────         copies in flight, in an overlap table: their bits are still set

The background job and the filter that guards the guest's writes call the same `copy(range)`. It
waits for copies in flight that touch the range, looks again at what is still to do, and does
that. A bit is cleared only after its cluster is on the target, hence a failed copy has nothing
to take back, and a bitmap in a mapped file would survive a crash with nothing worse than a few
clusters to copy again.

Source: QEMU `block/block-copy.c` for the behaviour.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from bitarray import bitarray

from nbdjobs.errors import NodeError
from nbdjobs.nodes.backing_chain import backing_of, skip_filters
from nbdjobs.nodes.buffers import BUFFER_SIZE, BufferPool
from nbdjobs.nodes.gate import is_zero
from nbdjobs.nodes.graph import Edge
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.rounding import round_down
from nbdjobs.nodes.status import DATA, BlockStatus, Status
from nbdjobs.nodes.tracked import Kind, TrackedRequests

MIN_CLUSTER: Final = 64 * 1024
"""Smallest unit of copying: below it, the cost of a request outweighs that of its bytes."""

MAX_CLUSTERS: Final = 2**30
"""A bitmap takes 128 MiB at most: disks of more than 64 TiB are copied in larger clusters."""

MAX_BUFFERS: Final = 64
"""Memory of one copy at most, in buffers of 256 KiB."""

STORAGE_CHUNK: Final = 16 * 1024 * 1024
"""Bytes that the storage is asked to copy by itself at a time."""

ZERO_GRANULE: Final = 64 * 1024
"""Runs of zeroes at least this long inside data stay sparse on the target."""


class CopyError(NodeError):
    """A copy failed; what it was to copy is still to do.

    Attributes:
        is_read: Whether it was the source that failed, not the target.
    """

    def __init__(self, error: NodeError, *, is_read: bool):
        super().__init__(error.errno, error.message, offset=error.offset)
        self.is_read = is_read


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyTuning:
    """How to copy.

    Attributes:
        max_chunk: Longest piece copied at a time, in bytes; 0 leaves the choice to the copy.
        use_copy_range: Whether to ask the storage to copy by itself first.
        compresses: Whether the target is to be written compressed.
    """

    max_chunk: int = 0
    use_copy_range: bool = False
    compresses: bool = False


def choose_cluster_size(target: Node, minimum: int = 0) -> int:
    """The unit of copying, in bytes: what the target can replace without reading, or more."""
    size = max(MIN_CLUSTER, target.cluster_size, minimum)
    while target.size > size * MAX_CLUSTERS:
        size *= 2
    return size


def new_bitmap(size: int, cluster_size: int) -> bitarray:
    """A bitmap of a disk of `size` bytes, with everything still to copy."""
    bits = bitarray(-(-size // cluster_size), endian="little")
    bits.setall(1)
    return bits


class BlockCopy:
    """The copy of one disk to another of the same size.

    Attributes:
        cluster_size: Bytes per bit; the last cluster may be cut short by the end of the disk.
        to_copy: A set bit per cluster that the target does not have yet.
        copied: Bytes copied so far.
        total: Bytes there were to copy at the beginning.
        is_cancelled: Set by `cancel`.
    """

    def __init__(
        self,
        source: Edge,
        target: Edge,
        *,
        cluster_size: int,
        tuning: CopyTuning = CopyTuning(),
        to_copy: bitarray | None = None,
    ):
        self.cluster_size = cluster_size
        self.size = source.node.size
        self.to_copy = new_bitmap(self.size, cluster_size) if to_copy is None else to_copy
        self.total = self._bytes_to_copy()
        self.copied = 0
        self.is_cancelled = False
        self._source = source
        self._target = target
        self._in_flight = TrackedRequests()
        self._buffers = BufferPool(MAX_BUFFERS)
        self._compresses = tuning.compresses
        self._uses_copy_range = tuning.use_copy_range
        chunk = STORAGE_CHUNK if tuning.use_copy_range else BUFFER_SIZE
        self._max_chunk = max(round_down(tuning.max_chunk or chunk, cluster_size), cluster_size)

    @property
    def in_flight(self) -> int:
        """Copies begun and not yet ended, those that wait for others included."""
        return len(self._in_flight)

    @property
    def has_work(self) -> bool:
        """Whether anything is not on the target yet."""
        return self.to_copy.any()

    def needs_copy(self, offset: int, length: int) -> bool:
        """Whether anything of the range is not safe on the target yet."""
        first, last = offset // self.cluster_size, (offset + length - 1) // self.cluster_size
        return not self.is_cancelled and self.to_copy.find(1, first, last + 1) >= 0

    def run_at(self, offset: int, end: int) -> tuple[bool, int]:
        """The first run of a range: whether it is still to be copied, and where it ends."""
        first, last = offset // self.cluster_size, -(-end // self.cluster_size)
        is_to_copy = self.to_copy[first]
        stop = self.to_copy.find(not is_to_copy, first, last)
        return bool(is_to_copy), end if stop < 0 else stop * self.cluster_size

    def give_up(self, begin: int, end: int) -> None:
        """Copy nothing more of these whole clusters: nobody wants them."""
        self.to_copy[begin // self.cluster_size : end // self.cluster_size] = 0

    async def leave_out(self, begin: int, end: int) -> None:
        """Count the clusters that lie in a range as not to be copied, unless they have been.

        Copies of them that are in flight end before.
        """
        unit = self.cluster_size
        first, last = -(-begin // unit), end // unit
        if end >= self.size:
            last = len(self.to_copy)
        if first >= last:
            return
        async with self._in_flight.request(
            first * unit, (last - first) * unit, Kind.COPY, is_serialising=True
        ):
            before = self._bytes_to_copy()
            self.to_copy[first:last] = 0
            self.total -= before - self._bytes_to_copy()

    def cancel(self) -> None:
        """Begin no copy from now on; those in flight go on to their end."""
        self.is_cancelled = True

    async def copy(
        self, offset: int, length: int, *, on_copied: Callable[[int], None] | None = None
    ) -> None:
        """See to it that the range, rounded to whole clusters, is on the target.

        Returns without having done so only after `cancel`. Cancelling the call abandons what is
        not copied yet, between two requests; what is then half copied counts as not copied.

        Args:
            offset: First byte.
            length: Bytes, at least 1.
            on_copied: Told of the bytes that this very call has copied, piece by piece.

        Raises:
            CopyError: Source or target failed.
        """
        async with self._in_flight.request(
            offset, length, Kind.COPY, is_serialising=True, alignment=self.cluster_size
        ) as request:
            end = request.end
            run = self._next_chunk(request.offset, end)
            while run is not None and not self.is_cancelled:
                await self._copy_clusters(*run, on_copied)
                run = self._next_chunk(run[1], end)

    async def next_run(self, offset: int, limit: int) -> tuple[int, int] | None:
        """What a background job should copy next, as begin and end, or None at the end.

        Args:
            offset: Where to look from, in bytes.
            limit: Most bytes of data to copy, or 0 for as many as one piece takes. A long hole is
                given whole, since copying it costs little, unless there is a limit.
        """
        chunk = min(limit or self._max_chunk, self._max_chunk)
        if limit:
            return self._next_run(offset, self.size, chunk)
        run = self._next_run(offset, self.size, max(_LONGEST_HOLE, chunk))
        if run is None:
            return None
        begin, end = run
        status = await self._source_status(begin, end - begin)
        hole_end = round_down(begin + status.length, self.cluster_size)
        if _is_hole(status) and hole_end > begin:
            return begin, await self._end_of_zeroing(begin, hole_end)
        return begin, min(end, begin + chunk)

    async def _end_of_zeroing(self, begin: int, end: int) -> int:
        """Cut a hole down to what the target does not have to write zeroes into for long.

        A guest that writes there, and a cancel, wait for the whole of a piece.
        """
        longest = max(round_down(_LONGEST_ZEROING, self.cluster_size), self.cluster_size)
        try:
            status = await self._target.node.block_status(begin, end - begin)
        except NodeError:
            return min(end, begin + longest)  # whether it really fails, the write will show
        if _is_hole(status):
            longest = max(round_down(status.length, self.cluster_size), self.cluster_size)
        return min(end, begin + longest)

    # Which clusters

    def _next_chunk(self, offset: int, end: int) -> tuple[int, int] | None:
        return self._next_run(offset, end, max(end - offset, 0))

    def _next_run(self, offset: int, end: int, longest: int) -> tuple[int, int] | None:
        """The first run of clusters still to copy in `[offset, end)`, in whole clusters."""
        size = self.cluster_size
        first = self.to_copy.find(1, offset // size, -(-end // size))
        if first < 0:
            return None
        stop = min(-(-end // size), first + max(longest // size, 1))
        last = self.to_copy.find(0, first, stop)
        return first * size, (last if last >= 0 else stop) * size

    def _bytes_to_copy(self) -> int:
        count = self.to_copy.count()
        cut_off = -self.size % self.cluster_size
        return count * self.cluster_size - (cut_off if count and self.to_copy[-1] else 0)

    # Copying

    async def _copy_clusters(
        self, begin: int, end: int, on_copied: Callable[[int], None] | None
    ) -> None:
        """Copy whole clusters, all of them still to copy, then clear their bits piece by piece."""
        while begin < end and not self.is_cancelled:
            chunk_end = min(end, begin + self._max_chunk)
            length = min(chunk_end, self.size) - begin
            if self._source.node.is_known_data(begin, length):
                await self._copy_data(begin, length)
                piece_end = chunk_end
            else:
                piece_end = await self._copy_unknown(begin, end)
            copied = self._mark_copied(begin, piece_end)
            if on_copied is not None:
                on_copied(copied)
            begin = piece_end

    async def _copy_unknown(self, begin: int, end: int) -> int:
        """Copy clusters of which some may be holes; the answer is where this ends."""
        status = await self._source_status(begin, min(end, self.size) - begin)
        piece_end = begin
        if _is_hole(status):
            piece_end = round_down(begin + status.length, self.cluster_size)
            if begin + status.length >= self.size:
                piece_end = end
        if piece_end > begin:
            await self._zero(begin, min(piece_end, self.size))
            return piece_end
        piece_end = min(end, begin + self._max_chunk)
        if self._compresses:
            # Only whole clusters can be compressed.
            await self._copy_data(begin, min(piece_end, self.size) - begin)
        else:
            await self._copy_pieces(begin, min(piece_end, self.size), status)
        return piece_end

    def _mark_copied(self, begin: int, end: int) -> int:
        self.to_copy[begin // self.cluster_size : end // self.cluster_size] = 0
        copied = min(end, self.size) - begin
        self.copied += copied
        return copied

    async def _copy_pieces(self, offset: int, end: int, status: BlockStatus) -> None:
        """Copy a range, given the status of its first run, in pieces that fit a buffer."""
        while True:
            length = min(status.length, end - offset)
            if _is_hole(status):
                await self._zero(offset, offset + length)
            else:
                await self._copy_data(offset, length)
            offset += length
            if offset == end:
                return
            status = await self._source_status(offset, end - offset)

    async def _source_status(self, offset: int, length: int) -> BlockStatus:
        source = self._source.node
        if source.is_known_data(offset, length):
            return BlockStatus(length, DATA)
        try:
            return await source.block_status(offset, length)
        except NodeError:
            return BlockStatus(length, DATA)  # whether it really fails, the read will show

    async def _copy_data(self, offset: int, length: int) -> None:
        if self._compresses:
            await self._copy_compressed(offset, length)
            return
        if self._uses_copy_range and await self._copy_by_storage(offset, length):
            return
        end = offset + length
        while end - offset > BUFFER_SIZE:
            await self._copy_by_hand(offset, BUFFER_SIZE)
            offset += BUFFER_SIZE
        await self._copy_by_hand(offset, end - offset)

    async def _copy_by_storage(self, offset: int, length: int) -> bool:
        try:
            await self._source.node.copy_range(offset, self._target.node, offset, length)
        except NodeError as error:
            if error.errno == errno.ENOTSUP:
                self._uses_copy_range = False
            return False  # copying by hand shows which side fails, if one does
        return True

    async def _copy_compressed(self, offset: int, length: int) -> None:
        """Copy whole clusters, one buffer at a time or one cluster, whichever is longer."""
        step = max(BUFFER_SIZE, self._target.node.cluster_size)
        end = offset + length
        for begin in range(offset, end, step):
            data = memoryview(bytearray(min(step, end - begin)))
            try:
                await self._source.node.pread(begin, data)
            except NodeError as error:
                raise CopyError(error, is_read=True) from error
            if is_zero(data):
                await self._zero(begin, begin + len(data))
                continue
            try:
                await self._target.node.pwrite_compressed(begin, data)
            except NodeError as error:
                raise CopyError(error, is_read=False) from error

    async def _copy_by_hand(self, offset: int, length: int) -> None:
        buffer = self._buffers.take_free() or await self._buffers.take()
        try:
            data = buffer[:length]
            try:
                await self._source.node.pread(offset, data)
            except NodeError as error:
                raise CopyError(error, is_read=True) from error
            if length <= ZERO_GRANULE and not is_zero(data):
                await self._write(offset, data)
                return
            for begin, end, is_hole in _split_at_zeroes(data):
                if is_hole:
                    await self._zero(offset + begin, offset + end)
                else:
                    await self._write(offset + begin, data[begin:end])
        finally:
            self._buffers.give_back(buffer)

    async def _write(self, offset: int, data: memoryview) -> None:
        try:
            await self._target.node.pwrite(offset, data)
        except NodeError as error:
            raise CopyError(error, is_read=False) from error

    def _stays_zero(self, run: BlockStatus) -> bool:
        """Whether a run of the target reads as zeroes whatever becomes of its backing file.

        The backing file may be the source, which a guest is about to overwrite.
        """
        if not _is_hole(run):
            return False
        is_own = int(run.status) & _ALLOCATED_BIT
        return bool(is_own) or backing_of(skip_filters(self._target.node)) is None

    async def _zero(self, offset: int, end: int) -> None:
        """Make a range of the target read as zeroes, where it does not do so already."""
        target = self._target.node
        try:
            while offset < end:
                status = await target.block_status(offset, end - offset)
                if not self._stays_zero(status):
                    await target.pwrite_zeroes(offset, status.length)
                offset += status.length
        except NodeError as error:
            raise CopyError(error, is_read=False) from error


_LONGEST_HOLE: Final = 1024 * 1024 * 1024
_LONGEST_ZEROING: Final = 16 * 1024 * 1024


_ZERO_BIT: Final = int(Status.ZERO)
_ALLOCATED_BIT: Final = int(Status.ALLOCATED)


def _is_hole(run: BlockStatus) -> bool:
    """Whether a run reads as zeroes; on plain ints, as `IntFlag` takes 1 us for an `and`."""
    return int(run.status) & _ZERO_BIT != 0


def _split_at_zeroes(data: memoryview) -> Iterator[tuple[int, int, bool]]:
    """Cut data where granules of zeroes begin and end: (begin, end, whether zeroes)."""
    begin = 0
    was_zero = is_zero(data[:ZERO_GRANULE])
    for offset in range(ZERO_GRANULE, len(data), ZERO_GRANULE):
        is_hole = is_zero(data[offset : offset + ZERO_GRANULE])
        if is_hole is not was_zero:
            yield begin, offset, was_zero
            begin, was_zero = offset, is_hole
    yield begin, len(data), was_zero
