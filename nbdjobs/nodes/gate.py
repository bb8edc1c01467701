# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The gate in front of every node: what a request goes through before the driver sees it.

Alignment to the driver's limits, splitting, the overlap table, zero detection and the write
threshold are written here once, and a driver implements only what its storage can do (`_pread`,
`_pwrite`, ...).

What is not in use costs one `if`: where a request needs nothing of the above, the gate is a plain
function that hands out the driver's coroutine, without one of its own around it.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Final

from nbdjobs.errors import NodeError
from nbdjobs.nodes.config import DetectZeroes, Limits, NodeConfig
from nbdjobs.nodes.rounding import round_down, round_up
from nbdjobs.nodes.status import DATA, BlockStatus
from nbdjobs.nodes.tracked import Kind, TrackedRequests
from nbdjobs.protocol.export import FileRange

Operation = Coroutine[Any, Any, None]

_BOUNCE: Final = 1024 * 1024
_ZEROES: Final = memoryview(bytes(_BOUNCE))
_ZERO_BLOCK: Final = bytes(64 * 1024)


class Gate(ABC):
    """The requests that a node takes, and those that its driver implements.

    Attributes:
        config: Options common to all drivers.
        limits: What one request of the driver can take.
        is_active: Its image is not left to another process; else it can only be read.
        tracked: Requests in flight, where the node has to order overlapping ones.
        write_threshold: Where in the node a write has to end beyond to be reported, or 0.
    """

    _on_threshold: Callable[[int, int], None] | None = None

    def __init__(self, config: NodeConfig, limits: Limits):
        self.config = config
        self.is_active = config.is_active
        self._heeds_flushes = not config.cache.is_no_flush
        self.tracked = TrackedRequests()
        self.write_threshold = 0
        self.set_limits(limits)

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes of the node, a multiple of 512."""

    # Set up

    def set_config(self, config: NodeConfig) -> None:
        """Take other common options; no request may be in flight."""
        self.config = config
        self._heeds_flushes = not config.cache.is_no_flush
        self._choose_gate()

    def set_active(self, is_active: bool) -> None:
        """Take changes or refuse them; no request may be in flight."""
        self.is_active = is_active
        self._choose_gate()

    def check_active(self) -> None:
        """Raise `NodeError` EPERM while the image is left to another process."""
        if not self.is_active:
            raise NodeError(errno.EPERM, "export is inactive")

    def set_limits(self, limits: Limits) -> None:
        """Take new limits, with maxima cut to whole units; no request may be in flight."""
        self.limits = limits.in_whole_units()
        self._choose_gate()

    def set_write_threshold(self, threshold: int, on_exceeded: Callable[[int, int], None]) -> None:
        """Report the first write from now on that ends beyond a place.

        Args:
            threshold: Bytes from the start of the node; 0 to report nothing any more.
            on_exceeded: Called once with the threshold, and by how many bytes it was exceeded.
        """
        self.write_threshold = threshold
        self._on_threshold = on_exceeded
        self._choose_gate()

    def _choose_gate(self) -> None:
        """Work out which requests need nothing of the gate."""
        needs_gate = self.limits.request_alignment > 1 or self.limits.max_transfer > 0
        self._reads_pass = not needs_gate
        self._writes_pass = (
            not needs_gate
            and self.is_active
            and not self.write_threshold
            and self.config.detect_zeroes is DetectZeroes.OFF
        )

    def _check_write_threshold(self, end: int) -> None:
        threshold = self.write_threshold
        if 0 < threshold < end and self._on_threshold is not None:
            self.write_threshold = 0
            self._choose_gate()
            self._on_threshold(threshold, end - threshold)

    # Requests

    def pread(self, offset: int, buffer: memoryview) -> Operation:
        """Fill `buffer` with the content from `offset` on."""
        if self._reads_pass:
            return self._pread(offset, buffer)
        return self._gated_pread(offset, buffer)

    def pread_now(self, offset: int, buffer: memoryview, data_only: bool) -> bool:
        """Do a read on the spot if that needs no wait; see `protocol.export.Backend`.

        A coroutine costs as much as a small read from the page cache, and a read comes through
        several nodes. Who overrides this passes on nothing that its `pread` would treat otherwise.
        """
        return False

    def stored_at(self, offset: int, length: int, data_only: bool) -> FileRange | None:
        """Tell where the kernel can send a range from at once; see `protocol.export.Backend`.

        Only where the bytes of the file are the content for good: what a later write must not
        change under a reader's hands, such as a point in time, has to be read.
        """
        return None

    def pwrite_now(self, offset: int, data: memoryview) -> bool:
        """Do a write on the spot if that needs no wait; see `protocol.export.Backend`.

        Who overrides this passes on nothing that its `pwrite` would treat otherwise.
        """
        return False

    def pwrite(self, offset: int, data: memoryview, *, fua: bool = False) -> Operation:
        """Write `data` at `offset`; with `fua`, return only when it is on stable storage."""
        fua = fua and self._heeds_flushes
        if self._writes_pass:
            return self._pwrite(offset, data, fua)
        return self._gated_pwrite(offset, data, fua)

    async def pwrite_zeroes(
        self,
        offset: int,
        length: int,
        *,
        fua: bool = False,
        may_unmap: bool = True,
        fast_only: bool = False,
    ) -> None:
        """Make the range read as zeroes.

        Args:
            offset: First byte.
            length: Bytes, at least 1.
            fua: Return only when the zeroes are on stable storage.
            may_unmap: The range may become a hole, where the node's `discard` option allows.
            fast_only: Fail with ENOTSUP, changing nothing, unless this is faster than writing.
        """
        self.check_active()
        if self.write_threshold:
            self._check_write_threshold(offset + length)
        fua = fua and self._heeds_flushes
        may_unmap = may_unmap and self.config.can_unmap
        alignment = self.limits.request_alignment
        if alignment == 1:
            await self._zero_range(offset, length, fua, may_unmap, fast_only)
            return
        begin, end = round_up(offset, alignment), round_down(offset + length, alignment)
        if fast_only and (begin != offset or end != offset + length):
            raise NodeError(errno.ENOTSUP)
        if begin >= end:
            await self._write_zero_bytes(offset, length, fua)
            return
        if offset < begin:
            await self._write_zero_bytes(offset, begin - offset, fua)
        async with self.tracked.request(begin, end - begin, Kind.WRITE, is_serialising=False):
            await self._zero_range(begin, end - begin, fua, may_unmap, fast_only)
        if end < offset + length:
            await self._write_zero_bytes(end, offset + length - end, fua)

    async def pdiscard(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Drop the content of the range, as far as the storage can and the options allow.

        Ragged ends that the storage cannot discard keep their content.
        """
        self.check_active()
        if not self.config.can_unmap:
            return
        limits = self.limits
        alignment = max(limits.request_alignment, limits.pdiscard_alignment)
        begin, end = round_up(offset, alignment), round_down(offset + length, alignment)
        if begin >= end:
            return
        if limits.request_alignment == 1:
            await self._discard_range(begin, end, fua)
            return
        async with self.tracked.request(begin, end - begin, Kind.DISCARD, is_serialising=False):
            await self._discard_range(begin, end, fua)

    async def flush(self) -> None:
        """Bring all completed writes to stable storage."""
        if self._heeds_flushes:
            await self._flush()

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """Describe the first run of the range, at most `length` bytes long."""
        if length <= 0:
            raise NodeError(errno.EINVAL, "block status of an empty range")
        if self.limits.request_alignment > 1:
            return await self._aligned_block_status(offset, length)
        return await self._block_status(offset, length)

    async def extents(self, offset: int, length: int) -> AsyncIterator[tuple[int, BlockStatus]]:
        """Walk the runs of a range: pairs of offset and status, without gaps."""
        end = offset + length
        while offset < end:
            run = await self.block_status(offset, end - offset)
            yield offset, run
            offset += run.length

    # What a driver implements

    @abstractmethod
    async def _pread(self, offset: int, buffer: memoryview) -> None:
        """Read; offset and length fit the limits.

        Where the size is not a multiple of the request alignment, the last block reaches beyond
        the end of the node: what is there reads as zeroes.
        """

    @abstractmethod
    async def _pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        """Write; offset and length fit the limits."""

    async def _pwrite_zeroes(
        self, offset: int, length: int, fua: bool, may_unmap: bool, fast_only: bool
    ) -> None:
        """Zero a range within the limits, faster than writing; ENOTSUP where that is not so."""
        raise NodeError(errno.ENOTSUP)

    async def _pdiscard(self, offset: int, length: int) -> None:
        """Discard a range within the limits; ENOTSUP is not an error for the caller."""
        raise NodeError(errno.ENOTSUP)

    async def _flush(self) -> None:
        """Bring completed writes to stable storage; nothing to do where none are cached."""

    async def _block_status(self, offset: int, length: int) -> BlockStatus:
        """Describe the first run; the default knows only that it is allocated.

        `offset` fits the request alignment, and the run is at most `length` bytes long.
        """
        return BlockStatus(length, DATA)

    # How the gate does it

    async def _gated_pread(self, offset: int, buffer: memoryview) -> None:
        length = len(buffer)
        alignment = self.limits.request_alignment
        if not length:
            return
        if alignment == 1:
            await self._read_pieces(offset, buffer)
            return
        async with self.tracked.request(offset, length, Kind.READ, is_serialising=False):
            if not (offset | length) % alignment:
                await self._read_pieces(offset, buffer)
                return
            begin = round_down(offset, alignment)
            bounce = memoryview(bytearray(round_up(offset + length, alignment) - begin))
            await self._read_pieces(begin, bounce)
            buffer[:] = bounce[offset - begin : offset - begin + length]

    async def _read_pieces(self, offset: int, buffer: memoryview) -> None:
        for begin, end in _pieces(0, len(buffer), self.limits.max_transfer):
            await self._pread(offset + begin, buffer[begin:end])

    async def _gated_pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        self.check_active()
        length = len(data)
        detect = self.config.detect_zeroes
        if not length:
            return
        if self.write_threshold:
            self._check_write_threshold(offset + length)
        if detect is not DetectZeroes.OFF and is_zero(data):
            await self.pwrite_zeroes(
                offset, length, fua=fua, may_unmap=detect is DetectZeroes.UNMAP
            )
            return
        await self._aligned_pwrite(offset, data, fua)

    async def _aligned_pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        length = len(data)
        alignment = self.limits.request_alignment
        if alignment == 1:
            await self._write_pieces(offset, data, fua)
            return
        is_ragged = bool((offset | length) % alignment)
        async with self.tracked.request(
            offset, length, Kind.WRITE, is_serialising=is_ragged, alignment=alignment
        ) as request:
            if is_ragged:
                data = await self._fill_up(request.offset, request.end, offset, data)
            await self._write_pieces(request.offset, data, fua)

    async def _fill_up(self, begin: int, end: int, offset: int, data: memoryview) -> memoryview:
        """Surround `data` with what is stored, so that it covers `[begin, end)`."""
        alignment = self.limits.request_alignment
        bounce = memoryview(bytearray(end - begin))
        ragged = {begin} if begin < offset else set()
        if offset + len(data) < end:
            ragged.add(end - alignment)
        for block in ragged:
            await self._pread(block, bounce[block - begin : block - begin + alignment])
        bounce[offset - begin : offset - begin + len(data)] = data
        return bounce

    async def _write_pieces(self, offset: int, data: memoryview, fua: bool) -> None:
        for begin, end in _pieces(0, len(data), self.limits.max_transfer):
            await self._pwrite(offset + begin, data[begin:end], fua)

    async def _write_zero_bytes(self, offset: int, length: int, fua: bool) -> None:
        for begin, end in _pieces(offset, offset + length, _BOUNCE):
            await self._aligned_pwrite(begin, _ZEROES[: end - begin], fua)

    async def _zero_range(
        self, offset: int, length: int, fua: bool, may_unmap: bool, fast_only: bool
    ) -> None:
        unit = self.limits.pwrite_zeroes_alignment or 1
        begin, end = round_up(offset, unit), round_down(offset + length, unit)
        if begin >= end:
            begin = end = offset + length
        if fast_only and (begin, end) != (offset, offset + length):
            raise NodeError(errno.ENOTSUP)
        await self._zero_with_bytes(offset, begin, fua)
        for first, last in _pieces(begin, end, self.limits.max_pwrite_zeroes):
            try:
                await self._pwrite_zeroes(first, last - first, fua, may_unmap, fast_only)
            except NodeError as error:
                if error.errno != errno.ENOTSUP or fast_only:
                    raise
                await self._zero_with_bytes(first, last, fua)
        await self._zero_with_bytes(end, offset + length, fua)

    async def _zero_with_bytes(self, begin: int, end: int, fua: bool) -> None:
        step = min(self.limits.max_transfer or _BOUNCE, _BOUNCE)
        for first, last in _pieces(begin, end, step):
            await self._pwrite(first, _ZEROES[: last - first], fua)

    async def _aligned_block_status(self, offset: int, length: int) -> BlockStatus:
        """Describe the range in whole blocks; one of several runs counts as data."""
        alignment = self.limits.request_alignment
        begin = round_down(offset, alignment)
        asked = min(round_up(offset + length, alignment), self.size) - begin
        found, status = await self._block_status(begin, asked)
        if found < asked:
            found = round_down(found, alignment)
        if not found:
            found, status = alignment, DATA
        return BlockStatus(min(begin + found - offset, length), status)

    async def _discard_range(self, begin: int, end: int, fua: bool) -> None:
        try:
            for first, last in _pieces(begin, end, self.limits.max_pdiscard):
                await self._pdiscard(first, last - first)
        except NodeError as error:
            if error.errno != errno.ENOTSUP:
                raise
        if fua:
            await self.flush()


def _pieces(begin: int, end: int, maximum: int) -> Iterator[tuple[int, int]]:
    """Cut `[begin, end)` into pieces of at most `maximum` bytes; 0 means no maximum."""
    if begin >= end:
        return
    step = maximum or end - begin
    for first in range(begin, end, step):
        yield first, min(first + step, end)


def is_zero(data: memoryview) -> bool:
    """Whether all bytes are zero; ends at the first block that has another byte."""
    if not data:
        return True
    if data[0] or data[-1]:
        return False
    # Comparing bytes objects is one memcmp; comparing memoryviews unpacks every element.
    return all(
        bytes(data[begin:end]) == _ZERO_BLOCK[: end - begin]
        for begin, end in _pieces(0, len(data), len(_ZERO_BLOCK))
    )
