# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs jobs`: what the table says, and that it says it of real jobs."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from nbdjobs.cli import jobs
from nbdjobs.cli.exits import ExitCode
from nbdjobs.cli.job_table import JobRow, JobWatch, table
from tests.cli.conftest import CRAWL, SIZE, Operated

MIB = 1 << 20


def job(offset: int = 0, status: str = "running", **more: object) -> dict[str, Any]:
    """An entry of query-jobs."""
    return {
        "id": "j",
        "type": "backup",
        "status": status,
        "current-progress": offset,
        "total-progress": 100 * MIB,
        **more,
    }


def details(**more: object) -> dict[str, Any]:
    """What is read of an entry of query-block-jobs."""
    return {"device": "j", "speed": 0, "io-status": "ok", **more}


def drawn(*rows: JobRow) -> list[str]:
    """The lines of the table, with single blanks."""
    output = io.StringIO()
    Console(file=output, width=200).print(table(rows))
    return [" ".join(line.split()) for line in output.getvalue().splitlines()]


def test_rates_come_from_two_looks() -> None:
    watch = JobWatch()
    [first] = watch.rows(10.0, [job()], [details()])
    assert (first.rate, first.remaining) == (None, None)
    [second] = watch.rows(11.0, [job(20 * MIB)], [details()])
    assert second.rate == 20 * MIB
    assert second.remaining is not None
    assert (second.remaining.low, second.remaining.high) == (4.0, 4.0)
    assert drawn(second)[1] == "j backup running 20 % 20 MiB/s - about 4 s"


def test_a_limit_and_an_error_have_columns() -> None:
    limited = JobWatch().rows(0.0, [job()], [details(speed=5 * MIB)])
    assert drawn(*limited)[1] == "j backup running 0 % - 5.0 MiB/s -"
    assert "ERROR" not in drawn(*limited)[0]
    failed = JobWatch().rows(0.0, [job(50 * MIB, "concluded", error="No space")], [details()])
    assert drawn(*failed)[1] == "j backup concluded 50 % - - - No space"


def test_a_job_paused_by_an_error_says_so() -> None:
    rows = JobWatch().rows(0.0, [job(0, "paused")], [details(**{"io-status": "nospace"})])
    assert drawn(*rows)[1].endswith("paused by an error: nospace")


def test_a_job_that_the_second_answer_does_not_have_is_shown_all_the_same() -> None:
    [row] = JobWatch().rows(0.0, [job()], [])
    assert (row.speed, row.io_status) == (None, None)
    assert drawn(row)[1] == "j backup running 0 % - - -"


def test_a_paused_job_has_no_rate_and_keeps_none_of_its_pause() -> None:
    watch = JobWatch()
    watch.rows(0.0, [job()], [])
    watch.rows(1.0, [job(10 * MIB)], [])
    [paused] = watch.rows(2.0, [job(10 * MIB, "paused")], [])
    assert (paused.rate, paused.remaining) == (None, None)


def test_a_new_job_of_an_old_name_starts_from_nothing() -> None:
    watch = JobWatch()
    watch.rows(0.0, [job()], [])
    watch.rows(1.0, [job(10 * MIB)], [])
    assert watch.rows(2.0, [], []) == []
    [row] = watch.rows(3.0, [job()], [])
    assert row.rate is None


@pytest.mark.parametrize(
    ("status", "error", "percent"),
    [("concluded", None, 100.0), ("concluded", "bad", 0.0), ("running", None, 0.0)],
)
def test_a_job_of_no_length_is_done_when_it_has_concluded_well(
    status: str, error: str | None, percent: float
) -> None:
    more = {} if error is None else {"error": error}
    [row] = JobWatch().rows(0.0, [job(0, status, **more) | {"total-progress": 0}], [])
    assert row.percent == percent


def test_no_jobs_are_a_line(operated: Operated, capsys: pytest.CaptureFixture[str]) -> None:
    assert operated.run("jobs") == ExitCode.DONE
    assert capsys.readouterr().out == "no jobs\n"


def test_programs_read_json(operated: Operated, capsys: pytest.CaptureFixture[str]) -> None:
    operated.start_job()
    assert operated.run("jobs", "--once", "--json") == ExitCode.DONE
    [row] = json.loads(capsys.readouterr().out)["jobs"]
    assert (row["id"], row["type"], row["status"]) == ("j", "backup", "running")
    assert (row["len"], row["speed"], row["io-status"], row["error"]) == (SIZE, CRAWL, "ok", None)
    assert isinstance(row["rate"], int)


def test_a_file_gets_the_table_once_and_whole(
    operated: Operated, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    operated.start_job(auto_dismiss=False)
    operated.run("cancel", "j")
    operated.wait_status("concluded")
    capsys.readouterr()
    assert operated.run("jobs") == ExitCode.DONE
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split() == ["JOB", "TYPE", "STATUS", "DONE", "RATE", "LIMIT", "LEFT", "ERROR"]
    assert line.split()[:3] == ["j", "backup", "concluded"]
    assert line.rstrip().endswith("Operation canceled")


def test_ctrl_c_is_the_ordinary_end_of_the_live_view(
    operated: Operated, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0
    real_look = jobs.look

    async def look(*arguments: Any) -> list[JobRow]:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise KeyboardInterrupt
        return await real_look(*arguments)

    monkeypatch.setattr(jobs, "look", look)
    monkeypatch.setattr(jobs, "INTERVAL_S", 0.0)
    assert operated.run("jobs", "--json") == ExitCode.DONE
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"jobs": []},
        {"jobs": []},
    ]
