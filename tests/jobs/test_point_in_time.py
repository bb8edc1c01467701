# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The target is the disk at the instant the backup started, whatever happens meanwhile.

Disks here answer in a random but seeded order, and in pieces, so that a copy that is not ordered
against a write shows. Many writers change the disk all the time; a user pauses, changes the
speed and cancels; reads and writes of the job fail. Whatever the end, nothing of the job is left.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.jobs.backup import BackupJob, BackupPerf
from nbdjobs.jobs.job import JobOptions
from nbdjobs.jobs.status import MOVES, JobStatus
from nbdjobs.nodes.copy_before_write import OnCbwError
from nbdjobs.nodes.error_policy import OnError
from tests.jobs.rig import CLUSTER, Rig, random_content
from tests.nodes.faults import MemoryNode, Op, Request

SIZE = 5 * CLUSTER + 3 * 512
STRIPE = 5000
WRITERS = 4


class RestlessNode(MemoryNode):
    """A disk that lets others go first, again and again, and moves data in two halves."""

    def __init__(self, content: bytes, name: str, chance: random.Random):
        super().__init__(content, name=name)
        self._chance = chance

    async def _give_way(self) -> None:
        for _ in range(self._chance.choice((0, 0, 0, 1, 2, 7))):
            await asyncio.sleep(0)

    async def _arrive(self, request: Request) -> None:
        await self._give_way()
        await super()._arrive(request)

    async def _pread(self, offset: int, buffer: memoryview) -> None:
        await super()._pread(offset, buffer)
        await self._give_way()
        half = len(buffer) // 2
        buffer[half:] = self.content[offset + half : offset + len(buffer)]

    async def _pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        half = len(data) // 2
        await self._arrive(Request(Op.WRITE, offset, len(data), fua))
        self.content[offset : offset + half] = data[:half]
        await self._give_way()
        self.content[offset + half : offset + len(data)] = data[half:]
        self._settle(offset, len(data), fua)
        await self._give_way()


@dataclass(frozen=True)
class Scenario:
    seed: int
    speed: int
    max_workers: int
    max_chunk: int
    on_error: OnError
    on_cbw_error: OnCbwError
    failing_source: bool
    failing_target: bool
    has_user: bool
    cancels: bool
    is_sparse: bool


scenarios = st.builds(
    Scenario,
    seed=st.integers(0, 2**32),
    speed=st.sampled_from((0, 0, CLUSTER, 20 * CLUSTER)),
    max_workers=st.sampled_from((1, 2, 64)),
    max_chunk=st.sampled_from((0, CLUSTER, 2 * CLUSTER)),
    on_error=st.sampled_from(OnError),
    on_cbw_error=st.sampled_from(OnCbwError),
    failing_source=st.booleans(),
    failing_target=st.booleans(),
    has_user=st.booleans(),
    cancels=st.booleans(),
    is_sparse=st.booleans(),
)


def content_of(scenario: Scenario) -> bytes:
    content = bytearray(random_content(SIZE, scenario.seed))
    if scenario.is_sparse:
        content[CLUSTER : 2 * CLUSTER] = bytes(CLUSTER)
        content[3 * CLUSTER + 100 : 4 * CLUSTER - 9000] = bytes(CLUSTER - 9100)
    return bytes(content)


