# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Images opened for tests, on files in memory or on disk."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

from nbdjobs.nodes import permissions
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.file import FileOptions
from nbdjobs.nodes.graph import Edge, Graph, Role
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import Discard
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.qcow2.check import CheckResult, Fix, check
from nbdjobs.nodes.qcow2.create import CreateOptions, create
from nbdjobs.nodes.qcow2.files import Files
from nbdjobs.nodes.qcow2.header_file import HeaderFile
from nbdjobs.nodes.qcow2.node import Qcow2Node
from nbdjobs.nodes.qcow2.options import Qcow2Options
from tests.interop.tools import is_here

READER = Permission.CONSISTENT_READ
WRITER = Permission.CONSISTENT_READ | Permission.WRITE
HAS_QEMU_IMG = is_here("qemu-img")


@asynccontextmanager
async def opened(
    file: Node | Path | str,
    *others: Node,
    events: list[object] | None = None,
    **options: Any,
) -> AsyncIterator[Device]:
    """Open an image; its only user is the device, a writer unless `read_only` is given.

    Args:
        file: A node, which stays afterwards, or a path.
        others: Nodes that the options name.
        events: Gets what the node tells.
        options: Of the driver.
    """
    graph = Graph()
    if events is not None:
        graph.on_event = events.append
    for node in (file, *others):
        if isinstance(node, Node):
            node.is_owned_by_user = True
            graph.add(node)
    reference: str | FileOptions = (
        file.name if isinstance(file, Node) else FileOptions(driver="file", filename=str(file))
    )
    options.setdefault("discard", Discard.UNMAP)
    wanted = Qcow2Options(driver="qcow2", node_name="disk", file=reference, **options)
    image = await open_node(graph, wanted)
    needed = READER if options.get("read_only") else WRITER
    device = Device(graph, image, needed=needed, shared=permissions.ALL & ~Permission.RESIZE)
    image.is_owned_by_user = False
    try:
        yield device
    finally:
        await device.close()


def image_of(device: Device) -> Qcow2Node:
    return cast(Qcow2Node, device.node)


async def checked(file: Node, fix: Fix = Fix.NOTHING, **more: int) -> CheckResult:
    """Check an image that nobody has open."""
    files = Files({"file": Edge(file, "file", file, Role.DATA)})
    return await check(await HeaderFile.read(files), files, fix, **more)


async def content_of(device: Device) -> bytes:
    buffer = bytearray(device.size)
    for begin in range(0, device.size, 1 << 20):
        part = memoryview(buffer)[begin : begin + (1 << 20)]
        await device.pread(begin, part)
    return bytes(buffer)


def qemu_img(*arguments: str | Path) -> str:
    """Run qemu-img; returns what it says."""
    done = subprocess.run(
        ["qemu-img", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"qemu-img {arguments}: {done.stdout}{done.stderr}"
    return done.stdout


async def make(path: Path, options: CreateOptions, data_file: Path | None = None) -> None:
    """Make an image with `create`, in a file that is made, too."""
    graph = Graph()
    nodes: list[Node] = []
    needed = WRITER | Permission.RESIZE
    async with AsyncExitStack() as then:
        for place in (path, data_file):
            if place is None:
                continue
            place.touch()
            name = f"file{len(nodes)}"
            wanted = FileOptions(driver="file", node_name=name, filename=str(place))
            node = await open_node(graph, wanted)
            node.is_owned_by_user = False
            device = Device(graph, node, needed=needed, shared=permissions.ALL)
            then.push_async_callback(device.close)
            nodes.append(node)
        await create(options, *nodes)
