# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A job without disks, whose work the test does step by step."""

from __future__ import annotations

import asyncio

from nbdjobs.errors import JobError
from nbdjobs.jobs.collection import Jobs
from nbdjobs.jobs.job import Job, JobOptions
from nbdjobs.jobs.status import JobStatus, JobType
from nbdjobs.jobs.transaction import Transaction
from nbdjobs.nodes.clock import Clock
from tests.jobs.rig import Events, ManualClock, turns


class ToyJob(Job):
    """Works until the test says that it is done or has failed."""

    type = JobType.CREATE

    def __init__(
        self,
        jobs: Jobs,
        job_id: str = "j",
        options: JobOptions | None = None,
        transaction: Transaction | None = None,
    ):
        super().__init__(jobs, job_id, options or JobOptions(), transaction)
        self.calls: list[str] = []
        self.is_done = False
        self.failure: Exception | None = None
        self.refusal: JobError | None = None
        self.preparing: asyncio.Event | None = None

    async def run(self) -> None:
        self.calls.append("run")
        while not self.is_done and not self.is_cancelled:
            if self.failure:
                raise self.failure
            if self.should_pause:
                await self.pause_point()
            else:
                await self.rest()

    async def finish(self) -> None:
        """Let the work be done."""
        self.is_done = True
        self.kick()
        await turns()

    async def fail(self, error: Exception) -> None:
        """Let the work fail."""
        self.failure = error
        self.kick()
        await turns()

    async def prepare(self) -> None:
        self.calls.append("prepare")
        if self.preparing is not None:
            await self.preparing.wait()
        if self.refusal is not None:
            raise self.refusal

    async def commit(self) -> None:
        self.calls.append("commit")

    async def abort(self) -> None:
        self.calls.append("abort")

    async def clean(self) -> None:
        self.calls.append("clean")

    def stop_working(self) -> None:
        self.calls.append("stop")

    def announce_pending(self) -> None:
        self.calls.append("announce pending")

    def announce_end(self) -> None:
        self.calls.append("announce end")

    @property
    def current_progress(self) -> int:
        return 3

    @property
    def total_progress(self) -> int:
        return 10


MANUAL = JobOptions(auto_finalize=False, auto_dismiss=False)


class Bench:
    """A place for toy jobs; use it inside a running loop."""

    def __init__(self) -> None:
        self.events = Events()
        self.clock = ManualClock()
        clock: Clock = self.clock
        self.jobs = Jobs(self.events.record, clock)

    def add(
        self,
        job_id: str = "j",
        options: JobOptions | None = None,
        transaction: Transaction | None = None,
    ) -> ToyJob:
        job = ToyJob(self.jobs, job_id, options, transaction)
        self.jobs.add(job)
        return job

    async def start(
        self,
        job_id: str = "j",
        options: JobOptions | None = None,
        transaction: Transaction | None = None,
    ) -> ToyJob:
        job = self.add(job_id, options, transaction)
        self.jobs.start(job)
        await turns()
        return job

    async def bring_to(self, status: JobStatus) -> ToyJob:
        """A job in that status, by the shortest way."""
        if status is JobStatus.CREATED:
            return self.add(options=MANUAL)
        group = Transaction()
        other = self.add("other", MANUAL, group) if status is JobStatus.WAITING else None
        job = await self.start("j", MANUAL, group)
        if other:
            self.jobs.start(other)
        match status:
            case JobStatus.RUNNING:
                pass
            case JobStatus.PAUSED:
                job.pause()
            case JobStatus.READY:
                job.become_ready()
            case JobStatus.STANDBY:
                job.become_ready()
                job.pause()
            case JobStatus.WAITING | JobStatus.PENDING:
                await job.finish()
            case JobStatus.CONCLUDED | JobStatus.NULL:
                job.cancel()
                await turns()
                if status is JobStatus.NULL:
                    job.dismiss()
            case _:
                raise AssertionError(status)
        await turns()
        assert job.status is status
        return job

    async def end(self) -> None:
        """Nothing of the jobs is left."""
        await self.jobs.shutdown()
        assert len(self.jobs) == 0
        assert self.clock.pending == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}
