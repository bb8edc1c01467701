# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs info`: what an image file is; or without one, what a running server has.

One word for both, as the answer to "what is this?": with an image that is there, no server is
asked, and without one there is only the server to ask.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from nbdjobs.cli import arguments as common
from nbdjobs.cli import image_files
from nbdjobs.cli.client_view import ClientState
from nbdjobs.cli.exits import CliError, ExitCode
from nbdjobs.cli.image_info import look_at_chain, to_json, to_text
from nbdjobs.cli.job_table import JobWatch
from nbdjobs.cli.jobs import UNLIMITED_WIDTH, look
from nbdjobs.cli.overview import Edges, Overview, draw, name_of_server
from nbdjobs.cli.session import RefusedError, Session, open_session
from nbdjobs.errors import ErrorClass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = (
        "Without an image, a running server is asked for its exports, jobs and nodes."
        " With one, no server is needed."
    )
    image_files.add_image(parser, is_optional=True)
    image_files.add_output(parser)
    parser.add_argument(
        "--backing-chain", action="store_true", help="tell of all images below it, too"
    )
    common.add_server(parser)
    parser.add_argument("--json", action="store_true", help="the same as --output json")


def run(arguments: argparse.Namespace) -> int:
    """Show what the image is, or what the server has.

    Raises:
        CliError: The image cannot be read, or the server cannot be asked.
    """
    arguments.json = arguments.json or arguments.output == "json"
    if arguments.image is not None:
        return _show_image(arguments)
    if arguments.format or arguments.force_share or arguments.backing_chain:
        raise CliError(
            "--format, --force-share and --backing-chain are about an image: expected one",
            ExitCode.USAGE,
        )
    overview = asyncio.run(_ask_server(common.server(arguments)))
    if arguments.json:
        print(json.dumps(overview.to_json(), indent=2))
        return ExitCode.DONE
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = UNLIMITED_WIDTH
    console.print(draw(overview))
    return ExitCode.DONE


def _show_image(arguments: argparse.Namespace) -> int:
    if arguments.qmp is not None:
        raise CliError("--qmp is about a server: expected no image with it", ExitCode.USAGE)
    is_whole = arguments.backing_chain
    infos = asyncio.run(
        look_at_chain(
            arguments.image, arguments.format, is_shared=arguments.force_share, is_whole=is_whole
        )
    )
    if arguments.json:
        print(json.dumps(to_json(infos, is_whole=is_whole), indent=4))
    else:
        print("\n\n".join(to_text(info) for info in infos))
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
