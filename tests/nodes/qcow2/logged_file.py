# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A file in memory that remembers its writes and flushes, and what a crash could leave of them.

A write that no completed flush covers may be there after a crash, or not, or some of its sectors
only; whatever the order in which such writes were made.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from random import Random

from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.status import DATA, BlockStatus

SECTOR = 512


@dataclass(slots=True, eq=False)
class Written:
    """A write as it was asked for; None for zeroes that a discard leaves."""

    offset: int
    data: bytes
    begun: int
    ended: int | None = None
    stable_at: int | None = None


@dataclass(slots=True)
class Clock:
    """Time as the count of what happened."""

    time: int = 0


class LoggedFile(Node):
    """The file.

    Attributes:
        content: What it holds.
        clock: Counts the beginnings and ends of requests; several files may share one.
        writes: All of them.
    """

    driver = "logged"

    def __init__(
        self,
        content: bytes | bytearray,
        *,
        seed: int = 0,
        name: str = "file",
        clock: Clock | None = None,
    ):
        super().__init__(name, NodeConfig(can_unmap=True))
        self.content = bytearray(content)
        self.before = bytes(content)
        self.clock = clock or Clock()
        self.writes: list[Written] = []
        self._random = Random(seed)

    @property
    def size(self) -> int:
        return len(self.content) + -len(self.content) % SECTOR

    @property
    def allocated_size(self) -> int:
        return len(self.content)

    def tick(self) -> int:
        self.clock.time += 1
        return self.clock.time

    async def _wander(self) -> None:
        """Let others go first, or not."""
        for _ in range(self._random.choice((0, 0, 1, 3))):
            await asyncio.sleep(0)

    async def _pread(self, offset: int, buffer: memoryview) -> None:
        await self._wander()
        found = self.content[offset : offset + len(buffer)]
        buffer[:] = found + bytes(len(buffer) - len(found))
        await self._wander()

    async def _pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        await self._put(offset, bytes(data))
        if fua:
            await self._flush()

    async def _put(self, offset: int, data: bytes) -> None:
        written = Written(offset, data, self.tick())
        self.writes.append(written)
        await self._wander()
        _put(self.content, offset, data)
        await self._wander()
        written.ended = self.tick()

    async def _pdiscard(self, offset: int, length: int) -> None:
        await self._put(offset, bytes(length))

    async def _flush(self) -> None:
        begun = self.tick()
        await self._wander()
        ended = self.tick()
        for written in self.writes:
            if written.stable_at is None and written.ended is not None and written.ended < begun:
                written.stable_at = ended

    async def _block_status(self, offset: int, length: int) -> BlockStatus:
        return BlockStatus(length, DATA)

    async def _truncate(self, size: int) -> None:
        del self.content[size:]
        self.content += bytes(size - len(self.content))

    def after_crash(self, time: int, random: Random) -> bytes:
        """What could be there if the crash came at that time."""
        content = bytearray(self.before)
        chance = random.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        for written in self.writes:
            if written.begun > time:
                continue
            is_stable = written.stable_at is not None and written.stable_at <= time
            if is_stable or random.random() < chance:
                _put(content, written.offset, written.data)
            elif random.random() < chance:
                self._put_some_sectors(content, written, random)
        return bytes(content)

    @staticmethod
    def _put_some_sectors(content: bytearray, written: Written, random: Random) -> None:
        end = written.offset + len(written.data)
        begin = written.offset
        while begin < end:
            stop = min(begin - begin % SECTOR + SECTOR, end)
            if random.random() < 0.5:
                part = written.data[begin - written.offset : stop - written.offset]
                _put(content, begin, part)
            begin = stop


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if offset > len(content):
        content += bytes(offset - len(content))
    content[offset : offset + len(data)] = data
