# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs demo`: a live backup under a busy client, and the proof that it is exact.

The proof needs the disk's content at the instant the backup began, from somewhere else than the
backup. So the client is held for a moment, with nothing in flight; the image is copied; the job
starts; and the client goes on at once. Whatever it writes from then on must not be in the backup.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

from nbdjobs.cli.backup import BackupPlan, back_up
from nbdjobs.cli.backup_job import Outcome, Reporter, Request, Result
from nbdjobs.cli.demo_disk import count_differences, make_image, set_aside
from nbdjobs.cli.demo_writer import RATE, Counts
from nbdjobs.cli.exits import CliError, ExitCode
from nbdjobs.cli.progress import EXIT_CODES, BarReporter, LineReporter, summary
from nbdjobs.cli.units import format_seconds, format_size, plural

MIB: Final = 1 << 20
EXPORT: Final = "disk"

#: Writes that the client has done before the backup starts: the disk is in use already.
WARM_UP_S: Final = 1.0

#: Seconds a child gets to end by itself.
PATIENCE_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How large and how long.

    Attributes:
        size: Bytes of the disk.
        speed: The backup's limit in bytes per second, so that there is something to watch.
        server: Command that serves an image as `nbdjobs serve` does.
        warm_up: Seconds the client writes before the backup starts.
    """

    size: int = 512 * MIB
    speed: int = 48 * MIB
    # Its log has the demo's form, whatever the environment asks of servers.
    server: Sequence[str] = (
        *(sys.executable, "-m", "nbdjobs", "serve"),
        *("--log-format", "text", "--log-level", "warning"),
    )
    warm_up: float = WARM_UP_S


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line: there is nothing to choose."""
    parser.epilog = "exit codes: 0 the proof holds, 1 it does not or the backup failed"


def run(arguments: argparse.Namespace) -> int:
    """Run the demo and return the exit code."""
    return show(Settings(), Console(soft_wrap=True, highlight=False))


def show(settings: Settings, console: Console) -> int:
    """Run the demo in a temporary folder, which is removed at the end.

    Returns:
        0 when the backup is exact, 1 when it is not or failed, 3 when it was cancelled.

    Raises:
        CliError: The demo could not be run.
    """
    console.print("A live backup while a client writes, proved byte by byte", style="bold")
    with tempfile.TemporaryDirectory(prefix="nbdjobs-demo-") as name:
        _check_space(Path(name), settings.size)
        return _Demo(settings, console, Path(name)).run()


class Client:
    """The busy client's process."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process

    def hold(self) -> Counts:
        """Stop it writing; when this returns, nothing is in flight."""
        return self._ask("hold")

    def go(self) -> None:
        """Let it write on."""
        self._ask("go")

    def stop(self) -> Counts:
        """Let it flush, disconnect and end."""
        return self._ask("stop")

    def _ask(self, word: str) -> Counts:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(word, file=self._process.stdin, flush=True)
        except BrokenPipeError as error:
            raise CliError("the demo's client ended early") from error
        answer = self._process.stdout.readline().split()
        if len(answer) != 2:
            raise CliError("the demo's client ended early")
        return Counts(int(answer[0]), int(answer[1]))


class _Demo:
    """One run; the steps in their order."""

    def __init__(self, settings: Settings, console: Console, folder: Path):
        self._settings = settings
        self._console = console
        self._image = folder / f"{EXPORT}.img"
        self._frozen = folder / "at-the-instant.img"
        self._target = folder / "backup.img"
        self._nbd = folder / "nbd.sock"
        self._qmp = folder / "qmp.sock"

    def run(self) -> int:
        make_image(self._image, self._settings.size)
        with self._server(), self._client() as client:
            self._tell("disk", f"{format_size(self._settings.size)} image, half data, half holes")
            self._tell("client", f"writes {RATE:,} times a second, 4 to 64 KiB, anywhere")
            time.sleep(self._settings.warm_up)
            before = self._instant(client)
            result = self._back_up(client)
            if result.outcome is not Outcome.COMPLETED:
                self._tell("backup", summary(result), style="red")
                return EXIT_CODES[result.outcome]
            after = client.stop()
        self._tell("backup", _how(result))
        self._tell(
            "client",
            f"{plural(after.writes - before.writes, 'write')}"
            f" ({format_size(after.length - before.length)}) while the backup ran",
        )
        return self._prove()

    def _instant(self, client: Client) -> Counts:
        """Hold the client and set the disk's content aside, just before the backup starts."""
        self._held_at = time.monotonic()
        before = client.hold()
        set_aside(self._image, self._frozen)
        return before

    def _back_up(self, client: Client) -> Result:
        def go_on() -> None:
            client.go()
            held = format_seconds(time.monotonic() - self._held_at)
            self._tell(
                "instant",
                f"client held for {held}, nothing in flight: disk copied aside, backup started",
            )

        plan = BackupPlan(
            request=Request(source=EXPORT, speed=self._settings.speed),
            target=str(self._target),
            qmp=self._qmp,
            on_started=go_on,
        )
        return asyncio.run(back_up(plan, self._reporter()))

    def _reporter(self) -> Reporter:
        if self._console.is_terminal:
            return BarReporter(self._console)
        return LineReporter(self._console.file)

    def _prove(self) -> int:
        size = self._settings.size
        wrong = count_differences(self._target, self._frozen)
        moved = count_differences(self._image, self._frozen)
        if wrong:
            text = f"WRONG: {wrong:,} of {size:,} bytes of the backup differ from that instant"
            self._tell("proof", text, style="bold red")
            return ExitCode.FAILED
        text = f"all {size:,} bytes of the backup equal the disk at that instant"
        self._tell("proof", text, style="bold green")
        self._tell("", f"meanwhile the disk has moved on: {moved:,} bytes differ from it")
        if not moved:
            self._tell("proof", "WRONG: the client changed nothing", style="bold red")
            return ExitCode.FAILED
        return ExitCode.DONE

    @contextlib.contextmanager
    def _server(self) -> Iterator[None]:
        words = [*self._settings.server, str(self._image)]
        words += ["--socket", str(self._nbd), "--qmp", str(self._qmp)]
        with _child(words) as process:
            assert process.stdout is not None
            # What it serves is printed once it serves.
            if not process.stdout.readline():
                raise CliError("the demo's server did not start")
            yield

    @contextlib.contextmanager
    def _client(self) -> Iterator[Client]:
        words = [sys.executable, "-m", "nbdjobs.cli.demo_writer", str(self._nbd), EXPORT]
        with _child(words) as process:
            yield Client(process)

    def _tell(self, about: str, text: str, *, style: str = "") -> None:
        self._console.print(Text(f"{about:9}", style="cyan"), Text(text, style=style), sep="")


@contextlib.contextmanager
def _child(words: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a program for as long as it is needed.

    In a session of its own: Ctrl-C is for the demo, which then ends its children in order.
    """
    with subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _how(result: Result) -> str:
    line = f"complete in {format_seconds(result.seconds)}"
    if result.intercepted is None:
        return line
    return f"{line}, {plural(result.intercepted.operations, 'client write')} intercepted"


def _check_space(folder: Path, size: int) -> None:
    """See that image, copy and backup have room: each up to the disk's size."""
    free = shutil.disk_usage(folder).free
    if free < 3 * size:
        raise CliError(
            f"the demo needs {format_size(3 * size)} in '{folder.parent}', which has"
            f" {format_size(free)}: set TMPDIR to a folder with more room"
        )
