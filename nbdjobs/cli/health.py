# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs health`: whether a running daemon answers, for container engines and supervisors."""

from __future__ import annotations

import argparse
import asyncio
import math
from pathlib import Path
from typing import Final

from nbdjobs.cli.exits import CliError, ExitCode
from nbdjobs.cli.runtime import find_server, runtime_dir
from nbdjobs.cli.session import open_session

TIMEOUT_S: Final = 5.0
"""Seconds for all answers: an idle daemon takes milliseconds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = "exit codes: 0 the daemon answers, 1 it does not, 2 wrong usage."
    parser.add_argument("--qmp", type=Path, metavar="PATH", help="QMP socket of the server")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=TIMEOUT_S,
        metavar="SECONDS",
        help=f"how long all answers may take (default: {TIMEOUT_S:g})",
    )


def run(arguments: argparse.Namespace) -> int:
    """Ask, say in a line what was answered, and return the exit code.

    Raises:
        CliError: The daemon is not there, or does not answer in time.
    """
    path = arguments.qmp or find_server(runtime_dir())
    print(asyncio.run(check(path, timeout_s=arguments.timeout)))
    return ExitCode.DONE


async def check(path: Path, *, timeout_s: float) -> str:
    """Ask a daemon for its version and its exports.

    That its socket accepts says little: the kernel does that for a daemon that hangs. An answer
    about its exports means that the event loop turns, which also serves NBD clients.

    Args:
        path: Its QMP socket.
        timeout_s: Seconds for all answers together.

    Returns:
        A sentence with what it said.

    Raises:
        CliError: Nobody listens, it is no QMP server, or the time is over.
    """
    try:
        async with asyncio.timeout(timeout_s), open_session(path) as session:
            version = await session.execute("query-version")
            exports = await session.execute("query-block-exports")
    except TimeoutError as error:
        raise CliError(f"the server at '{path}' did not answer within {timeout_s:g} s") from error
    program = version["package"] or "QEMU {major}.{minor}.{micro}".format(**version["qemu"])
    return f"healthy: {program}, {len(exports)} export{'' if len(exports) == 1 else 's'}"


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a time: expected seconds above 0")
    return seconds
