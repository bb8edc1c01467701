# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The life cycle of jobs as two tables: which status follows which, and which verbs it takes.

    created ──▶ running ──▶ waiting ──▶ pending ──▶ concluded ──▶ null
                 │   ▲         │           │            ▲
                 ▼   │         └───────────┴▶ aborting ─┘
                paused

A job that has something to keep in step (mirror) goes from running to ready, and its pause is
called standby.

Source: QAPI `JobStatus`, `JobVerb`; QEMU `job.c`, the tables JobSTT and JobVerbTable.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class JobType(StrEnum):
    """Kinds of jobs (QAPI `JobType`)."""

    BACKUP = "backup"
    MIRROR = "mirror"
    COMMIT = "commit"
    STREAM = "stream"
    CREATE = "create"
    AMEND = "amend"


class JobStatus(StrEnum):
    """Where a job is in its life (QAPI `JobStatus`)."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class JobVerb(StrEnum):
    """What users may ask of a job (QAPI `JobVerb`)."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"


_S = JobStatus

MOVES: Final[Mapping[JobStatus, frozenset[JobStatus]]] = {
    _S.UNDEFINED: frozenset({_S.CREATED}),
    _S.CREATED: frozenset({_S.RUNNING, _S.ABORTING, _S.NULL}),
    _S.RUNNING: frozenset({_S.PAUSED, _S.READY, _S.WAITING, _S.ABORTING}),
    _S.PAUSED: frozenset({_S.RUNNING}),
    _S.READY: frozenset({_S.STANDBY, _S.WAITING, _S.ABORTING}),
    _S.STANDBY: frozenset({_S.READY}),
    _S.WAITING: frozenset({_S.PENDING, _S.ABORTING}),
    _S.PENDING: frozenset({_S.ABORTING, _S.CONCLUDED}),
    _S.ABORTING: frozenset({_S.CONCLUDED}),
    _S.CONCLUDED: frozenset({_S.NULL}),
    _S.NULL: frozenset(),
}
"""Which status may follow each."""

_AT_WORK: Final = frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY})

VERBS: Final[Mapping[JobVerb, frozenset[JobStatus]]] = {
    JobVerb.CANCEL: _AT_WORK | {_S.WAITING, _S.PENDING},
    JobVerb.PAUSE: _AT_WORK,
    JobVerb.RESUME: _AT_WORK,
    JobVerb.SET_SPEED: _AT_WORK,
    JobVerb.COMPLETE: frozenset({_S.READY}),
    JobVerb.FINALIZE: frozenset({_S.PENDING}),
    JobVerb.DISMISS: frozenset({_S.CONCLUDED}),
}
"""In which statuses each verb is accepted."""
