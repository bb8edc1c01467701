# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""How a running backup is shown: a bar on a terminal, plain lines elsewhere, JSON, or nothing.

Progress goes to standard error and results to standard output, so output can be kept in a file
while the bar is watched; only JSON, made for programs, is on standard output throughout.
"""

from __future__ import annotations

import json
import time
from typing import IO, Final

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from nbdjobs.cli.backup_job import Intercepted, Outcome, Progress, Reporter, Result, Sync
from nbdjobs.cli.estimate import Estimator
from nbdjobs.cli.exits import ExitCode
from nbdjobs.cli.units import format_range, format_rate, format_seconds, format_size, plural

EXIT_CODES: Final = {
    Outcome.COMPLETED: ExitCode.DONE,
    Outcome.FAILED: ExitCode.FAILED,
    Outcome.CANCELLED: ExitCode.CANCELLED,
}

#: Seconds between two looks: often enough for a bar to move smoothly.
BAR_INTERVAL_S: Final = 0.1

#: Likewise where nobody watches.
LINE_INTERVAL_S: Final = 0.5

#: Percent between two plain lines.
LINE_STEP: Final = 10


def percent(progress: Progress) -> float:
    """How much is done, 0 to 100."""
    if progress.length <= 0:
        return 100.0 if progress.status == "concluded" else 0.0
    return min(100.0, 100.0 * progress.offset / progress.length)


def describe(progress: Progress, estimator: Estimator) -> str:
    """Write rate, remaining time and intercepted writes of a running job in one line."""
    parts = []
    if progress.status in ("paused", "standby"):
        parts.append("paused")
    elif (rate := estimator.rate()) is not None:
        parts.append(format_rate(rate))
        if (left := estimator.remaining(progress.length)) is not None:
            parts.append(f"{format_range(left.low, left.high)} left")
    if progress.intercepted is not None:
        parts.append(f"{plural(progress.intercepted.operations, 'client write')} intercepted")
    return " · ".join(parts)


class BarReporter:
    """A progress bar for a person at a terminal."""

    interval = BAR_INTERVAL_S

    def __init__(self, console: Console):
        self._estimator = Estimator()
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[details]}", markup=False),
            console=console,
            expand=True,
            transient=True,
        )
        self._task: TaskID | None = None

    def started(self, *, job_id: str, source: str, target: str, size: int) -> None:
        """Show an empty bar."""
        self._task = self._bar.add_task(source, total=100, details="")
        self._bar.start()

    def progress(self, progress: Progress) -> None:
        """Move the bar."""
        assert self._task is not None
        self._estimator.add(time.monotonic(), progress.offset)
        details = describe(progress, self._estimator)
        self._bar.update(self._task, completed=percent(progress), details=details)

    def notice(self, message: str) -> None:
        """Print above the bar."""
        self._bar.console.print(message, style="yellow", markup=False, highlight=False)

    def close(self) -> None:
        """Remove the bar: the result says what matters."""
        self._bar.stop()


class LineReporter:
    """A line for every tenth of the way, for logs."""

    interval = LINE_INTERVAL_S

    def __init__(self, stream: IO[str]):
        self._stream = stream
        self._estimator = Estimator()
        self._next = LINE_STEP

    def started(self, *, job_id: str, source: str, target: str, size: int) -> None:
        """Say what begins."""
        self._print(f"backup of '{source}' ({format_size(size)}) to {target} started: job {job_id}")

    def progress(self, progress: Progress) -> None:
        """Print when another tenth is done."""
        self._estimator.add(time.monotonic(), progress.offset)
        done = percent(progress)
        if done < self._next or done >= 100:
            return
        self._next = int(done // LINE_STEP + 1) * LINE_STEP
        details = describe(progress, self._estimator)
        self._print(f"{done:3.0f} %" + (f" · {details}" if details else ""))

    def notice(self, message: str) -> None:
        """Print it."""
        self._print(message)

    def close(self) -> None:
        """Nothing is open."""

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class SilentReporter:
    """Nothing but what needs the user's attention."""

    interval = LINE_INTERVAL_S

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def started(self, *, job_id: str, source: str, target: str, size: int) -> None:
        """Say nothing."""

    def progress(self, progress: Progress) -> None:
        """Say nothing."""

    def notice(self, message: str) -> None:
        """Print it."""
        print(message, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is open."""


class JsonReporter:
    """One JSON object per line, for programs."""

    interval = LINE_INTERVAL_S

    def __init__(self, stream: IO[str], *, has_progress: bool):
        self._stream = stream
        self._has_progress = has_progress
        self._estimator = Estimator()

    def started(self, *, job_id: str, source: str, target: str, size: int) -> None:
        """Write a `started` object."""
        write_json(
            self._stream,
            {"type": "started", "job-id": job_id, "source": source, "target": target, "size": size},
        )

    def progress(self, progress: Progress) -> None:
        """Write a `progress` object."""
        self._estimator.add(time.monotonic(), progress.offset)
        if not self._has_progress:
            return
        left = self._estimator.remaining(progress.length)
        write_json(
            self._stream,
            {
                "type": "progress",
                "status": progress.status,
                "offset": progress.offset,
                "len": progress.length,
                "percent": round(percent(progress), 1),
                "rate": _rounded(self._estimator.rate()),
                "remaining-min": None if left is None else round(left.low, 1),
                "remaining-max": None if left is None else _rounded(left.high, 1),
                **_intercepted(progress.intercepted),
            },
        )

    def notice(self, message: str) -> None:
        """Write a `notice` object."""
        write_json(self._stream, {"type": "notice", "message": message})

    def close(self) -> None:
        """Nothing is open."""


def write_json(stream: IO[str], value: dict[str, object]) -> None:
    """Write one object as a line of its own, at once."""
    print(json.dumps(value), file=stream, flush=True)


def result_json(result: Result) -> dict[str, object]:
    """The last object of `--json`."""
    return {
        "type": "result",
        "outcome": result.outcome.value,
        "exit-code": EXIT_CODES[result.outcome].value,
        "error": result.error,
        "job-id": result.job_id,
        "source": result.source,
        "target": result.target,
        "sync": result.sync.value,
        "size": result.size,
        "seconds": round(result.seconds, 3),
        **_intercepted(result.intercepted),
    }


def failure_json(message: str, code: int) -> dict[str, object]:
    """The last object of `--json` when there was no job whose end could be told."""
    outcome = Outcome.CANCELLED if code == ExitCode.CANCELLED else Outcome.FAILED
    return {"type": "result", "outcome": outcome.value, "exit-code": code, "error": message}


def summary(result: Result) -> str:
    """The last line for a person."""
    match result.outcome:
        case Outcome.COMPLETED:
            return _completed(result)
        case Outcome.CANCELLED:
            return f"backup of '{result.source}' cancelled after {format_seconds(result.seconds)}"
        case Outcome.FAILED:
            return f"backup of '{result.source}' to {result.target} failed: {result.error}"


def _completed(result: Result) -> str:
    time_taken = format_seconds(result.seconds)
    if result.sync is Sync.NONE:
        line = f"saved what was overwritten on '{result.source}' in {time_taken} to {result.target}"
    else:
        what = f"'{result.source}' ({format_size(result.size)})"
        line = f"backed up {what} to {result.target} in {time_taken}"
        if result.seconds >= 1:  # below that, a rate says nothing
            line += f", {format_rate(result.size / result.seconds)}"
    if result.intercepted is None:
        return line
    return f"{line}, {plural(result.intercepted.operations, 'client write')} intercepted"


def _intercepted(intercepted: Intercepted | None) -> dict[str, object]:
    if intercepted is None:
        return {}
    return {
        "intercepted-operations": intercepted.operations,
        "intercepted-bytes": intercepted.length,
    }


def _rounded(value: float | None, digits: int | None = None) -> float | None:
    return None if value is None else round(value, digits)


def choose(*, is_json: bool, has_progress: bool, output: IO[str], errors: IO[str]) -> Reporter:
    """Return the reporter that fits the options and where the output goes."""
    if is_json:
        return JsonReporter(output, has_progress=has_progress)
    if not has_progress:
        return SilentReporter(errors)
    console = Console(file=errors)
    return BarReporter(console) if console.is_terminal else LineReporter(errors)
