# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs qmp`: one QMP command, or without one a shell for them."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from nbdjobs.cli import arguments as common
from nbdjobs.cli.exits import ExitCode
from nbdjobs.cli.qmp_calls import NO_SCHEMA, call, fetch_schema, pretty
from nbdjobs.cli.qmp_shell import run_shell
from nbdjobs.cli.session import open_session

EPILOG: Final = (
    "Example: nbdjobs qmp block-job-set-speed device=backup-disk speed=52428800."
    " Without a COMMAND, commands are read line by line, with completion on a terminal."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = EPILOG
    common.add_server(parser)
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="QMP command")
    parser.add_argument(
        "words", nargs="*", metavar="NAME=VALUE", help="its arguments; or all of them as JSON"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command and print its answer, or run the shell.

    Raises:
        CliError: The server cannot be asked or refuses.
    """
    path = common.server(arguments)
    if arguments.command is None:
        return run_shell(path)
    print(pretty(asyncio.run(_execute(path, arguments.command, arguments.words))))
    return ExitCode.DONE


async def _execute(path: Path, command: str, words: Sequence[str]) -> Any:
    async with open_session(path) as session:
        schema = await fetch_schema(session) if words else NO_SCHEMA
        return await call(session, schema, [command, *words])
