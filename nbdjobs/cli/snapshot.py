# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs snapshot`: snapshots inside a qcow2 image that nobody uses."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path

from nbdjobs.cli import image_files
from nbdjobs.cli.exits import CliError, ExitCode
from nbdjobs.cli.image_files import find_format, opened_image
from nbdjobs.cli.image_info import look_at
from nbdjobs.cli.image_text import date_of
from nbdjobs.nodes.qcow2.node import Qcow2Node
from nbdjobs.nodes.qcow2.snapshots import find_snapshot
from nbdjobs.qapi.visitor import to_qapi


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = (
        "Without -c, -a or -d the snapshots are listed. Of an image that a server uses,"
        " snapshots are taken with blockdev-snapshot-internal-sync."
    )
    image_files.add_image(parser)
    image_files.add_output(parser)
    parser.add_argument("-c", "--create", metavar="NAME", help="take a snapshot")
    parser.add_argument(
        "-a", "--apply", metavar="NAME", help="make the disk what it was then; by id or name"
    )
    parser.add_argument("-d", "--delete", metavar="NAME", help="delete a snapshot, by id or name")
    image_files.add_password(parser)


def run(arguments: argparse.Namespace) -> int:
    """List or change the snapshots.

    Raises:
        CliError: It cannot be done.
    """
    path: Path = arguments.image
    if find_format(path, arguments.format) != "qcow2":
        raise CliError(f"'{path}' is no qcow2 image, and only those hold snapshots")
    changes = (arguments.create, arguments.apply, arguments.delete)
    wanted = sum(each is not None for each in changes)
    if wanted > 1:
        raise CliError("expected only one of -c, -a and -d", ExitCode.USAGE)
    if wanted:
        if arguments.force_share:
            raise CliError("changing snapshots needs the image for itself: expected no -U")
        asyncio.run(_change(arguments))
    else:
        asyncio.run(_list(arguments))
    return ExitCode.DONE


async def _list(arguments: argparse.Namespace) -> None:
    info = await look_at(str(arguments.image), "qcow2", is_shared=arguments.force_share)
    snapshots = info.snapshots or []
    if arguments.output == "json":
        print(json.dumps(to_qapi(snapshots), indent=4))
        return
    for each in snapshots:
        print(f"{each.id:>3}  {date_of(each)}  {each.name}")


async def _change(arguments: argparse.Namespace) -> None:
    path: Path = arguments.image
    async with opened_image(
        path, "qcow2", is_changed=True, password_file=arguments.password_file
    ) as (_, node):
        assert isinstance(node, Qcow2Node)
        if arguments.create is not None:
            if not arguments.create:
                raise CliError("a snapshot needs a name: expected one", ExitCode.USAGE)
            await node.take_snapshot(arguments.create, time.time_ns())
            return
        wanted = arguments.apply if arguments.apply is not None else arguments.delete
        snapshot = find_snapshot(node.snapshots, wanted)
        if snapshot is None:
            raise CliError(f"'{path}' has no snapshot '{wanted}'")
        if arguments.apply is not None:
            await node.apply_snapshot(snapshot)
        else:
            await node.delete_snapshot(snapshot)
