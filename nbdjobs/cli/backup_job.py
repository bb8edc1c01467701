# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""One backup over QMP, from the target's node to the job's end, with everything undone on errors.

What begins must end: the target node and the job are context managers, so a failure at any step
dismisses the job, removes the node and, through the target, the half-written file.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from qemu.qmp import EventListener, Message

from nbdjobs.cli.exits import CliError, ExitCode
from nbdjobs.cli.images import NODE_NAME_MAX, node_name
from nbdjobs.cli.session import BlockNode, RefusedError, ServerGoneError, Session
from nbdjobs.cli.target import NodeTarget, Target

#: What the error of a cancelled job is called (strerror of ECANCELED).
CANCELED: Final = "Operation canceled"

#: The status of a job that has ended and waits to be dismissed.
CONCLUDED: Final = "concluded"


class Sync(enum.StrEnum):
    """How much of the disk is copied (QAPI `MirrorSyncMode`)."""

    FULL = "full"
    NONE = "none"


class Outcome(enum.StrEnum):
    """How a backup ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class UnknownEndError(CliError):
    """The job is not there any more, and nobody can say how it ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to back up and how.

    Attributes:
        source: Name of a node or export.
        sync: The whole disk, or only what clients overwrite.
        job_id: Name of the job; None for one made from the source's.
        speed: Limit in bytes per second; 0 is none.
        options: More arguments of `blockdev-backup`, as QMP calls them.
    """

    source: str
    sync: Sync = Sync.FULL
    job_id: str | None = None
    speed: int = 0
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Intercepted:
    """What clients wrote while the job ran, and had to wait for until the old data was safe."""

    operations: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A look at the running job.

    Attributes:
        status: The job's status word (QAPI `JobStatus`).
        offset: Bytes done.
        length: Bytes to do in all.
        error: Why it failed, once it has.
        intercepted: None when the server does not count client writes.
    """

    status: str
    offset: int
    length: int
    error: str | None
    intercepted: Intercepted | None

    @classmethod
    def from_qmp(cls, job: Mapping[str, Any]) -> Progress:
        """Read an entry of `query-block-jobs`."""
        intercepted = None
        if "x-intercepted-operations" in job and "x-intercepted-bytes" in job:
            intercepted = Intercepted(job["x-intercepted-operations"], job["x-intercepted-bytes"])
        return cls(
            status=job["status"],
            offset=job["offset"],
            length=job["len"],
            error=job.get("error"),
            intercepted=intercepted,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The end of a backup.

    Attributes:
        outcome: How it ended.
        job_id: Name the job had.
        source: Node that was backed up.
        target: What the user called the target.
        sync: How much was to be copied.
        size: Bytes of the disk.
        seconds: From the start command to the end.
        error: Why it failed, as the job says; None otherwise.
        intercepted: None when the server does not count client writes.
    """

    outcome: Outcome
    job_id: str
    source: str
    target: str
    sync: Sync
    size: int
    seconds: float
    error: str | None
    intercepted: Intercepted | None


class Reporter(Protocol):
    """Whoever shows how a backup goes.

    Attributes:
        interval: Seconds between two looks at the job.
    """

    interval: float

    def started(self, *, job_id: str, source: str, target: str, size: int) -> None:
        """The job exists: this was the instant that the backup holds."""

    def progress(self, progress: Progress) -> None:
        """The job was looked at."""

    def notice(self, message: str) -> None:
        """Something happened that the user should know of."""

    def close(self) -> None:
        """Nothing follows but the result."""


class Stop:
    """The user's wish to end the job, from a signal handler.

    Attributes:
        is_wanted: The job is to be cancelled.
        is_urgent: Do not even wait for the job.
    """

    def __init__(self) -> None:
        self.is_wanted = False
        self.is_urgent = False
        self._wake: Callable[[], None] = lambda: None

    def on_request(self, wake: Callable[[], None]) -> None:
        """Set what to call when the wish comes."""
        self._wake = wake

    def request(self) -> None:
        """Wish it; the second time, urgently."""
        self.is_urgent = self.is_wanted
        self.is_wanted = True
        self._wake()


class JobEvents(EventListener):
    """Wakes whoever watches a job when something happens to it.

    Attributes:
        failed_side: What was being done when the job first met an error, in words.
        is_cancelled: The job ended because somebody cancelled it.
    """

    def __init__(self, job_id: str, notice: Callable[[str], None]):
        super().__init__(("JOB_STATUS_CHANGE", "BLOCK_JOB_ERROR", "BLOCK_JOB_CANCELLED"))
        self.woken = asyncio.Event()
        self.failed_side: str | None = None
        self.is_cancelled = False
        self._job_id = job_id
        self._notice = notice

    def accept(self, event: Message) -> bool:
        """Whether an event is about the job."""
        data = event.get("data")
        return (
            super().accept(event)
            and isinstance(data, dict)
            and self._job_id in (data.get("id"), data.get("device"))
        )

    async def put(self, event: Message) -> None:
        """Take an event; nothing is queued, so nothing can pile up."""
        data = event["data"]
        assert isinstance(data, dict)
        match event["event"]:
            case "BLOCK_JOB_ERROR":
                self._error(data)
            case "BLOCK_JOB_CANCELLED":
                self.is_cancelled = True
        self.woken.set()

    def _error(self, data: Mapping[str, Any]) -> None:
        side = "reading the source" if data.get("operation") == "read" else "writing the target"
        if self.failed_side is None:
            self.failed_side = side
        if data.get("action") == "stop":
            self._notice(
                f"paused by an error while {side}: mend it, then continue with QMP"
                f" block-job-resume device={self._job_id}, or stop with Ctrl-C"
            )


class Backup:
    """A backup job and its target on one server."""

    def __init__(
        self,
        session: Session,
        request: Request,
        reporter: Reporter,
        *,
        stop: Stop,
        on_started: Callable[[], None] = lambda: None,
    ):
        """Prepare; nothing is asked of the server yet.

        Args:
            session: Connection to the server.
            request: What to do.
            reporter: Who shows it.
            stop: Where the user's wish to stop arrives.
            on_started: Called at once when the server has answered the start command.
        """
        self._session = session
        self._request = request
        self._reporter = reporter
        self._stop = stop
        self._on_started = on_started

    async def run(self, source: BlockNode, target: Target) -> Result:
        """Start the job, follow it to its end, and clean up on the server.

        The target is neither published nor discarded: that is the caller's, who made it.

        Raises:
            CliError: The job could not be started, or the server went away.
        """
        job_id = self._request.job_id or await self._free_job_id(source)
        async with self._target_node(job_id, target) as node:
            events = JobEvents(job_id, self._reporter.notice)
            self._stop.on_request(events.woken.set)
            began = time.monotonic()
            with self._session.client.listen(events):
                async with self._job(job_id, source, node, events):
                    self._reporter.started(
                        job_id=job_id, source=source.name, target=target.label, size=source.size
                    )
                    last = await self._follow(job_id, events)
        return Result(
            outcome=self._outcome(last, events),
            job_id=job_id,
            source=source.name,
            target=target.label,
            sync=self._request.sync,
            size=source.size,
            seconds=time.monotonic() - began,
            error=_described(last.error, events) if last.error != CANCELED else None,
            intercepted=last.intercepted,
        )

    async def _free_job_id(self, source: BlockNode) -> str:
        taken = {job["id"] for job in await self._session.execute("query-jobs")}
        return free_job_id(source.name, taken)

    @contextlib.asynccontextmanager
    async def _target_node(self, job_id: str, target: Target) -> AsyncIterator[str]:
        """Open the target on the server for as long as the job needs it."""
        name = node_name(f"{job_id}-target")
        assert len(name) <= NODE_NAME_MAX
        options = target.node_options(name)
        if options is None:
            assert isinstance(target, NodeTarget)
            yield target.name
            return
        await self._session.execute("blockdev-add", options)
        try:
            yield name
        finally:
            await self._clean_up("blockdev-del", {"node-name": name})

    @contextlib.asynccontextmanager
    async def _job(
        self, job_id: str, source: BlockNode, node: str, events: JobEvents
    ) -> AsyncIterator[None]:
        """Start the job; at the end it has concluded, by itself or cancelled, and is dismissed."""
        request = self._request
        arguments: dict[str, object] = {
            "job-id": job_id,
            "device": source.name,
            "target": node,
            "sync": request.sync.value,
            "speed": request.speed,
            # The job stays until it is dismissed, so its end cannot be missed.
            "auto-dismiss": False,
            **request.options,
        }
        await self._session.execute("blockdev-backup", arguments)
        self._on_started()
        try:
            yield
        finally:
            await self._end_job(job_id, events)

    async def _end_job(self, job_id: str, events: JobEvents) -> None:
        """Dismiss the job; if something else than its own end brought us here, cancel it first."""
        if self._stop.is_urgent:
            return
        with contextlib.suppress(ServerGoneError, UnknownEndError):
            progress = await self._look(job_id)
            if progress.status != CONCLUDED:
                await self._clean_up("job-cancel", {"id": job_id})
            while progress.status != CONCLUDED:
                await self._doze(events)
                events.woken.clear()
                progress = await self._look(job_id)
            await self._clean_up("job-dismiss", {"id": job_id})

    async def _clean_up(self, command: str, arguments: Mapping[str, object]) -> None:
        """Run a command whose failure must not hide why things end.

        A server that is gone has nothing left to clean up.
        """
        if self._stop.is_urgent:
            return
        try:
            await self._session.execute(command, arguments)
        except ServerGoneError:
            pass
        except RefusedError as error:
            self._reporter.notice(str(error))

    async def _follow(self, job_id: str, events: JobEvents) -> Progress:
        """Watch the job until it has concluded, cancelling it when the user wishes."""
        is_cancelling = False
        while True:
            events.woken.clear()
            progress = await self._look(job_id)
            self._reporter.progress(progress)
            if progress.status == CONCLUDED:
                return progress
            if self._stop.is_urgent:
                raise CliError(
                    f"not waiting for job '{job_id}': it and its target node stay on the server",
                    ExitCode.CANCELLED,
                )
            if self._stop.is_wanted and not is_cancelling:
                is_cancelling = True
                await self._session.execute("job-cancel", {"id": job_id})
                self._reporter.notice("stopping the job, once more Ctrl-C leaves it behind")
            await self._doze(events)

    async def _doze(self, events: JobEvents) -> None:
        """Wait until it is worth looking again: after any event, or else after a while.

        QMP has no event for progress, so a look now and then is the only way to see it.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(events.woken.wait(), self._reporter.interval)

    async def _look(self, job_id: str) -> Progress:
        for job in await self._session.execute("query-block-jobs"):
            if job["device"] == job_id:
                return Progress.from_qmp(job)
        raise UnknownEndError(f"job '{job_id}' was dismissed by somebody else: its end is unknown")

    def _outcome(self, last: Progress, events: JobEvents) -> Outcome:
        if events.is_cancelled or last.error == CANCELED:
            # Nothing but cancelling ends a job that only saves what is overwritten.
            is_end = self._request.sync is Sync.NONE and self._stop.is_wanted
            return Outcome.COMPLETED if is_end else Outcome.CANCELLED
        return Outcome.FAILED if last.error is not None else Outcome.COMPLETED


def free_job_id(source: str, taken: Collection[str]) -> str:
    """Return a name for a job that backs up a node, unlike those that jobs have."""
    first = f"backup-{source}"
    names = (first if count == 1 else f"{first}-{count}" for count in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)


def _described(error: str | None, events: JobEvents) -> str | None:
    if error is None or events.failed_side is None:
        return error
    return f"{error} (while {events.failed_side})"