class Writer:
    """Changes its stripes of the disk, and knows what must be there."""

    def __init__(self, number: int, rig: Rig, model: bytearray, seed: int):
        self.number = number
        self.rig = rig
        self.model = model
        self.chance = random.Random(f"{seed} {number}")
        self.is_to_stop = False

    async def work(self) -> None:
        while not self.is_to_stop:
            await self.write_once()
            await asyncio.sleep(0)

    async def write_once(self) -> None:
        offset, length = self.range()
        fua = self.chance.random() < 0.2
        data = bytes(length)
        try:
            match self.chance.randrange(4):
                case 0:
                    await self.rig.guest.pwrite_zeroes(offset, length, fua=fua)
                case 1:
                    await self.rig.guest.pdiscard(offset, length)
                    fua = False
                case _:
                    data = self.chance.randbytes(length)
                    await self.rig.write(offset, data, fua=fua)
        except NodeError:
            return  # the copy ahead of it failed: nothing may have changed
        self.model[offset : offset + length] = data
        if fua:
            assert self.rig.source.stable[offset : offset + length] == data

    def range(self) -> tuple[int, int]:
        """Part of one of the writer's stripes, ragged at both ends."""
        stripe = self.chance.randrange(self.number, -(-SIZE // STRIPE), WRITERS)
        begin = stripe * STRIPE + self.chance.randrange(STRIPE // 2)
        return begin, self.chance.randint(1, min((stripe + 1) * STRIPE, SIZE) - begin)


async def steer(job: BackupJob, scenario: Scenario) -> None:
    """Be a user who cannot leave the job alone, but lets it end."""
    chance = random.Random(scenario.seed)
    for _ in range(60):
        for _ in range(chance.randrange(12)):
            await asyncio.sleep(0)
        try:
            if scenario.cancels and chance.random() < 0.03:
                job.cancel_block_job(force=chance.random() < 0.5)
            elif scenario.has_user and chance.random() < 0.3:
                job.set_speed(chance.choice((0, 1000)))
            elif scenario.has_user:
                chance.choice((job.pause, job.resume, job.resume))()
        except CommandError:
            pass  # the job has gone on meanwhile
    while job.status is not JobStatus.NULL:
        try:
            job.set_speed(0)
            job.resume()
        except CommandError:
            await asyncio.sleep(0)


async def run(scenario: Scenario) -> None:
    chance = random.Random(scenario.seed)
    rig = Rig(
        RestlessNode(content_of(scenario), "s", chance),
        RestlessNode(random_content(SIZE, scenario.seed + 1), "t", chance),
    )
    model = bytearray(rig.before)
    writers = [Writer(number, rig, model, scenario.seed) for number in range(WRITERS)]
    tasks = [asyncio.create_task(writer.work()) for writer in writers]
    for _ in range(chance.randrange(30)):
        await asyncio.sleep(0)
    job = await rig.backup(
        on_source_error=scenario.on_error,
        on_target_error=scenario.on_error,
        on_cbw_error=scenario.on_cbw_error,
        perf=BackupPerf(max_workers=scenario.max_workers, max_chunk=scenario.max_chunk),
        job=JobOptions(speed=scenario.speed),
    )
    at_start = bytes(rig.source.content)
    if scenario.failing_source:
        rig.source.fail(Op.READ, nth=chance.randint(1, 8), times=chance.randint(1, 2))
    if scenario.failing_target:
        rig.target.fail(Op.WRITE, errno.ENOSPC, nth=chance.randint(1, 8), times=2)
        rig.target.fail(Op.FLUSH, nth=chance.randint(1, 2))
    user = asyncio.create_task(steer(job, scenario))
    await rig.run_through(job)
    await user
    for writer in writers:
        writer.is_to_stop = True
    await asyncio.gather(*tasks)

    [(end, data)] = [event for event in rig.events if event[0].startswith("BLOCK_JOB_C")]
    if end == "BLOCK_JOB_COMPLETED" and "error" not in data:
        assert bytes(rig.target.content) == at_start
        assert rig.target.stable == at_start
        assert job.current_progress == job.total_progress == SIZE
    else:
        assert scenario.cancels or scenario.failing_source or scenario.failing_target
    assert bytes(rig.source.content) == bytes(model)
    statuses = [JobStatus.UNDEFINED, *map(JobStatus, map(str, rig.events.statuses()))]
    assert all(after in MOVES[before] for before, after in itertools.pairwise(statuses))
    rig.assert_as_before()


@settings(max_examples=120, deadline=None)
@given(scenarios)
def test_the_target_is_the_disk_at_the_start_instant(scenario: Scenario) -> None:
    asyncio.run(run(scenario))
