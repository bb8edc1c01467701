# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What several subcommands take: the server's control socket, and sizes."""

from __future__ import annotations

import argparse
from pathlib import Path

from nbdjobs.cli.runtime import find_server, runtime_dir
from nbdjobs.cli.units import parse_size


def add_server(parser: argparse.ArgumentParser) -> None:
    """Let the user name the server's control socket."""
    parser.add_argument("--qmp", type=Path, metavar="PATH", help="QMP socket of the server")


def server(arguments: argparse.Namespace) -> Path:
    """Return the control socket that was named, or that of the one server that runs.

    Raises:
        CliError: None was named, and no server or more than one runs.
    """
    named: Path | None = arguments.qmp
    return named or find_server(runtime_dir())


def size(text: str) -> int:
    """Read a number of bytes for argparse: `50M`, `1.5G`."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
