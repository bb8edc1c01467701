# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What users and programs see of a running backup and of its end."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from nbdjobs.cli import progress
from nbdjobs.cli.backup_job import Intercepted, Outcome, Progress, Result, Sync
from nbdjobs.cli.estimate import Estimator
from nbdjobs.cli.exits import ExitCode

MIB = 1 << 20


def look(offset: int, *, status: str = "running", writes: int | None = None) -> Progress:
    return Progress(
        status=status,
        offset=offset,
        length=100 * MIB,
        error=None,
        intercepted=None if writes is None else Intercepted(writes, writes * 4096),
    )


def result(**changes: Any) -> Result:
    fields: dict[str, Any] = {
        "outcome": Outcome.COMPLETED,
        "job_id": "backup-disk",
        "source": "disk",
        "target": "/b.img",
        "sync": Sync.FULL,
        "size": 100 * MIB,
        "seconds": 2.0,
        "error": None,
        "intercepted": None,
        **changes,
    }
    return Result(**fields)


def objects(stream: io.StringIO) -> list[dict[str, Any]]:
    """What was printed, which must be one JSON object per line."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("offset", "length", "status", "done"),
    [
        (0, 100, "running", 0),
        (25, 100, "running", 25),
        (150, 100, "running", 100),
        (0, 0, "running", 0),
        (0, 0, "concluded", 100),
    ],
)
def test_percent(offset: int, length: int, status: str, done: float) -> None:
    seen = Progress(status=status, offset=offset, length=length, error=None, intercepted=None)
    assert progress.percent(seen) == done


def test_the_line_has_rate_range_and_intercepted_writes() -> None:
    estimator = Estimator()
    for second, offset in enumerate((0, 10 * MIB, 30 * MIB, 40 * MIB)):
        estimator.add(float(second), offset)
    line = progress.describe(look(40 * MIB, writes=1234), estimator)
    assert line == "13 MiB/s · 3-6 s left · 1,234 client writes intercepted"


def test_a_server_that_does_not_count_writes_shows_none() -> None:
    assert progress.describe(look(0), Estimator()) == ""


def test_a_paused_job_says_so() -> None:
    assert progress.describe(look(0, status="paused"), Estimator()) == "paused"


def test_a_log_gets_a_line_per_tenth() -> None:
    stream = io.StringIO()
    reporter = progress.LineReporter(stream)
    reporter.started(job_id="j", source="disk", target="/b.img", size=100 * MIB)
    for offset in (0, 5, 12, 13, 47, 49, 90, 100):
        reporter.progress(look(offset * MIB))
    reporter.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "backup of 'disk' (100 MiB) to /b.img started: job j"
    assert [line.split("%")[0].strip() for line in lines[1:]] == ["12", "47", "90"]


def test_the_bar_shows_percent_and_details_and_goes_away() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    reporter = progress.BarReporter(console)
    reporter.started(job_id="j", source="[disk]", target="/b.img", size=100 * MIB)
    reporter.progress(look(25 * MIB, writes=1))
    reporter.notice("mind the [gap]")
    reporter.close()
    text = stream.getvalue()
    assert "[disk]" in text
    assert " 25 %" in text
    assert "1 client write intercepted" in text
    assert "mind the [gap]" in text
    assert text.rstrip().endswith("\x1b[2K")


def test_programs_get_objects() -> None:
    stream = io.StringIO()
    reporter = progress.JsonReporter(stream, has_progress=True)
    reporter.started(job_id="j", source="disk", target="/b.img", size=100 * MIB)
    reporter.progress(look(50 * MIB, writes=3))
    reporter.notice("careful")
    reporter.close()
    started, seen, notice = objects(stream)
    assert started == {
        "type": "started",
        "job-id": "j",
        "source": "disk",
        "target": "/b.img",
        "size": 100 * MIB,
    }
    assert seen == {
        "type": "progress",
        "status": "running",
        "offset": 50 * MIB,
        "len": 100 * MIB,
        "percent": 50.0,
        "rate": None,
        "remaining-min": None,
        "remaining-max": None,
        "intercepted-operations": 3,
        "intercepted-bytes": 3 * 4096,
    }
    assert notice == {"type": "notice", "message": "careful"}


def test_programs_may_do_without_progress() -> None:
    stream = io.StringIO()
    reporter = progress.JsonReporter(stream, has_progress=False)
    reporter.progress(look(0))
    assert objects(stream) == []


def test_the_result_object_tells_the_whole_end() -> None:
    failed = result(outcome=Outcome.FAILED, error="No space left on device", seconds=1.23456)
    assert progress.result_json(failed) == {
        "type": "result",
        "outcome": "failed",
        "exit-code": 1,
        "error": "No space left on device",
        "job-id": "backup-disk",
        "source": "disk",
        "target": "/b.img",
        "sync": "full",
        "size": 100 * MIB,
        "seconds": 1.235,
    }


@pytest.mark.parametrize(
    ("code", "outcome"), [(ExitCode.FAILED, "failed"), (ExitCode.CANCELLED, "cancelled")]
)
def test_without_a_job_the_result_object_has_the_reason(code: ExitCode, outcome: str) -> None:
    assert progress.failure_json("no server", code) == {
        "type": "result",
        "outcome": outcome,
        "exit-code": code,
        "error": "no server",
    }


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "backed up 'disk' (100 MiB) to /b.img in 2.0 s, 50 MiB/s"),
        ({"seconds": 0.05}, "backed up 'disk' (100 MiB) to /b.img in 50 ms"),
        (
            {"intercepted": Intercepted(1, 4096)},
            "backed up 'disk' (100 MiB) to /b.img in 2.0 s, 50 MiB/s, 1 client write intercepted",
        ),
        ({"sync": Sync.NONE}, "saved what was overwritten on 'disk' in 2.0 s to /b.img"),
        ({"outcome": Outcome.CANCELLED}, "backup of 'disk' cancelled after 2.0 s"),
        (
            {"outcome": Outcome.FAILED, "error": "Input/output error"},
            "backup of 'disk' to /b.img failed: Input/output error",
        ),
    ],
)
def test_the_summary_is_one_line(changes: dict[str, Any], line: str) -> None:
    assert progress.summary(result(**changes)) == line


def test_every_outcome_has_an_exit_code() -> None:
    assert set(progress.EXIT_CODES) == set(Outcome)


def test_output_that_is_no_terminal_gets_lines() -> None:
    stream = io.StringIO()
    chosen = progress.choose(is_json=False, has_progress=True, output=stream, errors=stream)
    assert isinstance(chosen, progress.LineReporter)
