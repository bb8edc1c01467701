# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs create`: a new image file, by the same code as `blockdev-create`.

Options for `-o` have the names that QMP has for them (`nbdjobs create -o cluster-size=64K`), and
those of qemu-img where they differ (`cluster_size`, `compat`).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from nbdjobs.cli import image_files
from nbdjobs.cli.arguments import size
from nbdjobs.cli.exits import CliError, ExitCode
from nbdjobs.cli.image_files import PASSWORD, file_options, find_format, secrets_from
from nbdjobs.cli.image_info import look_at
from nbdjobs.cli.units import format_size
from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.creation import BlockdevCreateOptions, create_image
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.qcow2.chain import combine
from nbdjobs.nodes.rounding import round_up
from nbdjobs.qapi.visitor import visit

_COMPAT: Final = {"0.10": "v2", "v2": "v2", "1.1": "v3", "v3": "v3"}
_SECTOR: Final = 512
_OF_FLAGS: Final = frozenset({"size", "file", "driver", "filename", "backing-file", "backing-fmt"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = (
        "Examples: nbdjobs create -f qcow2 disk.qcow2 10G;"
        " nbdjobs create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2."
    )
    parser.add_argument("image", type=Path, metavar="FILE", help="the file to make")
    parser.add_argument(
        "size", type=size, nargs="?", metavar="SIZE", help="of the disk; that of the backing file"
    )
    parser.add_argument(
        "-f", "--format", choices=image_files.FORMATS, default="raw", help="raw if not given"
    )
    parser.add_argument(
        "-o",
        "--options",
        action="append",
        default=[],
        metavar="NAME=VALUE,...",
        help="options of the format: preallocation, cluster-size, version, lazy-refcounts, ...",
    )
    parser.add_argument("-b", "--backing", metavar="IMAGE", help="image below the new one")
    parser.add_argument(
        "-F", "--backing-format", choices=image_files.FORMATS, help="what that image is"
    )
    image_files.add_password(parser)


def run(arguments: argparse.Namespace) -> int:
    """Make the image.

    Raises:
        CliError: It cannot be made; a file made for it is gone again.
    """
    path: Path = arguments.image
    options = parse_options(arguments.options)
    _check_flags(arguments, options)
    made = asyncio.run(_create(arguments, options))
    print(f"'{path}' is a new {arguments.format} image of {format_size(made)}")
    return ExitCode.DONE


def parse_options(texts: list[str]) -> dict[str, str]:
    """Read `NAME=VALUE,...`; a name without a value is switched on.

    Raises:
        CliError: A part has no name, or the version is none.
    """
    found: dict[str, str] = {}
    for part in (part for text in texts for part in text.split(",") if part):
        name, equals, value = part.partition("=")
        if not name:
            raise CliError(f"'{part}' is no option: expected NAME=VALUE", ExitCode.USAGE)
        name, value = name.replace("_", "-"), value if equals else "on"
        if name == "compat":
            if value not in _COMPAT:
                raise CliError(f"compat is '{value}': expected 0.10 or 1.1", ExitCode.USAGE)
            name, value = "version", _COMPAT[value]
        found[name] = value
    return found


def _check_flags(arguments: argparse.Namespace, options: dict[str, str]) -> None:
    taken = sorted(_OF_FLAGS & options.keys())
    if taken:
        raise CliError(f"'{taken[0]}' has an argument of its own, see --help", ExitCode.USAGE)
    if arguments.backing is not None and arguments.format != "qcow2":
        raise CliError(f"a {arguments.format} image has no backing file", ExitCode.USAGE)
    if arguments.backing_format is not None and arguments.backing is None:
        raise CliError("--backing-format is about --backing: expected both", ExitCode.USAGE)
    if arguments.backing is not None and arguments.backing_format is None:
        raise CliError(
            "a backing file has to come with its format, which is never guessed:"
            " expected --backing-format",
            ExitCode.USAGE,
        )
    if arguments.size is None and arguments.backing is None:
        raise CliError("the size of the disk is missing: expected one such as 10G", ExitCode.USAGE)
    if arguments.format == "luks" and arguments.password_file is None:
        raise CliError("a luks image needs a password: expected --password-file", ExitCode.USAGE)


async def _create(arguments: argparse.Namespace, options: dict[str, str]) -> int:
    """Make the image; returns the size of the disk."""
    path: Path = arguments.image
    wanted = round_up(await _size(arguments), _SECTOR)
    graph = Graph()
    is_new = not await asyncio.to_thread(os.path.lexists, path)
    try:
        if arguments.format == "raw":
            await _make(graph, {"driver": "file", "filename": str(path), "size": wanted, **options})
        else:
            await _make_format(arguments, graph, options, wanted)
    except (CommandError, NodeError) as error:
        if is_new:
            with suppress(OSError):
                await asyncio.to_thread(os.unlink, path)
        raise CliError(f"'{path}' cannot be made: {error}") from error
    return wanted


async def _make_format(
    arguments: argparse.Namespace, graph: Graph, options: dict[str, str], wanted: int
) -> None:
    path: Path = arguments.image
    # A device keeps its size, and a file in use is refused here.
    if not await asyncio.to_thread(_is_device, path):
        await _make(graph, {"driver": "file", "filename": str(path), "size": 0})
    given: dict[str, Any] = {
        "driver": arguments.format,
        "file": await asyncio.to_thread(file_options, path),
        "size": wanted,
        **options,
    }
    password = secrets_from(graph, arguments.password_file)
    if arguments.format == "luks":
        given |= password
    elif password:
        given |= {"encrypt.format": "luks", f"encrypt.{next(iter(password))}": PASSWORD}
    if arguments.backing is not None:
        given |= {"backing-file": arguments.backing, "backing-fmt": arguments.backing_format}
    await _make(graph, given)


def _is_device(path: Path) -> bool:
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except OSError:
        return False


def _is_same(path: Path, name: str) -> bool:
    return os.path.realpath(path) == os.path.realpath(name)


async def _make(graph: Graph, given: dict[str, Any]) -> None:
    await create_image(graph, visit(BlockdevCreateOptions, _nested(given), keyval=True))


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Options as texts, those with a dot in objects of their own."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        first, dot, rest = name.partition(".")
        if dot:
            nested.setdefault(first, {})[rest] = value
        else:
            nested[name] = str(value) if isinstance(value, int) else value
    return nested


async def _size(arguments: argparse.Namespace) -> int:
    """What was asked for, or the size of the backing file."""
    if arguments.backing is None:
        assert arguments.size is not None, "checked before"
        return int(arguments.size)
    name = combine(str(arguments.image), arguments.backing)
    path: Path = arguments.image
    if await asyncio.to_thread(_is_same, path, name):
        raise CliError(f"'{path}' cannot be its own backing file")
    find_format(name, arguments.backing_format)
    info = await look_at(name, arguments.backing_format, is_shared=True)
    return info.virtual_size if arguments.size is None else int(arguments.size)
