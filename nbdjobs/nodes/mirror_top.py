# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A filter that keeps a second node in step with the disk that clients write.

    client ──▶ mirror_top ──▶ disk        to_copy  1 1 0 0 1
                    └──────▶ target                    └┴─ in step: writes go to both

Every cluster is copied once. From then on a client's write goes to the disk and to the target
before it is answered; so there is no race between clients that write and a job that copies after
them: what is left to do only gets less, however fast clients are, and when it is done, disk and
target are the same at every moment. The price is that writes wait for both.

Requests that change the same bytes go one after the other, so that both nodes see them in the
same order. A write that fails on either node, or is cancelled half-way, makes its clusters be
copied again: clients are not told of errors of the target, the job is.

Source: QEMU `block/mirror.c` (mirror_top, copy-mode=write-blocking) for the behaviour.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from bitarray import bitarray

from nbdjobs.errors import NodeError
from nbdjobs.nodes.backing_chain import allocated_above
from nbdjobs.nodes.block_copy import CopyError, new_bitmap
from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.gate import is_zero
from nbdjobs.nodes.graph import Edge
from nbdjobs.nodes.job_filter import JobFilter
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.tracked import Kind


class MirrorTop(JobFilter):
    """The filter.

    Attributes:
        unit: Bytes per bit of `to_copy`.
        to_copy: A set bit per cluster that is not in step.
        on_dirty: Called when a cluster got out of step again.
    """

    driver: ClassVar[str] = "mirror_top"

    _target: Node

    def __init__(self, name: str, config: NodeConfig):
        super().__init__(name, config)
        self.unit = 1
        self.to_copy = bitarray(endian="little")
        self.on_dirty: Callable[[], None] = lambda: None

    def arm(self, target: Node, unit: int) -> None:
        """Begin to keep `target`, a node below, in step; no request is in flight.

        Args:
            target: What the disk is to be committed to; what the disk has from there itself is in
                step already.
            unit: Bytes to copy at a time, a power of two.
        """
        self._target = target
        self.unit = unit
        self.to_copy = new_bitmap(self.size, unit)

    # What it is

    def child_permissions(
        self, edge: Edge, needed: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """As users do, but the images below are consistent only together, and the target changes.

        The target is below, so that what is allowed there has to be allowed here.
        """
        changes = Permission.WRITE | Permission.RESIZE
        return needed & ~Permission.CONSISTENT_READ, shared | changes

    # Getting in step

    @property
    def bytes_to_copy(self) -> int:
        """How much is not in step."""
        return self.to_copy.count() * self.unit

    async def scan(self, offset: int, length: int) -> int:
        """Find out whether a range is in step already, since the disk has it from the target.

        Args:
            offset: First byte, a multiple of the unit.
            length: Bytes, at least 1.

        Returns:
            How many bytes, a multiple of the unit, were looked at.

        Raises:
            NodeError: An image could not be read.
        """
        async with self.tracked.request(
            offset, length, Kind.COPY, is_serialising=True, alignment=self.unit
        ) as request:
            end = min(request.end, self.size)
            is_wanted, found = await allocated_above(
                self._below, self._target, offset, end - offset
            )
            units = (offset + found == end and -(-found // self.unit)) or found // self.unit
            if is_wanted or not units:
                return max(units, 1) * self.unit
            first = offset // self.unit
            self.to_copy[first : first + units] = 0
            return units * self.unit

    async def copy(self, offset: int, length: int) -> None:
        """Bring a range in step, rounded to whole units.

        Cancelling leaves what is not done to be copied.

        Raises:
            CopyError: The disk or the target failed.
        """
        async with self.tracked.request(
            offset, length, Kind.COPY, is_serialising=True, alignment=self.unit
        ) as request:
            await self._copy_units(request.offset, request.end)

    async def _copy_units(self, begin: int, end: int) -> None:
        position = begin
        while (first := self.to_copy.find(1, position // self.unit, -(-end // self.unit))) >= 0:
            last = self.to_copy.find(0, first, -(-end // self.unit))
            position = end if last < 0 else last * self.unit
            await self._copy_range(first * self.unit, min(position, self.size))
            self.to_copy[first : -(-position // self.unit)] = 0

    async def _copy_range(self, offset: int, end: int) -> None:
        while offset < end:
            try:
                is_wanted, length = await allocated_above(
                    self._below, self._target, offset, end - offset
                )
                length = min(length, _LONGEST_READ)
                data = memoryview(bytearray(length if is_wanted else 0))
                await self._below.pread(offset, data)
            except NodeError as error:
                raise CopyError(error, is_read=True) from error
            if is_wanted:
                await self._write_target(offset, data)
            offset += length

    async def _write_target(self, offset: int, data: memoryview) -> None:
        try:
            if is_zero(data):
                await self._target.pwrite_zeroes(offset, len(data))
            else:
                await self._target.pwrite(offset, data)
        except NodeError as error:
            raise CopyError(error, is_read=False) from error

    # Requests

    async def _pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        await self._change(
            offset,
            len(data),
            self._below.pwrite(offset, data, fua=fua),
            lambda: self._target.pwrite(offset, data),
        )

    async def _pwrite_zeroes(
        self, offset: int, length: int, fua: bool, may_unmap: bool, fast_only: bool
    ) -> None:
        await self._change(
            offset,
            length,
            self._below.pwrite_zeroes(
                offset, length, fua=fua, may_unmap=may_unmap, fast_only=fast_only
            ),
            lambda: self._target.pwrite_zeroes(offset, length, may_unmap=may_unmap),
        )

    async def _pdiscard(self, offset: int, length: int) -> None:
        """Let the disk discard; what it reads as then, only the disk knows."""
        async with self.tracked.request(
            offset, length, Kind.DISCARD, is_serialising=True, alignment=self.unit
        ) as request:
            was_in_step = self._is_in_step(offset, length)
            self._mark(offset, length)
            try:
                await self._below.pdiscard(offset, length)
                if was_in_step:
                    await self._copy_units(request.offset, request.end)
            except CopyError:
                self.on_dirty()
            except BaseException:
                self.on_dirty()
                raise

    async def _change(
        self,
        offset: int,
        length: int,
        change: Coroutine[Any, Any, None],
        change_target: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        """Change the disk, then the target where it is in step."""
        try:
            async with self.tracked.request(offset, length, Kind.WRITE, is_serialising=True):
                try:
                    await change
                    if self._is_in_step(offset, length):
                        await self._follow(offset, length, change_target)
                except BaseException:
                    # How far it came is not known.
                    self._mark(offset, length)
                    self.on_dirty()
                    raise
        finally:
            change.close()

    async def _follow(
        self, offset: int, length: int, change: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        try:
            await change()
        except NodeError:
            self._mark(offset, length)
            self.on_dirty()

    def _is_in_step(self, offset: int, length: int) -> bool:
        """Whether a part of the range is in step; writing the rest as well does no harm."""
        first, last = offset // self.unit, (offset + length - 1) // self.unit
        return self.to_copy.find(0, first, last + 1) >= 0

    def _mark(self, offset: int, length: int) -> None:
        first, last = offset // self.unit, (offset + length - 1) // self.unit
        self.to_copy[first : last + 1] = 1

    async def _flush(self) -> None:
        await self._below.flush()

    def begin_writeback(self, offset: int, length: int) -> None:
        """Pass the hint on."""
        self._below.begin_writeback(offset, length)


_LONGEST_READ = 512 * 1024
