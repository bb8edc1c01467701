# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Jobs that go over a disk from its beginning to its end, several pieces at a time.

What to do with a piece is the business of the kind of job; that the work keeps to its speed,
pauses with nothing in flight, and does about errors what the user wants, is written here.
"""

from __future__ import annotations

import asyncio
import logging
import os
from abc import abstractmethod
from collections.abc import Coroutine
from typing import Any, Final, NamedTuple

from nbdjobs.errors import JobError, NodeError
from nbdjobs.jobs.block_job import BlockJob
from nbdjobs.jobs.collection import Jobs
from nbdjobs.jobs.job import JobOptions
from nbdjobs.jobs.ratelimit import SLICE_S
from nbdjobs.nodes.background import Background
from nbdjobs.nodes.block_copy import CopyError
from nbdjobs.nodes.error_policy import ErrorAction, OnError
from nbdjobs.nodes.graph import Graph

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT: Final = 16
"""Pieces worked at at a time."""

PIECE: Final = 512 * 1024
"""Bytes of one piece, at most."""


class Piece(NamedTuple):
    """The next piece of a disk.

    Attributes:
        end: Where it ends.
        work: What is to be done about it; None if nothing is.
    """

    end: int
    work: Coroutine[Any, Any, None] | None


class SweepJob(BlockJob):
    """A job that goes over a disk.

    Attributes:
        skips_errors: An error that is to be ignored leaves its piece undone; otherwise the piece
            is tried again and again.
    """

    skips_errors = False

    def __init__(
        self, jobs: Jobs, graph: Graph, job_id: str, options: JobOptions, on_error: OnError
    ):
        super().__init__(jobs, graph, job_id, options)
        self._on_error = on_error
        self._workers = Background(self.kick)
        self._failures: list[tuple[int, int, CopyError]] = []
        self._again: list[tuple[int, int]] = []
        self._has_defect = False
        self._done = 0
        self._total = 0
        self.skipped: NodeError | None = None

    @property
    def current_progress(self) -> int:
        """Bytes gone over."""
        return self._done

    @property
    def total_progress(self) -> int:
        """Bytes of the disk."""
        return self._total

    @abstractmethod
    async def next_piece(self, offset: int, length: int) -> Piece:
        """Look at the disk from `offset` on, `length` bytes at most.

        The work raises `CopyError` if it fails.

        Raises:
            NodeError: Looking has failed.
        """

    async def sweep(self, size: int) -> None:
        """Go over the first `size` bytes, and return when all is done or `is_cancelled`.

        Raises:
            JobError: A piece failed, and the user wants to know.
        """
        self._total = self._done + size
        position = 0
        while not self.is_cancelled:
            if self.should_pause or self._failures or self._has_defect:
                await self._settle()
                await self.pause_point()
            elif len(self._workers) >= MAX_IN_FLIGHT:
                await self.rest()
            elif delay := self.limit.delay(self._jobs.clock.now()):
                await self.rest(delay)
            elif self._again:
                begin, end = self._again.pop()
                await self._begin_all(begin, end)
            elif position < size:
                position = await self._begin(position, size)
            else:
                await self._settle()
                if not self._again and not self.should_pause:
                    return
        await self._workers.settled()

    async def _begin_all(self, begin: int, end: int) -> None:
        """Try what has failed before."""
        begin = await self._begin(begin, end)
        if begin < end:
            self._again.append((begin, end))

    async def _begin(self, begin: int, end: int) -> int:
        """Begin to work at the next piece; the answer is where it ends."""
        length = min(end - begin, self._longest_piece)
        try:
            stop, work = await self.next_piece(begin, length)
        except NodeError as error:
            self._failures.append((begin, begin + length, CopyError(error, is_read=True)))
            return begin + length
        if work is None:
            self._done += stop - begin
            await asyncio.sleep(0)  # tables in memory need no wait, and others want their turn
            return stop
        self.limit.account(stop - begin, self._jobs.clock.now())
        self._workers.start(self._do(begin, stop, work))
        await asyncio.sleep(0)
        return stop

    @property
    def _longest_piece(self) -> int:
        return min(max(self.limit.quota, 64 * 1024), PIECE) if self.limit.speed else PIECE

    async def _do(self, begin: int, end: int, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except CopyError as error:
            self._failures.append((begin, end, error))
        except Exception:
            logger.exception("job %s: a copy failed unexpectedly", self.id)
            self._has_defect = True
        else:
            self._done += end - begin

    async def _settle(self) -> None:
        """Wait for what is in flight, then do about failures what the user wants."""
        await self._workers.settled()
        if self._has_defect:
            raise JobError("internal error")
        failures, self._failures = self._failures, []
        for begin, end, error in failures:
            if self.is_cancelled:
                return
            await self._take_failure(begin, end, error)

    async def _take_failure(self, begin: int, end: int, error: CopyError) -> None:
        if self.is_user_paused:  # an error before has stopped the job: both are tried again
            self._again.append((begin, end))
            return
        action = self.handle_error(self._on_error, error, is_read=error.is_read)
        if action is ErrorAction.REPORT:
            raise job_error(error)
        if action is ErrorAction.IGNORE and self.skips_errors:
            self.skipped = self.skipped or error
            self._done += end - begin
            return
        self._again.append((begin, end))
        if action is ErrorAction.IGNORE:
            await self.rest(SLICE_S)  # not in a hot loop


def job_error(error: NodeError) -> JobError:
    """What a job ends with that an I/O error has ended."""
    return JobError(os.strerror(error.errno))
