# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Image files opened by a program that ends soon, without a daemon: for `info`, `check` and such.

They are locked as QEMU's tools lock them, so that nobody looks at an image while it changes.
"""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from nbdjobs.cli.exits import CliError
from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.graph import Edge, Graph, Role
from nbdjobs.nodes.image_formats import PROBED_BYTES, format_of
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.opening import open_unowned
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.qcow2.files import Files
from nbdjobs.qapi.visitor import visit

FORMATS: Final = ("raw", "qcow2", "luks")
PASSWORD: Final = "password"
"""Name of the secret that a password file becomes."""

_CHANGES: Final = Permission.WRITE | Permission.RESIZE


def add_image(parser: argparse.ArgumentParser, *, is_optional: bool = False) -> None:
    """Let the user name an image, and say what it is."""
    parser.add_argument(
        "image",
        type=Path,
        metavar="IMAGE",
        nargs="?" if is_optional else None,
        help="an image file or block device",
    )
    parser.add_argument(
        "-f",
        "--format",
        choices=FORMATS,
        help="what the image is, if its content shall not tell it",
    )
    parser.add_argument(
        "-U",
        "--force-share",
        action="store_true",
        help="look at it although another program may be changing it",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Let the user choose between text and JSON."""
    parser.add_argument(
        "--output",
        choices=("human", "json"),
        default="human",
        help="the form of what is printed; json is that of qemu-img",
    )


def add_password(parser: argparse.ArgumentParser) -> None:
    """Let the user name a file with the password of an encrypted image."""
    parser.add_argument(
        "--password-file", type=Path, metavar="FILE", help="password of an encrypted image"
    )


def find_format(path: str | Path, chosen: str | None) -> str:
    """What an image is: as chosen, or as its content says.

    Raises:
        CliError: It cannot be read, or is of a format that is not there.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise CliError(f"'{path}' is no image: expected a regular file or a block device")
            found = chosen or format_of(file.read(PROBED_BYTES))
    except OSError as error:
        raise CliError(f"'{path}' cannot be opened: {error.strerror}") from error
    if found not in FORMATS:
        raise CliError(f"'{path}' is a {found} image: expected one of {', '.join(FORMATS)}")
    return found


def secrets_from(graph: Graph, password_file: Path | None) -> dict[str, str]:
    """Read a password; returns the option that names it, empty if there is none.

    Raises:
        CliError: The file cannot be read.
    """
    if password_file is None:
        return {}
    try:
        graph.secrets.add(PASSWORD, password_file.read_bytes())
    except OSError as error:
        raise CliError(f"'{password_file}' cannot be opened: {error.strerror}") from error
    return {"key-secret": PASSWORD}


def file_options(path: str | Path) -> dict[str, Any]:
    """The node for the file or device at a path."""
    is_file = stat.S_ISREG(os.stat(path).st_mode)
    return {"driver": "file" if is_file else "host_device", "filename": str(path)}


@asynccontextmanager
async def opened_file(
    path: str | Path, *, is_changed: bool = False, is_shared: bool = False, is_raw: bool = False
) -> AsyncIterator[Node]:
    """The file of an image, so that its metadata can be read or changed.

    Args:
        path: Where it is.
        is_changed: It will be written.
        is_shared: Others may be writing it meanwhile.
        is_raw: It has no metadata, so others may write in any case.

    Raises:
        CliError: It cannot be opened, or is in use.
    """
    sharing = {"force-share": True} if is_shared else {}
    options = {**file_options(path), "read-only": not is_changed, **sharing}
    needed = Permission.CONSISTENT_READ | (_CHANGES if is_changed else permissions.NONE)
    shared = permissions.ALL if is_raw or is_shared else permissions.ALL & ~_CHANGES
    async with _used(Graph(), options, path, needed, shared) as node:
        yield node


def files_of(node: Node) -> Files:
    """The file of a qcow2 image in the form that the image's parts take."""
    return Files({"file": Edge(node, "file", node, Role.DATA)})


@asynccontextmanager
async def opened_image(
    path: Path,
    image_format: str,
    *,
    is_changed: bool = False,
    is_shared: bool = False,
    password_file: Path | None = None,
) -> AsyncIterator[tuple[Graph, Node]]:
    """An image with everything below it, as a node; `opened_file` has the rest."""
    graph = Graph()
    password = secrets_from(graph, password_file)
    options: dict[str, Any] = {"driver": image_format, "file": file_options(path)}
    options["read-only"] = not is_changed
    if is_shared:
        options["force-share"] = True
    if image_format == "luks":
        options |= password
    elif image_format == "qcow2" and password:
        options["encrypt"] = {"format": "luks", **password}
    needed = Permission.CONSISTENT_READ | (_CHANGES if is_changed else permissions.NONE)
    shared = permissions.ALL & ~_CHANGES if is_changed else permissions.ALL
    async with _used(graph, options, path, needed, shared) as node:
        yield graph, node


@asynccontextmanager
async def _used(
    graph: Graph, options: dict[str, Any], path: str | Path, needed: Permission, shared: Permission
) -> AsyncIterator[Node]:
    try:
        node = await open_unowned(graph, visit(BlockdevOptions, options))
        try:
            user = Device(graph, node, needed=needed, shared=shared)
        except BaseException:
            await graph.drop_if_unused(node)
            raise
    except CommandError as error:
        raise CliError(_reason(path, str(error))) from error
    try:
        yield node
    except (CommandError, NodeError) as error:
        raise CliError(f"'{path}': {error}") from error
    finally:
        await user.close()
        await graph.drop_if_unused(node)


def _reason(path: str | Path, text: str) -> str:
    if "lock" in text:
        hint = "-U looks at it all the same" if "shared" in text else "end that first"
        return f"'{path}' is in use by another program ({text}): {hint}"
    return f"'{path}' cannot be opened: {text}"
