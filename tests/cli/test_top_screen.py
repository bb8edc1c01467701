# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The screen of `nbdjobs top` as rich records it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from nbdjobs.cli.job_table import JobWatch
from nbdjobs.cli.overview import Edges, Overview
from nbdjobs.cli.session import BlockNode
from nbdjobs.cli.top_screen import NO_STATISTICS, View, draw
from nbdjobs.cli.traffic import ExportRow, Flow

MIB = 1 << 20


def flow(iops: float = 0, rate: float = 0, *latencies: float) -> Flow:
    p50, p99, average = latencies or (None, None, None)
    return Flow(iops=iops, rate=rate, p50_ns=p50, p99_ns=p99, average_ns=average)


def row(read: Flow | None, write: Flow | None, **more: Any) -> ExportRow:
    fields = {"id": "disk", "node": "disk", "clients": 2, "is_shutting_down": False, **more}
    return ExportRow(read=read, write=write, **fields)


def view(*rows: ExportRow, jobs: tuple[str, ...] = (), has_statistics: bool = True) -> View:
    disk = BlockNode("disk", "file", MIB, None, "/d.img", False)
    running = [
        {
            "id": name,
            "type": "backup",
            "status": "running",
            "current-progress": 1,
            "total-progress": 4,
        }
        for name in jobs
    ]
    overview = Overview(
        server="nbdjobs 1 at /q.sock",
        exports=[
            {"id": each.id, "type": "nbd", "node-name": each.node, "shutting-down": False}
            for each in rows
        ],
        jobs=JobWatch().rows(0.0, running, []),
        nodes={"disk": disk},
        edges=Edges.from_qmp(None),
    )
    return View(overview, rows, has_statistics)


def recorded(seen: View, **options: Any) -> list[str]:
    """The lines of the screen, with single blanks."""
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(draw(seen, **options))
    return [" ".join(line.split()) for line in console.export_text().splitlines()]


def test_an_export_has_a_line_for_reads_and_one_for_writes() -> None:
    lines = recorded(
        view(
            row(
                flow(12345.6, 48 * MIB, 85e3, 1.2e6, 1e5),
                flow(9, 4 * MIB, 2e6, 3e9, 2.5e6),
            )
        )
    )
    assert lines == [
        "nbdjobs 1 at /q.sock",
        "",
        "EXPORT CLIENTS IOPS RATE P50 P99 AVERAGE",
        "disk 2 read 12,346 48 MiB/s 85 µs 1.2 ms 100 µs",
        "write 9 4.0 MiB/s 2.0 ms 3.0 s 2.5 ms",
        "",
        "GRAPH",
        "└── export disk (nbd)",
        "└── disk: file, 1.0 MiB, /d.img",
    ]


@pytest.mark.parametrize(
    ("shown", "line"),
    [
        (row(flow(), flow()), "disk 2 idle"),
        (row(None, None), "disk 2 -"),
        (row(flow(), flow(), clients=None), "disk - idle"),
        (row(flow(), flow(), is_shutting_down=True), "disk (shutting down) 2 idle"),
    ],
)
def test_an_export_at_rest_has_one_line(shown: ExportRow, line: str) -> None:
    assert recorded(view(shown))[3] == line


def test_what_is_not_known_is_a_dash() -> None:
    lines = recorded(view(row(flow(10, MIB), flow())))
    assert lines[3:5] == ["disk 2 read 10 1.0 MiB/s - - -", "write 0 0 B/s - - -"]


@pytest.mark.parametrize(
    ("iops", "text"),
    [(0.25, "0.25"), (1, "1"), (9.94, "9.9"), (9.96, "10"), (1234567, "1,234,567")],
)
def test_few_requests_are_not_none(iops: float, text: str) -> None:
    assert recorded(view(row(flow(iops, 1), flow())))[3].split()[3] == text


def test_a_server_without_statistics_is_said_to_have_none() -> None:
    lines = recorded(view(row(None, None), has_statistics=False))
    assert lines[2:5] == ["EXPORT CLIENTS", "disk 2", NO_STATISTICS]
    assert NO_STATISTICS not in recorded(view(has_statistics=False))
    assert recorded(view(has_statistics=False))[2] == "no exports"


def test_jobs_are_between_exports_and_nodes_and_the_selected_one_stands_out() -> None:
    seen = view(row(flow(), flow()), jobs=("a", "b"))
    lines = recorded(seen, selected="b", keys="q quits", message="done")
    assert lines[:3] == ["nbdjobs 1 at /q.sock", "done", ""]
    assert recorded(seen, keys="q quits")[1] == "q quits"
    assert lines[6].startswith("JOB TYPE STATUS")
    assert lines[7:9] == ["a backup running 25 % - - -", "b backup running 25 % - - -"]
    console = Console(file=io.StringIO(), width=100, record=True, force_terminal=True)
    console.print(draw(seen, selected="b"))
    styled = console.export_text(styles=True).splitlines()
    assert [line.startswith("\x1b[7m") for line in styled[6:8]] == [False, True]


def test_programs_get_everything_with_the_numbers_of_exports() -> None:
    found = view(row(flow(1, 2), None), jobs=("j",)).to_json()
    assert found["server"] == "nbdjobs 1 at /q.sock"
    assert isinstance(found["exports"], list)
    assert isinstance(found["jobs"], list)
    [export], [job] = found["exports"], found["jobs"]
    assert (export["clients"], export["read"]["bytes-per-second"], export["write"]) == (2, 2, None)
    assert (job["id"], job["percent"]) == ("j", 25.0)
