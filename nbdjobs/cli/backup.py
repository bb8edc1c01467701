# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs backup`: a live backup through a running daemon's QMP socket."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from nbdjobs.cli import arguments as common
from nbdjobs.cli import progress
from nbdjobs.cli.backup_check import Rehearsal, rehearse
from nbdjobs.cli.backup_job import Backup, Outcome, Reporter, Request, Result, Stop, Sync
from nbdjobs.cli.exits import CliError, ExitCode
from nbdjobs.cli.runtime import is_listening
from nbdjobs.cli.session import ServerGoneError, open_session
from nbdjobs.cli.target import Target, prepare

ON_ERROR: Final = ("report", "ignore", "enospc", "stop")
ON_CBW_ERROR: Final = ("break-guest-write", "break-snapshot")

EPILOG: Final = (
    "exit codes: 0 the backup is complete, 1 it failed, 2 wrong usage, 3 it was cancelled."
    " A file is called TARGET.partial until it is complete."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupPlan:
    """What `nbdjobs backup` was asked for.

    Attributes:
        request: The job.
        target: A path or `node:NAME`.
        qmp: The server's QMP socket.
        is_forced: An existing target may be replaced.
        on_started: Called at once when the job exists.
    """

    request: Request
    target: str
    qmp: Path
    is_forced: bool = False
    on_started: Callable[[], None] = field(default=lambda: None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = EPILOG
    parser.add_argument("source", metavar="SOURCE", help="disk: name of its export or node")
    parser.add_argument(
        "target", metavar="TARGET", help="new raw file, block device, or node:NAME on the server"
    )
    common.add_server(parser)
    parser.add_argument(
        "--sync",
        choices=[sync.value for sync in Sync],
        default=Sync.FULL.value,
        help="full: the whole disk (default); none: only what is overwritten, until Ctrl-C",
    )
    parser.add_argument(
        "--speed",
        type=common.size,
        default=0,
        metavar="BYTES",
        help="limit per second, such as 50M",
    )
    parser.add_argument("--job-id", metavar="ID", help="name of the job (default: backup-SOURCE)")
    parser.add_argument("--force", action="store_true", help="replace what TARGET holds")
    for side in ("source", "target"):
        parser.add_argument(
            f"--on-{side}-error", choices=ON_ERROR, help=f"when the {side} fails (default: report)"
        )
    parser.add_argument(
        "--on-cbw-error",
        choices=ON_CBW_ERROR,
        help="when old data cannot be saved: fail the client's write (default) or the backup",
    )
    parser.add_argument(
        "--cbw-timeout",
        type=_seconds,
        metavar="SECONDS",
        help="how long a client's write may wait for old data to be saved (default: 0, no limit)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON objects, one per line")
    parser.add_argument("--no-progress", action="store_true", help="print only the result")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only say what would happen, and why it would fail; exit code 1 if it would",
    )


def run(arguments: argparse.Namespace) -> int:
    """Back up and return the exit code.

    Raises:
        CliError: There is no result to print.
    """
    if arguments.dry_run:
        return _rehearse(_plan(arguments), is_json=arguments.json)
    reporter = progress.choose(
        is_json=arguments.json,
        has_progress=not arguments.no_progress,
        output=sys.stdout,
        errors=sys.stderr,
    )
    try:
        result = asyncio.run(back_up(_plan(arguments), reporter))
    except CliError as error:
        if arguments.json:
            progress.write_json(sys.stdout, progress.failure_json(str(error), error.code))
        raise
    if arguments.json:
        progress.write_json(sys.stdout, progress.result_json(result))
    elif result.outcome is Outcome.COMPLETED:
        print(progress.summary(result))
    if result.outcome is not Outcome.COMPLETED:
        print(f"nbdjobs: {progress.summary(result)}", file=sys.stderr)
    return progress.EXIT_CODES[result.outcome]


def _rehearse(plan: BackupPlan, *, is_json: bool) -> int:
    """Print what a backup would do, then what stands in its way."""
    try:
        rehearsal = asyncio.run(_rehearsed(plan))
    except CliError as error:
        if not is_json:
            raise
        rehearsal = Rehearsal(plan=(), problems=(str(error),), warnings=())
    if is_json:
        progress.write_json(sys.stdout, rehearsal.to_json())
        return rehearsal.code
    for sentence in rehearsal.plan:
        print(sentence)
    for warning in rehearsal.warnings:
        print(f"nbdjobs: warning: {warning}", file=sys.stderr)
    for problem in rehearsal.problems:
        print(f"nbdjobs: would fail: {problem}", file=sys.stderr)
    return rehearsal.code


async def _rehearsed(plan: BackupPlan) -> Rehearsal:
    async with open_session(plan.qmp) as session:
        return await rehearse(session, plan.request, plan.target, is_forced=plan.is_forced)


async def back_up(plan: BackupPlan, reporter: Reporter) -> Result:
    """Make one backup and keep or remove its target; SIGINT and SIGTERM cancel it.

    Raises:
        CliError: It could not be started or followed; nothing half-started is left.
    """
    async with open_session(plan.qmp) as session:
        nodes = await session.nodes()
        source = await session.find_node(plan.request.source, nodes)
        with _stopped_by_signals() as stop:
            target = prepare(
                plan.target,
                size=source.size,
                is_forced=plan.is_forced,
                in_use={node.filename for node in nodes.values()},
            )
            backup = Backup(session, plan.request, reporter, stop=stop, on_started=plan.on_started)
            try:
                result = await backup.run(source, target)
            except BaseException as error:
                _give_up(target, error, plan.qmp)
                raise
            finally:
                reporter.close()
            return await _settle(target, result)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a wish to stop; the third one acts as it would without."""
    stop = Stop()
    loop = asyncio.get_running_loop()

    def let_go() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    def on_signal() -> None:
        stop.request()
        if stop.is_urgent:
            let_go()  # a server that hangs may not even let go of a command

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    finally:
        let_go()


def _give_up(target: Target, error: BaseException, server: Path) -> None:
    """Remove what was made for the target, unless a job may still be writing to it."""
    is_abandoned = isinstance(error, CliError) and error.code is ExitCode.CANCELLED
    is_running = isinstance(error, ServerGoneError) and is_listening(server)
    if not is_abandoned and not is_running:
        target.discard()


async def _settle(target: Target, result: Result) -> Result:
    if result.outcome is Outcome.COMPLETED:
        # Making it durable may take long, and the loop has signals to hear.
        await asyncio.to_thread(target.publish)
    else:
        target.discard()
    return result


def _plan(arguments: argparse.Namespace) -> BackupPlan:
    options = {
        "on-source-error": arguments.on_source_error,
        "on-target-error": arguments.on_target_error,
        "on-cbw-error": arguments.on_cbw_error,
        "cbw-timeout": arguments.cbw_timeout,
    }
    request = Request(
        source=arguments.source,
        sync=Sync(arguments.sync),
        job_id=arguments.job_id,
        speed=arguments.speed,
        # What is not asked for is not sent: an older server may not know it.
        options={name: value for name, value in options.items() if value is not None},
    )
    return BackupPlan(
        request=request,
        target=arguments.target,
        qmp=common.server(arguments),
        is_forced=arguments.force,
    )


def _seconds(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"'{text}' is not a time: expected whole seconds")
    return int(text)
