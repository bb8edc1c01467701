# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A disk in memory that tests can hold, break and look into, and a server around it."""

from __future__ import annotations

import asyncio
import errno
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from nbdjobs.errors import NodeError
from nbdjobs.protocol.export import Export, Extent, FileRange
from nbdjobs.protocol.server import HANDSHAKE_LIMIT_S, Server

SIZE = 1024 * 1024
BLOCK = 4096


class Gate:
    """Holds the requests that come to it until it is opened."""

    def __init__(self) -> None:
        self.waiting = 0
        self._arrived = asyncio.Condition()
        self._open = asyncio.Event()

    async def passage(self) -> None:
        async with self._arrived:
            self.waiting += 1
            self._arrived.notify_all()
        await self._open.wait()

    async def reached(self, count: int = 1) -> None:
        async with self._arrived:
            await self._arrived.wait_for(lambda: self.waiting >= count)

    def open(self) -> None:
        self._open.set()


class MemoryDisk:
    """A `Backend`; `gates` and `failures` are by the name of the operation."""

    def __init__(self, size: int = SIZE):
        self.content = bytearray(size)
        self.gates: dict[str, Gate] = {}
        self.failures: dict[str, Exception] = {}
        self.calls: list[tuple[object, ...]] = []
        self.is_data_known = False
        self.is_held = False
        self.can_zero_fast = True

    @property
    def size(self) -> int:
        return len(self.content)

    def hold(self, operation: str) -> Gate:
        self.gates[operation] = gate = Gate()
        return gate

    def unhold(self, operation: str) -> None:
        self.gates.pop(operation).open()

    async def _begin(self, operation: str, *details: object) -> None:
        self.calls.append((operation, *details))
        if operation in self.gates:
            await self.gates[operation].passage()
        if operation in self.failures:
            raise self.failures[operation]

    def stored_at(self, offset: int, length: int, data_only: bool) -> FileRange | None:
        return None

    def pwrite_now(self, offset: int, data: memoryview) -> bool:
        return False

    def pread_now(self, offset: int, buffer: memoryview, data_only: bool) -> bool:
        return False

    def note_hole(self, length: int, duration_s: float) -> None:
        assert duration_s >= 0
        self.calls.append(("note_hole", length))

    async def pread(self, offset: int, buffer: memoryview) -> None:
        await self._begin("pread", offset, len(buffer))
        buffer[:] = self.content[offset : offset + len(buffer)]

    async def pwrite(self, offset: int, data: memoryview, *, fua: bool = False) -> None:
        await self._begin("pwrite", offset, len(data), fua)
        self.content[offset : offset + len(data)] = data

    async def pwrite_zeroes(
        self,
        offset: int,
        length: int,
        *,
        fua: bool = False,
        may_unmap: bool = True,
        fast_only: bool = False,
    ) -> None:
        await self._begin("pwrite_zeroes", offset, length, fua, may_unmap, fast_only)
        if fast_only and not self.can_zero_fast:
            raise NodeError(errno.ENOTSUP)
        self.content[offset : offset + length] = bytes(length)

    async def pdiscard(self, offset: int, length: int, *, fua: bool = False) -> None:
        await self._begin("pdiscard", offset, length, fua)
        self.content[offset : offset + length] = bytes(length)

    async def flush(self) -> None:
        await self._begin("flush")

    async def cache(self, offset: int, length: int) -> None:
        await self._begin("cache", offset, length)

    def is_known_data(self, offset: int, length: int) -> bool:
        return self.is_data_known

    def when_all_wait(self, callback: Callable[[], None]) -> None:
        """All that waits at a gate is as if it were held back."""
        if self.is_held:
            callback()


class Allocation:
    """`base:allocation` of a disk in memory: blocks of zeroes are holes."""

    name = "base:allocation"

    def __init__(self, disk: MemoryDisk):
        self.disk = disk

    async def extents(self, offset: int, length: int, limit: int) -> Sequence[Extent]:
        found: list[Extent] = []
        end = offset + length
        while offset < end:
            step = min(end, (offset // BLOCK + 1) * BLOCK) - offset
            flags = 0 if any(self.disk.content[offset : offset + step]) else 3
            if found and found[-1].flags == flags:
                found[-1] = Extent(found[-1].length + step, flags)
            elif len(found) == limit:
                break
            else:
                found.append(Extent(step, flags))
            offset += step
        return found


class Even:
    """A second context, so that tests can choose between two."""

    name = "test:even"

    async def extents(self, offset: int, length: int, limit: int) -> Sequence[Extent]:
        return [Extent(length, 7)]


class Clock:
    """Timers that a test makes due."""

    @dataclass
    class Timer:
        delay_s: float
        callback: Callable[[], None]
        is_cancelled: bool = False

        def cancel(self) -> None:
            self.is_cancelled = True

    def __init__(self) -> None:
        self.timers: list[Clock.Timer] = []

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Clock.Timer:
        timer = Clock.Timer(delay_s, callback)
        self.timers.append(timer)
        return timer

    def expire(self, delay_s: float) -> None:
        """Call what waits for so long."""
        due = [t for t in self.timers if t.delay_s == delay_s and not t.is_cancelled]
        self.timers = [timer for timer in self.timers if timer not in due]
        for timer in due:
            timer.callback()


@dataclass
class Rig:
    """A server with one writable export named "" on a disk in memory."""

    server: Server
    disk: MemoryDisk
    export: Export
    path: str
    clock: Clock
    unused: list[Export] = field(default_factory=list)


@asynccontextmanager
async def running(
    *,
    max_connections: int = 100,
    handshake_limit_s: float = HANDSHAKE_LIMIT_S,
    minimum_block_size: int = 1,
    is_writable: bool = True,
    size: int = SIZE,
) -> AsyncIterator[Rig]:
    disk = MemoryDisk(size)
    export = Export(
        name="",
        backend=disk,
        is_writable=is_writable,
        minimum_block_size=minimum_block_size,
        contexts=(Allocation(disk), Even()),
    )
    clock = Clock()
    unused: list[Export] = []
    server = Server(
        max_connections=max_connections,
        handshake_limit_s=handshake_limit_s,
        call_later=clock.call_later,
        on_unused=unused.append,
    )
    server.add_export(export)
    server.add_export(replace(export, name="other"))
    with tempfile.TemporaryDirectory() as folder:
        path = server.listen_unix(str(Path(folder) / "nbd.sock"))
        try:
            yield Rig(server, disk, export, path, clock, unused)
        finally:
            await server.close(grace_s=0)
