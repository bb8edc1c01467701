# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Commands about jobs: the `job-*` family and the older `block-job-*` family."""

from __future__ import annotations

from dataclasses import dataclass

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.jobs.backup import BackupJob
from nbdjobs.jobs.block_job import BlockJob, find_block_job
from nbdjobs.jobs.job import Job
from nbdjobs.jobs.status import JobStatus, JobType
from nbdjobs.nodes.error_policy import IoStatus
from nbdjobs.qmp.registry import command


@dataclass(frozen=True, slots=True, kw_only=True)
class JobId:
    """Arguments of commands about one job."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockJobDevice:
    """Arguments of the older commands about one job: its id, called `device`."""

    device: str


@command("job-pause")
def job_pause(daemon: Daemon, arguments: JobId) -> None:
    """Pause a job."""
    daemon.jobs.get(arguments.id).pause()


@command("job-resume")
def job_resume(daemon: Daemon, arguments: JobId) -> None:
    """Go on with a paused job."""
    daemon.jobs.get(arguments.id).resume()


@command("job-cancel")
def job_cancel(daemon: Daemon, arguments: JobId) -> None:
    """End a job without effect."""
    daemon.jobs.get(arguments.id).cancel(force=True)


@command("job-complete")
def job_complete(daemon: Daemon, arguments: JobId) -> None:
    """Let a ready job take effect."""
    daemon.jobs.get(arguments.id).complete()


@command("job-finalize")
def job_finalize(daemon: Daemon, arguments: JobId) -> None:
    """Consent to a pending job taking effect."""
    daemon.jobs.get(arguments.id).finalize()


@command("job-dismiss")
def job_dismiss(daemon: Daemon, arguments: JobId) -> None:
    """Let a concluded job vanish."""
    daemon.jobs.get(arguments.id).dismiss()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInfo:
    """A job as query-jobs shows it."""

    id: str
    type: JobType
    status: JobStatus
    current_progress: int
    total_progress: int
    error: str | None = None


@command("query-jobs")
def query_jobs(daemon: Daemon) -> list[JobInfo]:
    """All jobs."""
    return [
        JobInfo(
            id=info.id,
            type=info.type,
            status=info.status,
            current_progress=info.current_progress,
            total_progress=info.total_progress,
            error=info.error,
        )
        for info in (job.info() for job in _newest_first(daemon))
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockJobCancel:
    """Arguments of block-job-cancel."""

    device: str
    force: bool | None = None


@command("block-job-cancel")
def block_job_cancel(daemon: Daemon, arguments: BlockJobCancel) -> None:
    """End a job without effect, or gently if it is ready."""
    job = find_block_job(daemon.jobs, arguments.device)
    job.cancel_block_job(force=bool(arguments.force))


@command("block-job-pause")
def block_job_pause(daemon: Daemon, arguments: BlockJobDevice) -> None:
    """Pause a job."""
    find_block_job(daemon.jobs, arguments.device).pause()


@command("block-job-resume")
def block_job_resume(daemon: Daemon, arguments: BlockJobDevice) -> None:
    """Go on with a paused job."""
    find_block_job(daemon.jobs, arguments.device).resume()


@command("block-job-complete")
def block_job_complete(daemon: Daemon, arguments: BlockJobDevice) -> None:
    """Let a ready job take effect."""
    find_block_job(daemon.jobs, arguments.device).complete()


@command("block-job-finalize")
def block_job_finalize(daemon: Daemon, arguments: JobId) -> None:
    """Consent to a pending job taking effect."""
    find_block_job(daemon.jobs, arguments.id).finalize()


@command("block-job-dismiss")
def block_job_dismiss(daemon: Daemon, arguments: JobId) -> None:
    """Let a concluded job vanish."""
    find_block_job(daemon.jobs, arguments.id).dismiss()


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockJobSetSpeed:
    """Arguments of block-job-set-speed; bytes per second, 0 for no limit."""

    device: str
    speed: int


@command("block-job-set-speed")
def block_job_set_speed(daemon: Daemon, arguments: BlockJobSetSpeed) -> None:
    """Change the pace of a job, at once."""
    find_block_job(daemon.jobs, arguments.device).set_speed(arguments.speed)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockJobInfo:
    """A job as query-block-jobs shows it.

    Beyond QEMU's members, a backup says how many writes of guests had to wait for a copy
    (`x-intercepted-operations`) and how many bytes were copied ahead of them
    (`x-intercepted-bytes`).
    """

    type: str
    device: str
    len: int
    offset: int
    busy: bool
    paused: bool
    speed: int
    io_status: IoStatus
    ready: bool
    status: JobStatus
    auto_finalize: bool
    auto_dismiss: bool
    error: str | None = None
    x_intercepted_operations: int | None = None
    x_intercepted_bytes: int | None = None


@command("query-block-jobs")
def query_block_jobs(daemon: Daemon) -> list[BlockJobInfo]:
    """All jobs that work on nodes."""
    return [_describe(job) for job in _newest_first(daemon) if isinstance(job, BlockJob)]


def _newest_first(daemon: Daemon) -> list[Job]:
    return list(daemon.jobs)[::-1]


def _describe(job: BlockJob) -> BlockJobInfo:
    info = job.info()
    backup = job if isinstance(job, BackupJob) else None
    return BlockJobInfo(
        type=info.type,
        device=info.id,
        len=info.total_progress,
        offset=info.current_progress,
        busy=info.is_busy,
        paused=info.is_paused,
        speed=info.speed,
        io_status=IoStatus(info.io_status),
        ready=info.is_ready,
        status=info.status,
        auto_finalize=info.auto_finalize,
        auto_dismiss=info.auto_dismiss,
        error=info.error,
        x_intercepted_operations=backup.intercepted_operations if backup else None,
        x_intercepted_bytes=backup.intercepted_bytes if backup else None,
    )
