# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs map`: which parts of a disk are where, in which image of its chain."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

from nbdjobs.cli import image_files
from nbdjobs.cli.arguments import size
from nbdjobs.cli.exits import CliError, ExitCode
from nbdjobs.cli.image_files import find_format, opened_image
from nbdjobs.cli.image_map import MapEntry, Mapper


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    image_files.add_image(parser)
    image_files.add_output(parser)
    parser.add_argument(
        "-s", "--start-offset", type=size, default=0, metavar="SIZE", help="where to begin"
    )
    parser.add_argument("-l", "--max-length", type=size, metavar="SIZE", help="how far to go")
    image_files.add_password(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the map, as it is found.

    Raises:
        CliError: The image cannot be read.
    """
    asyncio.run(_print_map(arguments))
    return ExitCode.DONE


async def _print_map(arguments: argparse.Namespace) -> None:
    path: Path = arguments.image
    image_format = find_format(path, arguments.format)
    async with opened_image(
        path,
        image_format,
        is_shared=arguments.force_share,
        password_file=arguments.password_file,
    ) as (_, node):
        start, end = arguments.start_offset, node.size
        if start > end:
            raise CliError(f"'{path}' ends at byte {end}: expected an offset before that")
        if arguments.max_length is not None:
            end = min(end, start + arguments.max_length)
        printer = _JsonPrinter() if arguments.output == "json" else _TextPrinter()
        async for entry in Mapper(node).entries(start, end):
            printer.put(entry)
        printer.finish()


class _TextPrinter:
    """Prints a table of what is stored."""

    def __init__(self) -> None:
        print(f"{'OFFSET':<16}  {'LENGTH':<16}  {'MAPPED TO':<16}  FILE")

    def put(self, entry: MapEntry) -> None:
        """Print a run."""
        if not entry.is_data or entry.is_zero:
            return
        place = "-" if entry.offset is None else f"{entry.offset:#x}"
        file = entry.filename or "(compressed or encrypted)"
        print(f"{entry.start:<#16x}  {entry.length:<#16x}  {place:<16}  {file}")

    def finish(self) -> None:
        """Nothing is left to be printed."""


class _JsonPrinter:
    """Prints a list, an object a line."""

    def __init__(self) -> None:
        self._before = "["

    def put(self, entry: MapEntry) -> None:
        """Print a run."""
        print(self._before + json.dumps(to_json(entry)), end="")
        self._before = ",\n"

    def finish(self) -> None:
        """Close the list."""
        print("[]" if self._before == "[" else "]")


def to_json(entry: MapEntry) -> dict[str, Any]:
    """QAPI `MapEntry`, without the file name, as qemu-img has it."""
    found: dict[str, Any] = {
        "start": entry.start,
        "length": entry.length,
        "depth": entry.depth,
        "present": entry.is_present,
        "zero": entry.is_zero,
        "data": entry.is_data,
    }
    return found if entry.offset is None else found | {"offset": entry.offset}
