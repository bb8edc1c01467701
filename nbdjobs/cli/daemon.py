# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs daemon`: a drop-in for qemu-storage-daemon."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Final

import uvloop

from nbdjobs import __version__
from nbdjobs.cli import systemd
from nbdjobs.cli.daemon_check import check_main
from nbdjobs.cli.daemon_options import (
    USAGE,
    CommandLine,
    UsageError,
    parse_command_line,
    without_check,
)
from nbdjobs.cli.daemon_setup import Setup
from nbdjobs.cli.logs import LogOptions, log_event, log_options, logging_to
from nbdjobs.cli.pidfile import PidFile
from nbdjobs.daemon.daemon import Daemon
from nbdjobs.errors import CommandError
from nbdjobs.qmp.commands import REGISTRY
from nbdjobs.qmp.server import QmpServer

logger = logging.getLogger(__name__)

PROGRAM: Final = "nbdjobs"

_SWITCH_INTERVAL_S: Final = 0.0005
"""How long a worker thread may keep the interpreter from the event loop."""

_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _StartError(Exception):
    """The daemon cannot start; its text is for the user."""


def daemon_main(
    arguments: list[str],
    *,
    on_ready: Callable[[], None] | None = None,
    logs: LogOptions | None = None,
) -> int:
    """Run the daemon until it is told to quit.

    Args:
        arguments: The command line behind `nbdjobs daemon`.
        on_ready: Called once everything is set up, in the process that serves.
        logs: What to log, and how; None leaves it to the environment.

    Returns:
        Exit code: 0 after a clean stop, 1 when it could not start.

    Raises:
        CliError: The environment asks for a log that there is not.
    """
    if (checked := without_check(arguments)) is not None:
        return check_main(checked)
    try:
        line = parse_command_line(arguments)
        if line.wants_help:
            print(USAGE, end="")
            return 0
        if line.wants_version:
            print(f"{PROGRAM} version {__version__}")
            return 0
        if line.wants_trace_events:
            return 0
        logging_as_chosen = logging_to(logs or log_options(os.environ))
        with logging_as_chosen, _in_background(line.is_daemonized) as told_parent:
            _run(line, told_parent if on_ready is None else _both(told_parent, on_ready))
    except (UsageError, _StartError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call


def _run(line: CommandLine, on_ready: Callable[[], None]) -> None:
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(line, on_ready))


async def _serve(line: CommandLine, on_ready: Callable[[], None]) -> None:
    daemon = Daemon()
    with _stopping_on_signals(daemon):
        async with QmpServer(REGISTRY, daemon, is_over=lambda: daemon.is_asked_to_quit) as monitors:
            daemon.subscribe(monitors.broadcast)
            daemon.subscribe(log_event)
            try:
                with PidFile(line.pidfile) as pidfile:
                    if await _set_up(line, daemon, monitors):
                        _write(pidfile)
                        _settle_memory()
                        on_ready()
                        _tell(systemd.READY, "ready")
                        await daemon.asked_to_quit()
                        _tell(systemd.STOPPING, "stopping: requests in flight are answered")
            finally:
                await daemon.shutdown()
    logger.info("stopped: everything is closed, all data is flushed as far as storage allows")


def _tell(state: str, sentence: str) -> None:
    """Tell those who watch over the process, and those who read its log."""
    logger.info(sentence)
    systemd.notify(state, os.environ)


def _write(pidfile: PidFile) -> None:
    try:
        pidfile.write()
    except OSError as error:
        raise _StartError(f"cannot create PID file: {error.strerror}") from error


async def _set_up(line: CommandLine, daemon: Daemon, monitors: QmpServer) -> bool:
    """Apply all options in order; False if the daemon was told to quit meanwhile.

    Clients that come early wait, so that none sees a daemon that is half set up.
    """
    setup = Setup(daemon, monitors)
    monitors.hold_clients()
    daemon.exports.hold_clients()
    quitting = asyncio.ensure_future(daemon.asked_to_quit())
    try:
        for step in line.steps:
            applying = asyncio.ensure_future(setup.apply(step))
            await asyncio.wait([applying, quitting], return_when=asyncio.FIRST_COMPLETED)
            if not applying.done():
                applying.cancel()
                await asyncio.wait([applying])
                return False
            try:
                applying.result()
            except CommandError as error:
                raise _StartError(step.complain(error)) from error
    finally:
        quitting.cancel()
    daemon.exports.release_clients()
    monitors.release_clients()
    return True


@contextlib.contextmanager
def _stopping_on_signals(daemon: Daemon) -> Iterator[None]:
    """Let the first signal stop the daemon cleanly, and a second one at once."""
    loop = asyncio.get_running_loop()
    received: list[int] = []

    def stop(number: int) -> None:
        logger.info("told to stop by %s", signal.Signals(number).name)
        received.append(number)
        daemon.quit()
        if len(received) > 1:
            logger.error("told to stop again: leaving without waiting for requests in flight")
            os._exit(128 + number)

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        for number in _STOP_SIGNALS:
            loop.remove_signal_handler(number)


def _settle_memory() -> None:
    """Take what was made at the start out of the garbage collector's rounds."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def _in_background(is_wanted: bool) -> Iterator[Callable[[], None]]:
    """Fork if wanted; the parent exits when the child says that it is ready, or has ended.

    Yields:
        What the child calls when it is ready. In the foreground it does nothing.
    """
    if not is_wanted:
        yield lambda: None
        return
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        is_ready = os.read(reading, 1) == b"+"
        os._exit(0 if is_ready else 1)
    os.close(reading)
    os.setsid()

    def ready() -> None:
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        os.close(null)
        os.write(writing, b"+")
        os.close(writing)

    yield ready
