# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Jobs: long work that users watch and steer, with QEMU's life cycle.

A job runs as one task. Its `run` does the work and looks at three things between pieces of it:
`is_cancelled`, `should_pause` and the pace. All waiting goes through `rest`, which every command
that changes one of the three cuts short: so a job that waits for its slice, is paused or is
stopped by an error reacts at once.

Two kinds of pauses add up: the user's, and holds of the graph while it changes (drained
sections). The job goes on when neither is left.

Source: QEMU `job.c`; QAPI `job.json`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from nbdjobs.errors import CommandError, JobError, NodeError
from nbdjobs.jobs.events import JobStatusChange
from nbdjobs.jobs.ratelimit import RateLimit
from nbdjobs.jobs.status import MOVES, VERBS, JobStatus, JobType, JobVerb
from nbdjobs.jobs.transaction import Transaction

if TYPE_CHECKING:
    from nbdjobs.jobs.collection import Jobs

logger = logging.getLogger(__name__)

CANCELLED: Final = os.strerror(errno.ECANCELED)

_PAUSE_OF: Final = {
    JobStatus.RUNNING: JobStatus.PAUSED,
    JobStatus.READY: JobStatus.STANDBY,
}
_RESUMED_FROM: Final = {pause: status for status, pause in _PAUSE_OF.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """What all jobs can be told at their creation.

    Attributes:
        speed: Bytes per second, 0 for no limit.
        auto_finalize: Take effect without waiting for `job-finalize`.
        auto_dismiss: Vanish at the end without waiting for `job-dismiss`.
    """

    speed: int = 0
    auto_finalize: bool = True
    auto_dismiss: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInfo:
    """A job at one instant, for `query-jobs` and `query-block-jobs`; progress is in bytes."""

    id: str
    type: JobType
    status: JobStatus
    current_progress: int
    total_progress: int
    speed: int
    io_status: str
    is_paused: bool
    is_busy: bool
    is_ready: bool
    auto_finalize: bool
    auto_dismiss: bool
    error: str | None


class Job(ABC):
    """One job.

    Attributes:
        id: Unique among the jobs.
        status: Where it is in its life.
        error: Why it failed, or None.
        is_cancelled: Whether it was told to end without effect.
        is_user_paused: Whether a user, or an error on behalf of one, paused it.
        limit: Its pace.
        transaction: Those it ends together with.
    """

    type: ClassVar[JobType]

    def __init__(
        self, jobs: Jobs, job_id: str, options: JobOptions, transaction: Transaction | None = None
    ):
        super().__init__()
        self.id = job_id
        self.auto_finalize = options.auto_finalize
        self.auto_dismiss = options.auto_dismiss
        self.status = JobStatus.UNDEFINED
        self.error: str | None = None
        self.is_cancelled = False
        self.is_user_paused = False
        self.limit = RateLimit()
        self.transaction = transaction or Transaction()
        self._jobs = jobs
        self._pauses = 0
        self._has_started = False
        self._is_at_work = False
        self._wakeup: asyncio.Future[None] | None = None
        self._quiet: list[asyncio.Future[None]] = []

    # What a type of job provides

    @abstractmethod
    async def run(self) -> None:
        """Do the work, until done or `is_cancelled`.

        Raises:
            JobError: It cannot be done.
            NodeError: Likewise.
        """

    async def prepare(self) -> None:
        """Make sure that the job can take effect; `JobError` if not, and then none does."""

    async def commit(self) -> None:
        """Take effect."""

    async def abort(self) -> None:
        """Undo what can be undone."""

    async def clean(self) -> None:
        """Let go of everything the job holds; comes last, after `commit` or `abort`."""

    def stop_working(self) -> None:
        """React at once to being cancelled; `run` notices by itself soon after."""

    def announce_pending(self) -> None:
        """Tell users that the job waits for `job-finalize`."""

    def announce_end(self) -> None:
        """Tell users how the job ended."""

    @property
    @abstractmethod
    def current_progress(self) -> int:
        """Bytes done."""

    @property
    @abstractmethod
    def total_progress(self) -> int:
        """Bytes that are to be done in all."""

    @property
    def io_status(self) -> str:
        """QAPI `BlockDeviceIoStatus`."""
        return "ok"

    def reset_io_status(self) -> None:
        """Forget the error that stopped the job, since a user resumes it."""

    # Status

    def _move(self, status: JobStatus) -> None:
        """Make a move of the life cycle; the only place where the status changes."""
        assert status in MOVES[self.status], f"{self.status} -> {status}"
        logger.debug("job %s: %s -> %s", self.id, self.status, status)
        self.status = status
        self.emit(JobStatusChange(id=self.id, status=status))

    def emit(self, event: object) -> None:
        """Send an event to all users."""
        self._jobs.emit(event)

    def info(self) -> JobInfo:
        """The job as it is now."""
        return JobInfo(
            id=self.id,
            type=self.type,
            status=self.status,
            current_progress=self.current_progress,
            total_progress=self.total_progress,
            speed=self.limit.speed,
            io_status=self.io_status,
            is_paused=self._pauses > 0,
            is_busy=self._is_at_work and self._wakeup is None,
            is_ready=self.status in (JobStatus.READY, JobStatus.STANDBY),
            auto_finalize=self.auto_finalize,
            auto_dismiss=self.auto_dismiss,
            error=self.error,
        )

    # Verbs

    def check(self, verb: JobVerb) -> None:
        """Raise `CommandError` unless the status accepts the verb."""
        if self.status not in VERBS[verb]:
            raise CommandError(
                f"Job '{self.id}' in state '{self.status}' cannot accept command verb '{verb}'"
            )

    def pause(self) -> None:
        """Pause on behalf of a user, at the next point where nothing is in flight."""
        self.check(JobVerb.PAUSE)
        if self.is_user_paused:
            raise CommandError("Job is already paused")
        self.pause_for_user()

    def resume(self) -> None:
        """Go on after a user's `pause`, or after an error that stopped the job."""
        if not self.is_user_paused:
            raise CommandError("Can't resume a job that was not paused")
        self.check(JobVerb.RESUME)
        self._end_user_pause()

    def set_speed(self, speed: int) -> None:
        """Change the pace, at once; bytes per second, 0 for no limit."""
        self.check(JobVerb.SET_SPEED)
        if speed < 0:
            raise CommandError("Parameter 'speed' expects a non-negative value")
        self.limit.speed = speed
        self.kick()

    def cancel(self, *, force: bool = False) -> None:
        """End without effect. Only a job that is ready knows a gentle way, without `force`.

        The call returns at once; the job ends when what is in flight has ended. It comes too late
        when the job has begun to take effect: then it completes.
        """
        self.check(JobVerb.CANCEL)
        if not force and self.cancel_gently():
            return
        if self.status is JobStatus.CREATED:
            self.is_cancelled = True
            self._jobs.start(self)
        elif self.status in (JobStatus.WAITING, JobStatus.PENDING):
            self.transaction.fail()
        else:
            self._cancel_work()

    def cancel_gently(self) -> bool:
        """Do what `cancel` without force means for a job that is ready; False if nothing."""
        return False

    def complete(self) -> None:
        """Ask a job that is ready to take effect."""
        self.check(JobVerb.COMPLETE)
        if self._pauses or self.is_cancelled or not self.can_complete():
            raise CommandError(f"The active block job '{self.id}' cannot be completed")

    def can_complete(self) -> bool:
        """Begin to complete, if this type of job knows that."""
        return False

    def finalize(self) -> None:
        """Consent to the job and its whole transaction taking effect."""
        self.check(JobVerb.FINALIZE)
        self.transaction.finalize()

    def dismiss(self) -> None:
        """Let a concluded job vanish."""
        self.check(JobVerb.DISMISS)
        self._vanish()

    # Working and waiting, for run()

    @property
    def should_pause(self) -> bool:
        """Whether `run` must go to `pause_point`, with nothing in flight."""
        return self._pauses > 0 and not self.is_cancelled

    async def pause_point(self) -> None:
        """Pause as long as anyone wants that; nothing may be in flight."""
        while self.should_pause:
            self._enter_pause()
            await self.rest()
        self._leave_pause()

    def become_ready(self) -> None:
        """Say that the job now only keeps its result in step, until told to complete."""
        self._move(JobStatus.READY)

    async def rest(self, delay: float | None = None) -> None:
        """Wait for that many seconds, or less: every command and event of interest ends it."""
        self._wakeup = asyncio.get_running_loop().create_future()
        timer = None if delay is None else self._jobs.clock.call_later(delay, self.kick)
        try:
            await self._wakeup
        finally:
            self._wakeup = None
            if timer is not None:
                timer.cancel()

    def kick(self) -> None:
        """End a `rest`."""
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    def pause_for_user(self) -> None:
        """Pause until a user says `resume`."""
        if not self.is_user_paused:
            self.is_user_paused = True
            self.add_pause()

    def add_pause(self) -> None:
        """Pause for one more reason."""
        self._pauses += 1
        self.kick()

    def remove_pause(self) -> None:
        """One reason less to pause."""
        self._pauses -= 1
        if not self._pauses:
            self._leave_pause()
            self.kick()

    async def quiet(self) -> None:
        """Wait until the job has nothing in flight; comes while it is kept pausing."""
        while self._is_at_work:
            waiter = asyncio.get_running_loop().create_future()
            self._quiet.append(waiter)
            await waiter

    def _enter_pause(self) -> None:
        self._end_work()
        if self.status in _PAUSE_OF:
            self._move(_PAUSE_OF[self.status])

    def _leave_pause(self) -> None:
        """Count as running from now on: who said `resume` and asks at once, sees that."""
        if self.status in _RESUMED_FROM:
            self._is_at_work = True
            self._move(_RESUMED_FROM[self.status])

    def _end_work(self) -> None:
        self._is_at_work = False
        waiters, self._quiet = self._quiet, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def end_pause(self) -> None:
        """Go on if a user paused the job, since it is told to end."""
        if self.is_user_paused:
            self._end_user_pause()

    def _end_user_pause(self) -> None:
        self.reset_io_status()
        self.is_user_paused = False
        self.remove_pause()

    def _cancel_work(self) -> None:
        if not self.is_cancelled:
            self.is_cancelled = True
            self.end_pause()
            self.stop_working()
            self.kick()

    # The life of the task; Jobs calls these

    def enter(self) -> None:
        """Come into being."""
        self.transaction.join(self)
        self._move(JobStatus.CREATED)

    def never_started(self) -> None:
        """Go away again, since the command that created the job is refused."""
        self.transaction.leave(self)
        self._vanish()

    def begin(self) -> None:
        """Start; a job that is held at this moment pauses before it has done anything."""
        if self.status is JobStatus.CREATED and not self.is_cancelled:
            self._has_started = True
            self._move(JobStatus.RUNNING)
            if self.should_pause:
                self._enter_pause()
            else:
                self._is_at_work = True

    async def live(self) -> None:
        """Run to the end of everything; the body of the job's task."""
        await self._work()
        if await self.transaction.outcome(self):
            await self.commit()
        else:
            await self.abort()
        await self.clean()
        if self._has_started:
            self.announce_end()
        self._move(JobStatus.CONCLUDED)
        if self.auto_dismiss or not self._has_started:
            self._vanish()

    async def _work(self) -> None:
        try:
            await self.pause_point()
            if not self.is_cancelled:
                await self.run()
        except (JobError, NodeError) as error:
            self.error = str(error)
        except asyncio.CancelledError:
            self.is_cancelled = True  # the program ends: leave the disk as it was
            self.stop_working()
        except Exception:
            logger.exception("job %s failed unexpectedly", self.id)
            self.error = "internal error"
        finally:
            self._leave_pause()
            self._end_work()
        if self.is_cancelled and self.error is None:
            self.error = CANCELLED

    def wait_for_others(self) -> None:
        """The work is done; the others of the transaction may not be so far."""
        self._move(JobStatus.WAITING)

    def become_pending(self) -> None:
        """All work of the transaction is done."""
        if self.status is JobStatus.WAITING:
            self._move(JobStatus.PENDING)
            if not self.auto_finalize:
                self.announce_pending()

    def give_up(self) -> None:
        """The transaction has failed: end without effect."""
        if self.status in (JobStatus.WAITING, JobStatus.PENDING):
            self.is_cancelled = self.is_cancelled or self.error is None
            self.error = self.error or CANCELLED
            self._move(JobStatus.ABORTING)
        elif self.error is not None and not self._is_at_work:
            self._abort_once()
        else:
            self._cancel_work()

    def _abort_once(self) -> None:
        if self.status is not JobStatus.ABORTING:
            self._move(JobStatus.ABORTING)

    def _vanish(self) -> None:
        self._move(JobStatus.NULL)
        self._jobs.forget(self)
