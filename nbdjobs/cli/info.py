# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs info`: exports, jobs and the graph of nodes of a running server."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from nbdjobs.cli import arguments as common
from nbdjobs.cli.client_view import ClientState
from nbdjobs.cli.exits import ExitCode
from nbdjobs.cli.job_table import JobWatch
from nbdjobs.cli.jobs import UNLIMITED_WIDTH, look
from nbdjobs.cli.overview import Edges, Overview, draw, name_of_server
from nbdjobs.cli.session import RefusedError, Session, open_session
from nbdjobs.errors import ErrorClass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    common.add_server(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Show what the server has.

    Raises:
        CliError: The server cannot be asked.
    """
    overview = asyncio.run(_ask_server(common.server(arguments)))
    if arguments.json:
        print(json.dumps(overview.to_json(), indent=2))
        return ExitCode.DONE
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = UNLIMITED_WIDTH
    console.print(draw(overview))
    return ExitCode.DONE


async def _ask_server(path: Path) -> Overview:
    async with open_session(path) as session:
        return await ask(session)


async def ask(session: Session, watch: JobWatch | None = None) -> Overview:
    """Ask for everything; what comes and goes meanwhile may be in one answer only.

    Args:
        session: With the server.
        watch: Remembers the jobs of earlier looks; without it, their rates are not known.
    """
    version = await session.execute("query-version")
    exports = await session.execute("query-block-exports")
    jobs = await look(session, watch or JobWatch())
    return Overview(
        server=f"{name_of_server(version)} at {session.path}",
        exports=exports,
        jobs=jobs,
        nodes=await session.nodes(),
        edges=Edges.from_qmp(await _if_there(session, "x-debug-query-block-graph")),
        clients=ClientState.from_qmp(
            await _if_there(session, "query-status"), await session.execute("query-block")
        ),
    )


async def _if_there(session: Session, command: str) -> Any:
    """The answer to a command, or None from a server that does not have it."""
    try:
        return await session.execute(command)
    except RefusedError as error:
        if error.error_class == ErrorClass.COMMAND_NOT_FOUND:
            return None
        raise
