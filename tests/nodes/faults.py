# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A node in memory whose requests can be held at gates, made to fail, and counted.

async with disk.hold(Op.WRITE) as gate:         # writes wait from now on
    write = asyncio.create_task(disk.pwrite(0, data))
    await gate.reached()                        # one is in flight, its effect is not there yet
    assert disk.content[:512] == before
await write                                     # the gate is open

disk.fail(Op.READ, errno.EIO, nth=3)            # the third read from now on fails, once
"""

from __future__ import annotations

import asyncio
import errno as errno_names
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import NamedTuple

from nbdjobs.errors import NodeError
from nbdjobs.nodes.config import NO_LIMITS, SECTOR, Limits, NodeConfig
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.status import DATA, HOLE, BlockStatus

STATUS_BLOCK = 4096
"""Blocks of this many bytes that are all zeroes are reported as holes."""

DEFAULT_CONFIG = NodeConfig(can_unmap=True)


class Op(StrEnum):
    """What a driver is asked to do."""

    READ = "read"
    WRITE = "write"
    ZERO = "zero"
    DISCARD = "discard"
    FLUSH = "flush"
    STATUS = "status"
    COPY = "copy"


class Request(NamedTuple):
    """One request as the driver saw it."""

    op: Op
    offset: int
    length: int
    is_fua: bool = False

    def overlaps(self, offset: int, length: int | None) -> bool:
        """Whether it touches the range; a length of None means up to the end."""
        behind_begin = self.offset + max(self.length, 1) > offset
        return behind_begin and (length is None or self.offset < offset + length)


@dataclass(frozen=True, slots=True)
class _Selection:
    """Which requests a gate or a fault is about."""

    op: Op | None
    offset: int
    length: int | None

    def matches(self, request: Request) -> bool:
        return self.op in (None, request.op) and request.overlaps(self.offset, self.length)


class Gate:
    """Holds every selected request from its creation until `release`.

    Used with `async with`, leaving the block releases.
    """

    def __init__(self, selection: _Selection, forget: Callable[[Gate], None]):
        self.held: list[Request] = []
        self._selection = selection
        self._forget = forget
        self._arrival = asyncio.Event()
        self._open = asyncio.Event()

    async def reached(self, count: int = 1) -> None:
        """Wait until `count` requests in all have arrived here."""
        while len(self.held) < count:
            self._arrival.clear()
            await self._arrival.wait()

    def release(self) -> None:
        """Let everything held go on, and hold nothing from now on."""
        self._forget(self)
        self._open.set()

    def matches(self, request: Request) -> bool:
        """Whether the request has to stop here."""
        return self._selection.matches(request)

    async def hold(self, request: Request) -> None:
        """Stop a request here."""
        self.held.append(request)
        self._arrival.set()
        await self._open.wait()

    async def __aenter__(self) -> Gate:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


@dataclass(slots=True, eq=False)
class Fault:
    """Makes selected requests fail; `stop` ends that."""

    selection: _Selection
    errno: int
    to_pass: int
    to_fail: int | None
    failed: int = 0

    def strikes(self, request: Request) -> bool:
        """Count a request and say whether it has to fail."""
        if not self.selection.matches(request) or self.to_fail == 0:
            return False
        if self.to_pass:
            self.to_pass -= 1
            return False
        if self.to_fail is not None:
            self.to_fail -= 1
        self.failed += 1
        return True

    def stop(self) -> None:
        """Fail nothing from now on."""
        self.to_fail = 0


class MemoryNode(Node):
    """A disk in memory.

    Attributes:
        content: What it holds; tests may read and change it at any time.
        stable: What it held when the last flush or FUA write completed.
        requests: Every request that reached the driver, in order, failed ones included.
        counts: How many of each kind.
        in_flight: Requests begun and not yet ended.
        was_closed: Whether `close` was called.
    """

    driver = "memory"

    def __init__(
        self,
        content: bytes | int = 1024 * 1024,
        *,
        name: str = "disk",
        config: NodeConfig = DEFAULT_CONFIG,
        limits: Limits = NO_LIMITS,
        can_zero: bool = True,
        can_discard: bool = True,
        can_copy: bool = False,
    ):
        """Take `content`, or that many zero bytes."""
        super().__init__(name, config, limits)
        self.content = bytearray(content)
        self.stable = bytes(self.content)
        self.requests: list[Request] = []
        self.counts: Counter[Op] = Counter()
        self.in_flight = 0
        self.was_closed = False
        self._can = {Op.ZERO: can_zero, Op.DISCARD: can_discard, Op.COPY: can_copy}
        self._gates: list[Gate] = []
        self._faults: list[Fault] = []
        assert len(self.content) % SECTOR == 0, "sizes of nodes are multiples of 512"

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def allocated_size(self) -> int:
        return len(self.content)

    async def close(self) -> None:
        self.was_closed = True

    # What tests do with it

    def hold(self, op: Op | None = None, *, offset: int = 0, length: int | None = None) -> Gate:
        """Hold the requests of a kind (None: of all) that touch the range, until released."""
        gate = Gate(_Selection(op, offset, length), self._forget)
        self._gates.append(gate)
        return gate

    def fail(
        self,
        op: Op | None = None,
        errno: int = errno_names.EIO,
        *,
        nth: int = 1,
        times: int | None = 1,
        offset: int = 0,
        length: int | None = None,
    ) -> Fault:
        """Make requests fail.

        Args:
            op: Kind of request; None for all.
            errno: What they fail with.
            nth: The first one that fails, counted from 1 and from now on.
            times: How many fail from there on; None for all.
            offset: First byte of the range that they have to touch.
            length: Bytes of that range; None for all up to the end.
        """
        fault = Fault(_Selection(op, offset, length), errno, nth - 1, times)
        self._faults.append(fault)
        return fault

    def requests_of(self, op: Op) -> list[Request]:
        """The requests of one kind so far."""
        return [request for request in self.requests if request.op is op]

    def _forget(self, gate: Gate) -> None:
        if gate in self._gates:
            self._gates.remove(gate)

    async def _arrive(self, request: Request) -> None:
        """Count the request, hold it where a gate says so, and fail it where a fault does."""
        self.requests.append(request)
        self.counts[request.op] += 1
        self.in_flight += 1
        try:
            for gate in [gate for gate in self._gates if gate.matches(request)]:
                await gate.hold(request)
        finally:
            self.in_flight -= 1
        # All faults count the request, so that none depends on another.
        strikes = [fault for fault in self._faults if fault.strikes(request)]
        if strikes:
            raise NodeError(strikes[0].errno, offset=request.offset)
        if not self._can.get(request.op, True):
            raise NodeError(errno_names.ENOTSUP)

    # The driver

    async def _pread(self, offset: int, buffer: memoryview) -> None:
        await self._arrive(Request(Op.READ, offset, len(buffer)))
        found = self.content[offset : offset + len(buffer)]
        buffer[:] = found + bytes(len(buffer) - len(found))

    async def _pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        await self._arrive(Request(Op.WRITE, offset, len(data), fua))
        self.content.extend(bytes(max(offset - len(self.content), 0)))
        self.content[offset : offset + len(data)] = data
        self._settle(offset, len(data), fua)

    async def _pwrite_zeroes(
        self, offset: int, length: int, fua: bool, may_unmap: bool, fast_only: bool
    ) -> None:
        await self._arrive(Request(Op.ZERO, offset, length, fua))
        self.content[offset : offset + length] = bytes(length)
        self._settle(offset, length, fua)

    async def _pdiscard(self, offset: int, length: int) -> None:
        await self._arrive(Request(Op.DISCARD, offset, length))
        self.content[offset : offset + length] = bytes(length)

    async def _flush(self) -> None:
        before = bytes(self.content)
        await self._arrive(Request(Op.FLUSH, 0, 0))
        self.stable = before

    async def _truncate(self, size: int) -> None:
        del self.content[size:]
        self.content.extend(bytes(size - len(self.content)))

    async def _block_status(self, offset: int, length: int) -> BlockStatus:
        await self._arrive(Request(Op.STATUS, offset, length))
        is_hole = self._is_zero_block(offset)
        end = self._block_end(offset)
        while end < offset + length and self._is_zero_block(end) == is_hole:
            end = self._block_end(end)
        return BlockStatus(min(end, offset + length) - offset, HOLE if is_hole else DATA)

    async def copy_range(self, offset: int, target: Node, target_offset: int, length: int) -> None:
        await self._arrive(Request(Op.COPY, offset, length))
        if not isinstance(target, MemoryNode):
            raise NodeError(errno_names.ENOTSUP)
        data = self.content[offset : offset + length]
        target.content[target_offset : target_offset + length] = data

    def _settle(self, offset: int, length: int, fua: bool) -> None:
        if fua:
            stable = bytearray(self.stable)
            stable[offset : offset + length] = self.content[offset : offset + length]
            self.stable = bytes(stable)

    @staticmethod
    def _block_end(offset: int) -> int:
        return (offset // STATUS_BLOCK + 1) * STATUS_BLOCK

    def _is_zero_block(self, offset: int) -> bool:
        begin = offset // STATUS_BLOCK * STATUS_BLOCK
        return not any(self.content[begin : begin + STATUS_BLOCK])
