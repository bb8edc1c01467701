# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The jobs of a server as a table or as JSON. Pure: answers and times go in, rows come out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.table import Table
from rich.text import Text

from nbdjobs.cli.estimate import Estimator, Remaining
from nbdjobs.cli.units import format_range, format_rate

#: Statuses in which a job makes progress (QAPI `JobStatus`).
AT_WORK: Final = frozenset({"created", "running", "ready"})


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """A job at one instant.

    Attributes:
        id: Its name.
        type: Its kind (QAPI `JobType`).
        status: QAPI `JobStatus`.
        offset: Bytes done.
        length: Bytes to do in all.
        speed: Limit in bytes per second, 0 for none; None for a job without one.
        error: Why it failed, once it has.
        io_status: "ok", or which error paused it; None for a job that does no I/O on nodes.
        rate: Bytes per second lately; None while that is not known.
        remaining: How long the rest may take; None while that is not known.
    """

    id: str
    type: str
    status: str
    offset: int
    length: int
    speed: int | None
    error: str | None
    io_status: str | None
    rate: float | None
    remaining: Remaining | None

    @property
    def percent(self) -> float:
        """How much is done, 0 to 100."""
        if self.length <= 0:
            return 100.0 if self.status == "concluded" and self.error is None else 0.0
        return min(100.0, 100.0 * self.offset / self.length)

    @property
    def is_at_work(self) -> bool:
        """Whether it makes progress by itself."""
        return self.status in AT_WORK

    def to_json(self) -> dict[str, object]:
        """The row for programs; the names are those of `backup --json` and of QMP."""
        left = self.remaining
        return {
            "id": self.id,
            "type": self.type,
            "status": self.status,
            "offset": self.offset,
            "len": self.length,
            "percent": round(self.percent, 1),
            "rate": None if self.rate is None else round(self.rate),
            "remaining-min": None if left is None else round(left.low, 1),
            "remaining-max": None if left is None or left.high is None else round(left.high, 1),
            "speed": self.speed,
            "io-status": self.io_status,
            "error": self.error,
        }


class JobWatch:
    """Remembers how each job got on, look after look, and so knows rates."""

    def __init__(self) -> None:
        self._estimators: dict[str, Estimator] = {}

    def rows(
        self, now: float, jobs: Iterable[Mapping[str, Any]], block_jobs: Iterable[Mapping[str, Any]]
    ) -> list[JobRow]:
        """Take one look.

        Args:
            now: Seconds on any clock that never goes back.
            jobs: Answer of `query-jobs`.
            block_jobs: Answer of `query-block-jobs`, which knows more about some of them; the
                two were not asked at the same instant, so a job may be in one only.
        """
        details = {job["device"]: job for job in block_jobs}
        rows = [self._row(now, job, details.get(job["id"], {})) for job in jobs]
        present = {row.id for row in rows}
        for gone in self._estimators.keys() - present:
            del self._estimators[gone]  # another job of that name starts from nothing
        return rows

    def _row(self, now: float, job: Mapping[str, Any], details: Mapping[str, Any]) -> JobRow:
        offset, length = job["current-progress"], job["total-progress"]
        estimator = self._estimators.setdefault(job["id"], Estimator())
        is_at_work = job["status"] in AT_WORK
        if is_at_work:
            estimator.add(now, offset)
        return JobRow(
            id=job["id"],
            type=job["type"],
            status=job["status"],
            offset=offset,
            length=length,
            speed=details.get("speed"),
            error=job.get("error"),
            io_status=details.get("io-status"),
            rate=estimator.rate() if is_at_work else None,
            remaining=estimator.remaining(length) if is_at_work else None,
        )


def table(rows: Sequence[JobRow], *, selected: str | None = None) -> Table:
    """Draw rows for a person; the job of the name `selected` stands out."""
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("JOB", "TYPE", "STATUS"):
        drawn.add_column(heading)
    for heading in ("DONE", "RATE", "LIMIT"):
        drawn.add_column(heading, justify="right")
    drawn.add_column("LEFT")
    has_trouble = any(map(_trouble, rows))
    if has_trouble:
        drawn.add_column("ERROR")
    for row in rows:
        cells = [*_cells(row), *([_trouble(row)] if has_trouble else [])]
        drawn.add_row(*map(Text, cells), style="reverse" if row.id == selected else None)
    return drawn


def _cells(row: JobRow) -> tuple[str, ...]:
    left = row.remaining
    return (
        row.id,
        row.type,
        row.status,
        f"{row.percent:.0f} %",
        "-" if row.rate is None else format_rate(row.rate),
        format_rate(row.speed) if row.speed else "-",
        "-" if left is None else format_range(left.low, left.high),
    )


def _trouble(row: JobRow) -> str:
    """The error it ended with, or what keeps it paused."""
    if row.error is not None:
        return row.error
    return f"paused by an error: {row.io_status}" if row.io_status not in (None, "ok") else ""
