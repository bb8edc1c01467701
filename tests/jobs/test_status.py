# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The life cycle tables, written down a second time as QEMU prints them and compared in full."""

from __future__ import annotations

import pytest

from nbdjobs.jobs.status import MOVES, VERBS, JobStatus, JobVerb

STATUSES = list(JobStatus)

# Columns and rows in QAPI's order: undefined, created, running, paused, ready, standby,
# waiting, pending, aborting, concluded, null.
FOLLOWS = {
    "undefined": "01000000000",
    "created": "00100000101",
    "running": "00011010100",
    "paused": "00100000000",
    "ready": "00000110100",
    "standby": "00001000000",
    "waiting": "00000001100",
    "pending": "00000000110",
    "aborting": "00000000010",
    "concluded": "00000000001",
    "null": "00000000000",
}
ACCEPTS = {
    "cancel": "01111111000",
    "pause": "01111100000",
    "resume": "01111100000",
    "set-speed": "01111100000",
    "complete": "00001000000",
    "finalize": "00000001000",
    "dismiss": "00000000010",
}


@pytest.mark.parametrize("before", JobStatus)
def test_which_status_follows_which(before: JobStatus) -> None:
    allowed = {STATUSES[n] for n, mark in enumerate(FOLLOWS[before]) if mark == "1"}
    assert MOVES[before] == allowed


@pytest.mark.parametrize("verb", JobVerb)
def test_which_status_accepts_which_verb(verb: JobVerb) -> None:
    allowed = {STATUSES[n] for n, mark in enumerate(ACCEPTS[verb]) if mark == "1"}
    assert VERBS[verb] == allowed


def test_the_tables_are_complete() -> None:
    assert set(MOVES) == set(JobStatus)
    assert set(VERBS) == set(JobVerb)
