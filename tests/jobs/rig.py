# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A disk with a guest, a target, jobs and a clock: what every test of a job needs."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any

from nbdjobs.jobs.backup import BackupJob, BackupOptions, SyncMode, start_backup
from nbdjobs.jobs.collection import Jobs
from nbdjobs.nodes.copy_before_write import CopyBeforeWrite
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.permissions import Permission
from nbdjobs.qapi.types import event_name
from nbdjobs.qapi.visitor import to_qapi
from tests.nodes.faults import MemoryNode

CLUSTER = 64 * 1024
GUEST = Permission.CONSISTENT_READ | Permission.WRITE


class ManualTimer:
    """A call that the test makes by moving its clock."""

    def __init__(self, callback: Callable[[], None]):
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class ManualClock:
    """Time that stands still until the test moves it."""

    def __init__(self) -> None:
        self._now = 0.0
        self._numbers = itertools.count()
        self._timers: list[tuple[float, int, ManualTimer]] = []

    def now(self) -> float:
        return self._now

    def call_later(self, delay: float, callback: Callable[[], None]) -> ManualTimer:
        timer = ManualTimer(callback)
        heapq.heappush(self._timers, (self._now + delay, next(self._numbers), timer))
        return timer

    @property
    def pending(self) -> int:
        """Calls that are still to be made."""
        return sum(timer.callback is not None for _, _, timer in self._timers)

    def advance(self, seconds: float) -> None:
        """Move on, making the calls that fall due."""
        self._now += seconds
        while self._timers and self._timers[0][0] <= self._now:
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                callback()


class Events(list[tuple[str, dict[str, object]]]):
    """What jobs told their users."""

    def record(self, event: object) -> None:
        self.append((event_name(type(event)), to_qapi(event)))

    def statuses(self, job_id: str = "j") -> list[object]:
        return [
            data["status"]
            for name, data in self
            if name == "JOB_STATUS_CHANGE" and data["id"] == job_id
        ]

    def named(self, name: str) -> list[dict[str, object]]:
        return [data for found, data in self if found == name]


def random_content(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


class Rig:
    """A source with a guest on it, a target, and jobs; use it inside a running loop."""

    def __init__(
        self,
        source: MemoryNode | int = 4 * CLUSTER,
        target: MemoryNode | None = None,
    ):
        if isinstance(source, int):
            source = MemoryNode(random_content(source), name="s")
        self.source = source
        self.target = target or MemoryNode(random_content(source.size, 2), name="t")
        self.before = bytes(source.content)
        self.graph = Graph()
        for node in (self.source, self.target):
            node.is_owned_by_user = True
            self.graph.add(node)
        self.guest = Device(self.graph, self.source, needed=GUEST)
        self.clock = ManualClock()
        self.events = Events()
        self.jobs = Jobs(self.events.record, self.clock)

    async def backup(
        self, job_id: str | None = "j", sync: SyncMode = SyncMode.FULL, **options: Any
    ) -> BackupJob:
        """Start a backup; `options` are fields of `BackupOptions`."""
        return await start_backup(
            self.jobs,
            self.graph,
            self.source,
            self.target,
            BackupOptions(sync=sync, job_id=job_id, **options),
        )

    @property
    def filter(self) -> CopyBeforeWrite:
        node = self.guest.node
        assert isinstance(node, CopyBeforeWrite)
        return node

    async def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        await self.guest.pwrite(offset, memoryview(data), fua=fua)

    async def run_through(self, job: BackupJob) -> None:
        """Let the job end, time going on as fast as the job can use it."""
        ended = asyncio.create_task(self.jobs.ended(job))
        while not ended.done():
            self.clock.advance(0.05)
            await asyncio.sleep(0)

    def assert_as_before(self) -> None:
        """Nothing of a job is left: no filter, edge, blocker, task, timer or request."""
        assert set(self.graph.nodes.values()) == {self.source, self.target}
        assert self.guest.node is self.source
        assert self.source.parents == [self.guest.edge]
        assert self.target.parents == []
        for node in (self.source, self.target):
            assert not node.op_blockers
            assert node.in_flight == 0
        assert self.guest.in_flight == 0
        assert self.clock.pending == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def turns(count: int = 20) -> None:
    """Let everything run that can; what waits for the clock or a gate does not."""
    for _ in range(count):
        await asyncio.sleep(0)
