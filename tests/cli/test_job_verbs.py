# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Steering jobs from the command line, on our daemon and the real qemu-storage-daemon."""

from __future__ import annotations

import pytest

from nbdjobs.cli import main
from nbdjobs.cli.exits import ExitCode
from nbdjobs.cli.job_verbs import VERBS
from tests.cli.conftest import Operated

MIB = 1 << 20


def said(capsys: pytest.CaptureFixture[str]) -> str:
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


def refused(operated: Operated, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence of a refusal."""
    assert operated.run(*words) == ExitCode.FAILED
    output = capsys.readouterr()
    assert output.out == ""
    [sentence] = output.err.splitlines()
    return sentence.removeprefix("nbdjobs: ")


def test_every_verb_is_a_subcommand() -> None:
    assert set(VERBS) == main._JOB_VERBS
    assert set(VERBS) <= set(main.SUBCOMMANDS)


def test_a_job_is_paused_and_resumed(
    operated: Operated, capsys: pytest.CaptureFixture[str]
) -> None:
    operated.start_job()
    assert operated.run("pause", "j") == ExitCode.DONE
    assert said(capsys) == "job 'j' pauses\n"
    operated.wait_status("paused")
    assert operated.run("resume", "j") == ExitCode.DONE
    assert said(capsys) == "job 'j' goes on\n"
    operated.wait_status("running")


def test_the_speed_is_changed_at_once(
    operated: Operated, capsys: pytest.CaptureFixture[str]
) -> None:
    operated.start_job()
    assert operated.run("speed", "j", "50M") == ExitCode.DONE
    assert said(capsys) == "job 'j' is limited to 50 MiB/s\n"
    operated.wait_status("null")


def test_without_a_limit_a_job_ends_soon(
    operated: Operated, capsys: pytest.CaptureFixture[str]
) -> None:
    operated.start_job()
    assert operated.run("speed", "j", "0") == ExitCode.DONE
    assert said(capsys) == "job 'j' has no speed limit\n"
    operated.wait_status("null")


def test_a_job_is_cancelled(operated: Operated, capsys: pytest.CaptureFixture[str]) -> None:
    operated.start_job()
    assert operated.run("cancel", "j") == ExitCode.DONE
    assert said(capsys) == "job 'j' is being cancelled\n"
    assert operated.daemon.qmp.wait_event("BLOCK_JOB_CANCELLED")["data"]["device"] == "j"


def test_a_paused_job_is_cancelled_by_force_only(
    operated: Operated, capsys: pytest.CaptureFixture[str]
) -> None:
    operated.start_job()
    operated.run("pause", "j")
    operated.wait_status("paused")
    capsys.readouterr()
    assert refused(operated, capsys, "cancel", "j") == (
        "job 'j' cannot be cancelled:"
        " The block job for device 'j' is currently paused (--force cancels it all the same)"
    )
    assert operated.run("cancel", "j", "--force") == ExitCode.DONE
    operated.daemon.qmp.wait_event("BLOCK_JOB_CANCELLED")


def test_a_pending_job_is_finalized_and_a_concluded_one_dismissed(
    operated: Operated, capsys: pytest.CaptureFixture[str]
) -> None:
    operated.start_job(speed=0, auto_finalize=False, auto_dismiss=False)
    operated.wait_status("pending")
    assert operated.run("finalize", "j") == ExitCode.DONE
    assert said(capsys) == "job 'j' is being finalized\n"
    operated.wait_status("concluded")
    assert operated.run("dismiss", "j") == ExitCode.DONE
    assert said(capsys) == "job 'j' is dismissed\n"
    assert operated.execute("query-jobs") == []


@pytest.mark.parametrize(
    ("verb", "participle", "reason"),
    [
        (
            "complete",
            "completed",
            "Job 'j' in state 'running' cannot accept command verb 'complete'",
        ),
        (
            "finalize",
            "finalized",
            "Job 'j' in state 'running' cannot accept command verb 'finalize'",
        ),
        (
            "dismiss",
            "dismissed",
            "Job 'j' in state 'running' cannot accept command verb 'dismiss'",
        ),
        ("resume", "resumed", "Can't resume a job that was not paused"),
    ],
)
def test_a_refusal_is_told_in_the_words_of_the_server(
    operated: Operated,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    participle: str,
    reason: str,
) -> None:
    operated.start_job()
    assert refused(operated, capsys, verb, "j") == f"job 'j' cannot be {participle}: {reason}"
    assert operated.job()["status"] == "running"


def test_an_unknown_job_is_answered_with_those_there_are(
    operated: Operated, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(operated, capsys, "pause", "x") == "the server has no job 'x': it has none"
    operated.start_job()
    assert refused(operated, capsys, "pause", "x") == "the server has no job 'x': it has 'j'"
