# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs top`: what a server does right now, on a live screen, once, or as JSON."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, assert_never

from rich.console import Console
from rich.live import Live

from nbdjobs.cli import arguments as common
from nbdjobs.cli.exits import ExitCode
from nbdjobs.cli.info import ask
from nbdjobs.cli.job_table import JobRow, JobWatch
from nbdjobs.cli.jobs import UNLIMITED_WIDTH
from nbdjobs.cli.keyboard import Key, reading_keys
from nbdjobs.cli.latencies import Latencies, keeping_latencies
from nbdjobs.cli.session import RefusedError, Session, open_session
from nbdjobs.cli.top_screen import View, draw
from nbdjobs.cli.traffic import TrafficWatch, counts_by_export

INTERVAL_S: Final = 1.0

INTERVAL_MIN_S: Final = 0.1
"""A look costs the server a few milliseconds; more often, it would be its main work."""

KEYS: Final = "q quits · ↑ ↓ choose a job · p pauses or resumes it"
NO_KEYS: Final = "Ctrl-C quits"

_PAUSED: Final = frozenset({"paused", "standby"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = "Where the output is no terminal that can be drawn on, one screen is printed."
    common.add_server(parser)
    parser.add_argument(
        "--interval",
        type=_interval,
        default=INTERVAL_S,
        metavar="SECONDS",
        help="time between two looks (default: 1)",
    )
    parser.add_argument("--once", action="store_true", help="print one screen and end")
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object per interval, one per line"
    )


def _interval(text: str) -> float:
    with contextlib.suppress(ValueError):
        seconds = float(text)
        if INTERVAL_MIN_S <= seconds < float("inf"):
            return seconds
    raise argparse.ArgumentTypeError(
        f"'{text}' is not an interval: expected {INTERVAL_MIN_S} seconds or more"
    )


def run(arguments: argparse.Namespace) -> int:
    """Watch the server; Ctrl-C and `q` are the ordinary ends.

    Raises:
        CliError: The server cannot be asked, or went away.
    """
    console = Console(file=sys.stdout)
    is_live = console.is_terminal and not console.is_dumb_terminal
    is_once = arguments.once or not (arguments.json or is_live)
    path, interval = common.server(arguments), arguments.interval
    if is_once:
        watching = _print_once(path, interval, console, is_json=arguments.json)
    elif arguments.json:
        watching = _print_json(path, interval)
    else:
        watching = _live(path, interval, console)
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        asyncio.run(watching)
    return ExitCode.DONE


class Watch:
    """Looks at a server again and again.

    Attributes:
        session: With the server.
    """

    def __init__(self, session: Session, latencies: Latencies):
        self.session = session
        self._latencies = latencies
        self._jobs = JobWatch()
        self._traffic = TrafficWatch()

    async def look(self) -> View:
        """Look once; rates and latencies are those since the look before.

        Raises:
            CliError: The server is gone.
        """
        overview = await ask(self.session, self._jobs)
        blockstats = await self.session.execute("query-blockstats")
        now = time.monotonic()
        counts = counts_by_export(overview.exports, blockstats)
        rows = self._traffic.rows(now, overview.exports, counts)
        await self._latencies.switch_on(counts)
        return View(overview, rows, has_statistics=bool(counts))


@contextlib.asynccontextmanager
async def watching(path: Path) -> AsyncIterator[Watch]:
    """Be connected to a server; at the end, however it comes, leave it as it was.

    Raises:
        CliError: It cannot be asked.
    """
    with _ending_on_signals():
        async with open_session(path) as session, keeping_latencies(session) as latencies:
            yield Watch(session, latencies)


@contextlib.contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Let this task be cancelled when the process is to end, so that it tidies up."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    signals = (signal.SIGTERM, signal.SIGHUP)
    for number in signals:
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


async def _print_once(path: Path, interval: float, console: Console, *, is_json: bool) -> None:
    async with watching(path) as watch:
        await watch.look()  # rates need two looks
        await asyncio.sleep(interval)
        view = await watch.look()
    if is_json:
        print(json.dumps(view.to_json()))
        return
    if not console.is_terminal:
        console.width = UNLIMITED_WIDTH
    console.print(draw(view))


async def _print_json(path: Path, interval: float) -> None:
    async with watching(path) as watch:
        await watch.look()
        while True:
            await asyncio.sleep(interval)
            print(json.dumps((await watch.look()).to_json()), flush=True)


async def _live(path: Path, interval: float, console: Console) -> None:
    task = asyncio.current_task()
    assert task is not None
    async with watching(path) as watch:
        view = await watch.look()
        with Live(console=console, screen=True, auto_refresh=False) as live:
            screen = Screen(live, view, leave=task.cancel)
            with reading_keys(sys.stdin, screen.pressed) as has_keys:
                screen.has_keys = has_keys
                while True:
                    screen.show(view)
                    chosen = await screen.wait_for_choice(interval)
                    screen.message = (
                        "" if chosen is None else await pause_or_resume(watch.session, chosen)
                    )
                    view = await watch.look()


async def pause_or_resume(session: Session, job: JobRow) -> str:
    """Ask the server for it and return what came of it, as a sentence.

    Raises:
        CliError: The server is gone.
    """
    command, granted = (
        ("job-resume", "goes on") if job.status in _PAUSED else ("job-pause", "is to pause")
    )
    try:
        await session.execute(command, {"id": job.id})
    except RefusedError as error:
        return error.description
    return f"job '{job.id}' {granted}"


class Screen:
    """The live screen with the job that keys act on.

    Attributes:
        has_keys: Keys can be pressed.
        message: What came of the last key.
    """

    def __init__(self, live: Live, view: View, *, leave: Callable[[], object]):
        self.has_keys = False
        self.message = ""
        self._live = live
        self._view = view
        self._leave = leave
        self._selected: str | None = None
        self._is_chosen = asyncio.Event()

    def show(self, view: View) -> None:
        """Draw what was seen; another job is selected if the one that was is gone."""
        self._view = view
        self._select(0)

    def pressed(self, key: Key) -> None:
        """Act on a key."""
        match key:
            case Key.QUIT:
                self._leave()
            case Key.UP:
                self._select(-1)
            case Key.DOWN:
                self._select(1)
            case Key.PAUSE:
                self._is_chosen.set()
            case _:
                assert_never(key)

    async def wait_for_choice(self, seconds: float) -> JobRow | None:
        """Wait until the selected job is to be paused or resumed; None after some time."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_chosen.wait(), seconds)
            self._is_chosen.clear()
            return next((job for job in self._jobs if job.id == self._selected), None)
        return None

    @property
    def _jobs(self) -> Sequence[JobRow]:
        return self._view.overview.jobs

    def _select(self, step: int) -> None:
        names = [job.id for job in self._jobs] if self.has_keys else []
        place = names.index(self._selected) + step if self._selected in names else 0
        self._selected = names[max(0, min(place, len(names) - 1))] if names else None
        self._draw()

    def _draw(self) -> None:
        keys = KEYS if self.has_keys else NO_KEYS
        drawn = draw(self._view, keys=keys, selected=self._selected, message=self.message)
        self._live.update(drawn, refresh=True)
