# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Jobs that do one thing with an image and then wait to be dismissed: make it, or amend it.

Their progress is one step, which is done once they have ended, however they ended.

Source: QEMU `block/create.c` and `block/amend.c` for the behaviour.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, ExitStack
from typing import ClassVar

from nbdjobs.errors import CommandError, JobError
from nbdjobs.jobs.collection import Jobs
from nbdjobs.jobs.job import Job, JobOptions
from nbdjobs.jobs.status import JobType

Work = Callable[[], Awaitable[None]]
"""What is to be done; `CommandError` or `NodeError` is why it could not."""


class ImageJob(Job):
    """A job of one step.

    Cancelling it cancels the work where that waits for something.
    """

    def __init__(self, jobs: Jobs, job_id: str, work: Work):
        super().__init__(jobs, job_id, JobOptions(auto_dismiss=False))
        self._do = work
        self._scope: asyncio.Timeout | None = None
        self._is_done = False

    async def run(self) -> None:
        """Do the work."""
        try:
            # A timeout that never comes by itself: it is what a task can be cancelled through
            # from outside without losing a cancel of the whole task.
            async with asyncio.timeout(None) as self._scope:
                await self._do()
        except TimeoutError:
            assert self.is_cancelled
        except CommandError as error:
            raise JobError(error.description) from error
        finally:
            self._is_done = True

    def stop_working(self) -> None:
        """End the work where it is."""
        scope = self._scope
        if scope is not None and not self._is_done:
            scope.reschedule(0)

    @property
    def current_progress(self) -> int:
        """Steps done."""
        return int(self._is_done)

    @property
    def total_progress(self) -> int:
        """Always one step."""
        return 1


class CreateJob(ImageJob):
    """Makes an image."""

    type: ClassVar[JobType] = JobType.CREATE


class AmendJob(ImageJob):
    """Changes options of an image."""

    type: ClassVar[JobType] = JobType.AMEND

    def __init__(self, jobs: Jobs, job_id: str, work: Work, held: ExitStack):
        super().__init__(jobs, job_id, work)
        self._held = held

    async def clean(self) -> None:
        """Let others use the image again."""
        self._held.close()


def start_create_job(jobs: Jobs, job_id: str, work: Work) -> None:
    """Start a job that makes an image.

    Raises:
        CommandError: The id is not one for a new job.
    """
    jobs.check_id(job_id)
    _start(jobs, CreateJob(jobs, job_id, work))


def start_amend_job(
    jobs: Jobs, job_id: str, work: Work, hold: AbstractContextManager[None]
) -> None:
    """Start a job that changes options of an image.

    Args:
        jobs: The jobs that exist.
        job_id: Its name.
        work: What is to be done.
        hold: Entered first, and left when the job has ended.

    Raises:
        CommandError: The id is not one for a new job, or `hold` could not be entered.
    """
    jobs.check_id(job_id)
    held = ExitStack()
    held.enter_context(hold)
    _start(jobs, AmendJob(jobs, job_id, work, held))


def _start(jobs: Jobs, job: ImageJob) -> None:
    jobs.add(job)
    jobs.start(job)
