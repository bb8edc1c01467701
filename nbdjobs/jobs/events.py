# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The events of jobs, as their users see them.

Source: QEMU qapi/job.json and qapi/block-core.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypedDict

from nbdjobs.jobs.status import JobStatus, JobType
from nbdjobs.nodes.error_policy import ErrorAction, IoOperation
from nbdjobs.qapi.types import event


@event("JOB_STATUS_CHANGE")
@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatusChange:
    """A job has made a move of its life cycle."""

    id: str
    status: JobStatus


class Outcome(TypedDict):
    """How far a job came, as its last events tell; bytes, and bytes per second."""

    type: JobType
    device: str
    len: int
    offset: int
    speed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    type: JobType
    device: str
    len: int
    offset: int
    speed: int


@event("BLOCK_JOB_COMPLETED")
@dataclass(frozen=True, slots=True, kw_only=True)
class BlockJobCompleted(_Outcome):
    """A job has ended by itself; `error` says why in vain, if so."""

    error: str | None = None


@event("BLOCK_JOB_CANCELLED")
@dataclass(frozen=True, slots=True, kw_only=True)
class BlockJobCancelled(_Outcome):
    """A job has ended because somebody wanted it to."""


@event("BLOCK_JOB_READY")
@dataclass(frozen=True, slots=True, kw_only=True)
class BlockJobReady(_Outcome):
    """A job can be completed now."""


@event("BLOCK_JOB_ERROR")
@dataclass(frozen=True, slots=True, kw_only=True)
class BlockJobError:
    """A job has met an I/O error."""

    device: str
    operation: IoOperation
    action: ErrorAction


@event("BLOCK_JOB_PENDING")
@dataclass(frozen=True, slots=True, kw_only=True)
class BlockJobPending:
    """A job waits for job-finalize."""

    type: JobType
    id: str


EVENTS: Final[tuple[type, ...]] = (
    JobStatusChange,
    BlockJobCompleted,
    BlockJobCancelled,
    BlockJobReady,
    BlockJobError,
    BlockJobPending,
)
"""All events of jobs."""
