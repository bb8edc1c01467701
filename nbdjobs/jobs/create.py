# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Jobs that do one thing with an image and then wait to be dismissed: make it, or amend it.

Their progress is one step, which is done once they have ended, however they ended.

Source: QEMU `block/create.c` and `block/amend.c` for the behaviour.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
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


def start_image_job(kind: type[ImageJob], jobs: Jobs, job_id: str, work: Work) -> None:
    """Start a job of one step.

    Raises:
        CommandError: The id is not one for a new job.
    """
    jobs.check_id(job_id)
    job = kind(jobs, job_id, work)
    jobs.add(job)
    jobs.start(job)
