# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""All jobs, by id, and the tasks they run as."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator

from nbdjobs.errors import CommandError
from nbdjobs.jobs.job import Job
from nbdjobs.jobs.status import VERBS, JobStatus, JobVerb
from nbdjobs.nodes.clock import Clock, LoopClock
from nbdjobs.nodes.graph import is_well_formed_id

logger = logging.getLogger(__name__)

Emit = Callable[[object], None]
"""Sends an event, one of `events.EVENTS`."""


class Jobs:
    """The jobs that exist, from their creation until they are dismissed.

    Attributes:
        emit: Where events go.
        clock: The time by which jobs pace themselves.
    """

    def __init__(self, emit: Emit, clock: Clock | None = None):
        self.emit = emit
        self.clock = clock or LoopClock()
        self._is_shutting_down = False
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[Job, asyncio.Task[None]] = {}

    def __iter__(self) -> Iterator[Job]:
        """All jobs, in the order of creation; they may come and go meanwhile."""
        return iter(list(self._jobs.values()))

    def __len__(self) -> int:
        """How many there are."""
        return len(self._jobs)

    def find(self, job_id: str) -> Job | None:
        """The job of that id."""
        return self._jobs.get(job_id)

    def get(self, job_id: str) -> Job:
        """The job of that id, for the `job-*` commands; `CommandError` if there is none."""
        job = self._jobs.get(job_id)
        if job is None:
            raise CommandError("Job not found")
        return job

    def check_id(self, job_id: str) -> None:
        """Refuse an id for a new job that is ill-formed or taken, and every id at the end."""
        if self._is_shutting_down:
            raise CommandError("No job can be started: the program is about to end")
        if not is_well_formed_id(job_id):
            raise CommandError(f"Invalid job ID '{job_id}'")
        if job_id in self._jobs:
            raise CommandError(f"Job ID '{job_id}' already in use")

    def add(self, job: Job) -> None:
        """Let a job come into being; its id has been checked."""
        self._jobs[job.id] = job
        job.enter()

    def start(self, job: Job) -> None:
        """Let a job run, as a task of its own; nothing to do for one cancelled before this."""
        if job in self._tasks or job.id not in self._jobs:
            return
        job.begin()
        task = asyncio.get_running_loop().create_task(job.live(), name=f"job {job.id}")
        self._tasks[job] = task
        task.add_done_callback(lambda task: self._ended(job, task))

    def forget(self, job: Job) -> None:
        """Take out a job whose life is over."""
        del self._jobs[job.id]

    async def ended(self, job: Job) -> None:
        """Wait until the job has concluded; cancelling the wait does nothing to the job."""
        task = self._tasks.get(job)
        if task is not None:
            await asyncio.wait([task])

    async def shutdown(self) -> None:
        """Cancel all jobs, wait until they have let go of everything, and dismiss them.

        No further ones can be started.
        """
        self._is_shutting_down = True
        for job in self:
            if job.status in VERBS[JobVerb.CANCEL]:
                job.cancel(force=True)
        while self._tasks:
            await asyncio.wait(list(self._tasks.values()))
        for job in self:
            if job.status is JobStatus.CONCLUDED:
                job.dismiss()

    def _ended(self, job: Job, task: asyncio.Task[None]) -> None:
        del self._tasks[job]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("job %s ended in disorder", job.id, exc_info=error)
