# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The screen of `nbdjobs top`, drawn from what was seen. Pure.

server                                            what the keys do
exports with their clients, and what these do
jobs with rates and remaining times
the graph of nodes
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nbdjobs.cli import job_table, overview
from nbdjobs.cli.overview import Overview
from nbdjobs.cli.traffic import ExportRow, Flow
from nbdjobs.cli.units import format_latency, format_rate

NO_STATISTICS: Final = "this server keeps no statistics of its exports"

#: Root of the tree: the first line names the server already.
GRAPH: Final = "GRAPH"


@dataclass(frozen=True, slots=True)
class View:
    """All that is known of a server at one instant.

    Attributes:
        overview: Exports, jobs, nodes and who uses which.
        exports: The exports with what their clients do.
        has_statistics: Whether the server counts what clients do.
    """

    overview: Overview
    exports: Sequence[ExportRow]
    has_statistics: bool

    def to_json(self) -> dict[str, object]:
        """Everything for programs."""
        exports = [row.to_json() for row in self.exports]
        return {**self.overview.to_json(), "exports": exports}


def draw(
    view: View, *, keys: str = "", selected: str | None = None, message: str = ""
) -> RenderableType:
    """Draw everything.

    Args:
        view: What was seen.
        keys: What the keys do, for the second line.
        selected: The job that keys act on.
        message: What came of the last key, instead.
    """
    return Group(*_parts(view, keys, selected, message))


def _parts(view: View, keys: str, selected: str | None, message: str) -> Iterator[RenderableType]:
    yield Text(view.overview.server, style="bold")
    yield Text(message, style="yellow") if message else Text(keys, style="dim")
    if message or keys:
        yield Text()
    yield exports_table(view.exports, has_statistics=view.has_statistics)
    if view.exports and not view.has_statistics:
        yield Text(NO_STATISTICS, style="dim")
    if view.overview.jobs:
        yield Text()
        yield job_table.table(view.overview.jobs, selected=selected)
    yield Text()
    yield overview.draw(replace(view.overview, server=GRAPH))


def exports_table(rows: Sequence[ExportRow], *, has_statistics: bool) -> RenderableType:
    """Draw the exports: a line for reads and one for writes, or one for an export at rest.

    Without statistics there is nothing but their clients to show.
    """
    if not rows:
        return Text("no exports")
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    drawn.add_column("EXPORT")
    drawn.add_column("CLIENTS", justify="right")
    if has_statistics:
        drawn.add_column("")
        for heading in ("IOPS", "RATE", "P50", "P99", "AVERAGE"):
            drawn.add_column(heading, justify="right")
    for row in rows:
        first = (
            f"{row.id} (shutting down)" if row.is_shutting_down else row.id,
            "-" if row.clients is None else str(row.clients),
        )
        for cells in _flows(row) if has_statistics else [()]:
            drawn.add_row(*(Text(cell) for cell in (*first, *cells)))
            first = ("", "")
    return drawn


def _flows(row: ExportRow) -> Iterator[tuple[str, ...]]:
    if row.read is None or row.write is None:
        yield ("-",)
    elif not (row.read.iops or row.write.iops):
        yield ("idle",)
    else:
        yield ("read", *_cells(row.read))
        yield ("write", *_cells(row.write))


def _cells(flow: Flow) -> tuple[str, ...]:
    return (
        f"{flow.iops:.2g}" if flow.iops < 9.95 else f"{flow.iops:,.0f}",
        format_rate(flow.rate),
        *(
            "-" if latency is None else format_latency(latency)
            for latency in (flow.p50_ns, flow.p99_ns, flow.average_ns)
        ),
    )
