# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Transactions: jobs that end together, all with effect or all without.

Every job is in one; most are alone in theirs. When all jobs of a transaction have done their
work, and a user has said so where one of them does not finalize by itself, each makes sure that
it can take effect, and then all do. When one fails or is cancelled, all others are cancelled.

Source: QEMU `job.c` (JobTxn); QAPI `ActionCompletionMode`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from nbdjobs.errors import JobError

if TYPE_CHECKING:
    from nbdjobs.jobs.job import Job


class Transaction:
    """A group of jobs; they join before the first of them starts."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self._ended: set[Job] = set()
        self._has_failed = False
        self._is_finalizing = False
        self._is_asked = False
        self._outcome: bool | None = None
        self._waiters: list[asyncio.Future[None]] = []

    def join(self, job: Job) -> None:
        """Let a job end with the others."""
        self.jobs.append(job)

    def leave(self, job: Job) -> None:
        """Forget a job that never started."""
        self.jobs.remove(job)
        self._wake()

    def finalize(self) -> None:
        """Go on where the jobs wait for a user's consent: for all of them at once."""
        self._is_asked = True
        self._wake()

    def fail(self) -> None:
        """Cancel every job, unless the outcome has been decided already."""
        if self._outcome is None and not self._has_failed:
            self._has_failed = True
            for job in self.jobs:
                job.give_up()
            self._wake()

    async def outcome(self, job: Job) -> bool:
        """Wait, after the work of `job` has ended, until it is clear what comes of all of it.

        Returns:
            Whether the jobs take effect. If not, `job` has an error and is aborting.
        """
        self._ended.add(job)
        if job.error is not None:
            self.fail()
        if self._has_failed:
            job.give_up()
        else:
            job.wait_for_others()
        self._wake()
        while self._outcome is None:
            if not await self._advance():
                await self._changed()
        return self._outcome

    async def _advance(self) -> bool:
        """Do the next step towards the outcome, if it is time for one."""
        if len(self._ended) < len(self.jobs) or self._is_finalizing:
            return False
        if self._has_failed:
            self._decide(False)
            return True
        for job in self.jobs:
            job.become_pending()
        if not self._is_asked and not all(job.auto_finalize for job in self.jobs):
            return False
        self._is_finalizing = True
        try:
            await self._prepare()
        finally:
            self._is_finalizing = False
        self._decide(not self._has_failed)
        return True

    async def _prepare(self) -> None:
        for job in self.jobs:
            try:
                await job.prepare()
            except JobError as error:
                job.error = str(error)
                self.fail()
            if self._has_failed:
                return

    def _decide(self, outcome: bool) -> None:
        self._outcome = outcome
        self._wake()

    async def _changed(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
