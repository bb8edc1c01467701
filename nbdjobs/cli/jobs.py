# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs jobs`: the jobs of a server with their rates, until Ctrl-C or once."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from rich.console import Console, RenderableType
from rich.live import Live

from nbdjobs.cli import arguments as common
from nbdjobs.cli.estimate import SLICE_S
from nbdjobs.cli.exits import ExitCode
from nbdjobs.cli.job_table import JobRow, JobWatch, table
from nbdjobs.cli.session import Session, open_session

#: Seconds between two looks: QMP has no event for progress.
INTERVAL_S: Final = SLICE_S

#: A file has no width: nothing is cut off or wrapped there.
UNLIMITED_WIDTH: Final = 10_000

Show = Callable[[Sequence[JobRow]], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = "Where the output is not a terminal, the jobs are shown once."
    common.add_server(parser)
    parser.add_argument("--once", action="store_true", help="show the jobs once and end")
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object per look, one per line"
    )


def run(arguments: argparse.Namespace) -> int:
    """Show the jobs; Ctrl-C is the ordinary end.

    Raises:
        CliError: The server cannot be asked.
    """
    console = Console(file=sys.stdout)
    is_once = arguments.once or not (arguments.json or console.is_terminal)
    with ExitStack() as stack:
        show = _print_json if arguments.json else _shower(console, stack, is_once=is_once)
        path = common.server(arguments)
        try:
            asyncio.run(_show_once(path, show) if is_once else _follow(path, show))
        except KeyboardInterrupt:
            return ExitCode.DONE
    return ExitCode.DONE


async def look(session: Session, watch: JobWatch) -> list[JobRow]:
    """Ask for the jobs."""
    jobs = await session.execute("query-jobs")
    block_jobs = await session.execute("query-block-jobs")
    return watch.rows(time.monotonic(), jobs, block_jobs)


async def _show_once(path: Path, show: Show) -> None:
    """A rate needs two looks: the second is taken only if a job is at work."""
    watch = JobWatch()
    async with open_session(path) as session:
        rows = await look(session, watch)
        if any(row.is_at_work for row in rows):
            await asyncio.sleep(SLICE_S)
            rows = await look(session, watch)
    show(rows)


async def _follow(path: Path, show: Show) -> None:
    watch = JobWatch()
    async with open_session(path) as session:
        while True:
            show(await look(session, watch))
            await asyncio.sleep(INTERVAL_S)


def _shower(console: Console, stack: ExitStack, *, is_once: bool) -> Show:
    """Return what draws rows: over the last ones on a live screen, or below."""
    if is_once:
        return lambda rows: _print(console, rows)
    live = stack.enter_context(Live(console=console, auto_refresh=False))
    return lambda rows: live.update(_drawn(rows), refresh=True)


def _print(console: Console, rows: Sequence[JobRow]) -> None:
    if not console.is_terminal:
        console.width = UNLIMITED_WIDTH
    console.print(_drawn(rows))


def _drawn(rows: Sequence[JobRow]) -> RenderableType:
    return table(rows) if rows else "no jobs"


def _print_json(rows: Sequence[JobRow]) -> None:
    print(json.dumps({"jobs": [row.to_json() for row in rows]}), flush=True)
