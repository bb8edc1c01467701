# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Inactive nodes: what they refuse, what they let others do, and how they come back."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.activity import activate, inactivate
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.file import FileOptions
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.null import NullOptions
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.nodes.permissions import ALL, Permission
from nbdjobs.nodes.raw import RawOptions
from nbdjobs.nodes.reopening import reopen
from tests.nodes.faults import MemoryNode, Op
from tests.nodes.graphs import PassiveRoot, use_by_root

SIZE = 64 * 1024
WRITER = Permission.CONSISTENT_READ | Permission.WRITE
ALONE = ALL & ~(Permission.WRITE | Permission.RESIZE)


def file(path: Path, **more: bool) -> FileOptions:
    return FileOptions(driver="file", node_name="f", filename=str(path), **more)  # type: ignore[arg-type]  # members of the options, by name


def raw(child: str | BlockdevOptions, *, active: bool | None = None) -> RawOptions:
    return RawOptions(driver="raw", node_name="r", file=child, active=active)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def play(scenario: Callable[[Graph], Awaitable[None]]) -> None:
    """Run a scenario on a new graph and close all of it."""

    async def run() -> None:
        graph = Graph()
        await scenario(graph)
        await close_all(graph)

    asyncio.run(run())


async def close_all(graph: Graph) -> None:
    for node in list(graph.nodes.values()):
        node.is_owned_by_user = False
        await graph.drop_if_unused(node)
    assert not graph.nodes


async def refused(request: Awaitable[object]) -> bool:
    """Whether a request fails because the disk is another's now."""
    try:
        await request
    except NodeError as error:
        return error.errno == errno.EPERM
    return False


async def refusal(change: Awaitable[None]) -> str:
    with pytest.raises(CommandError) as caught:
        await change
    return caught.value.description


def export(graph: Graph, node: Node) -> Device:
    return Device(graph, node, needed=WRITER, shared=ALONE, may_be_inactive=True)


def test_only_reads_are_left_while_inactive(image: Path) -> None:
    async def scenario(graph: Graph) -> None:
        node = await open_node(graph, file(image))
        device = export(graph, node)
        await device.pwrite(0, memoryview(b"x" * 512))
        await inactivate(graph, [node])
        assert not node.is_active
        buffer = bytearray(512)
        await device.pread(0, memoryview(buffer))
        assert buffer == b"x" * 512
        await device.cache(0, 512)
        assert (await device.block_status(0, 512)).length == 512
        requests = [
            device.pwrite(0, memoryview(bytes(512))),
            device.pwrite_zeroes(0, 512),
            device.pdiscard(0, 512),
            device.flush(),
        ]
        assert [await refused(request) for request in requests] == [True] * len(requests)
        await activate(graph, [node])
        await device.pwrite(0, memoryview(b"y" * 512))
        await device.close()

    play(scenario)
    assert image.read_bytes() == b"y" * 512 + bytes(SIZE - 512)


def test_another_process_may_take_the_image_over_and_give_it_back(image: Path) -> None:
    async def scenario(graph: Graph) -> None:
        await open_node(graph, file(image))
        device = export(graph, await open_node(graph, raw("f")))
        await device.pwrite(0, memoryview(b"x" * 512))
        await inactivate(graph, [device.node])
        assert [node.is_active for node in graph.nodes.values()] == [False, False]

        other = Graph()  # locks belong to open files, so this is like another process
        rival = export(other, await open_node(other, file(image)))
        await rival.pwrite(512, memoryview(b"y" * 512))
        sentence = await refusal(activate(graph, [device.node]))
        assert sentence == 'Failed to get "write" lock'
        assert [node.is_active for node in graph.nodes.values()] == [False, False]
        await rival.close()
        os.truncate(image, 2 * SIZE)
        await close_all(other)

        await activate(graph, [device.node])
        assert device.size == 2 * SIZE
        buffer = bytearray(1024)
        await device.pread(0, memoryview(buffer))
        assert buffer == b"x" * 512 + b"y" * 512
        await device.pwrite(2 * SIZE - 512, memoryview(b"z" * 512))
        await device.close()

    play(scenario)


def test_a_node_may_be_opened_inactive_while_another_process_writes(image: Path) -> None:
    async def scenario(graph: Graph) -> None:
        other = Graph()
        writer = export(other, await open_node(other, file(image)))
        inline = FileOptions(driver="file", filename=str(image))
        node = await open_node(graph, raw(inline, active=False))
        assert [each.is_active for each in graph.nodes.values()] == [False, False]
        device = export(graph, node)
        buffer = bytearray(512)
        await writer.pwrite(0, memoryview(b"x" * 512))
        await device.pread(0, memoryview(buffer))
        assert buffer == b"x" * 512
        await writer.close()
        await close_all(other)
        await activate(graph, [node])
        await device.pwrite(0, memoryview(bytes(512)))
        await device.close()

    play(scenario)


def test_what_active_users_need_stays_active() -> None:
    async def scenario(graph: Graph) -> None:
        below = await open_node(graph, NullOptions(driver="null-co", node_name="n", size=SIZE))
        top = await open_node(graph, raw("n"))
        device = Device(graph, top, needed=WRITER)
        assert await refusal(inactivate(graph, [below])) == "Node has active parent node"
        not_permitted = "Operation not permitted"
        sentence = await refusal(inactivate(graph, [top]))
        assert sentence == f"Failed to inactivate node: {not_permitted}"
        sentence = await refusal(inactivate(graph, [top, below], called="all nodes"))
        assert sentence == f"Failed to inactivate all nodes: {not_permitted}"
        assert top.is_active
        assert below.is_active
        await device.close()
        other = await open_node(
            graph, RawOptions(driver="raw", node_name="other", file="n", read_only=True)
        )
        await inactivate(graph, [top])
        assert (top.is_active, below.is_active) == (False, True)
        await inactivate(graph, [other])
        assert (other.is_active, below.is_active) == (False, False)

    play(scenario)


def test_what_would_change_an_inactive_node_is_refused() -> None:
    async def scenario(graph: Graph) -> None:
        options = NullOptions(driver="null-co", node_name="n", size=SIZE, active=False)
        node = await open_node(graph, options)
        with pytest.raises(CommandError, match="Permission 'write' unavailable on inactive node"):
            Device(graph, node, needed=WRITER)
        with pytest.raises(CommandError, match="Permission 'resize' unavailable on inactive node"):
            Device(graph, node, needed=Permission.RESIZE)
        sentence = await refusal(_open(graph, raw("n")))
        assert sentence == "Inactive 'n' can't be a file child of active 'r'"
        await open_node(graph, NullOptions(driver="null-co", node_name="other", size=SIZE))
        top = await open_node(graph, raw("other"))
        assert await refusal(reopen(graph, [raw("n")])) == sentence
        assert await refusal(reopen(graph, [raw("other", active=False)])) == (
            "Cannot change the option 'active'"
        )
        assert top.edges["file"].node.name == "other"
        reader = use_by_root(graph, node, shared=ALONE)
        assert (reader.needed, reader.shared) == (Permission(0), ALL)
        await activate(graph, [node])
        assert (reader.needed, reader.shared) == (Permission.CONSISTENT_READ, ALONE)
        graph.detach(reader)

    async def _open(graph: Graph, options: BlockdevOptions) -> None:
        await open_node(graph, options)

    play(scenario)


def test_nothing_is_handed_over_that_is_not_on_stable_storage() -> None:
    async def scenario(graph: Graph) -> None:
        disk = MemoryNode(SIZE, name="m")
        disk.is_owned_by_user = True
        graph.add(disk)
        device = export(graph, disk)
        loop = asyncio.get_running_loop()
        async with disk.hold(Op.WRITE) as gate:
            write = loop.create_task(device.pwrite(0, memoryview(b"x" * 512)))
            await gate.reached()
            handing_over = loop.create_task(inactivate(graph, [disk]))
            await asyncio.sleep(0)
            assert disk.is_active
        await asyncio.gather(write, handing_over)
        assert bytes(disk.stable[:512]) == b"x" * 512
        await activate(graph, [disk])
        disk.fail(Op.FLUSH)
        sentence = await refusal(inactivate(graph, [disk]))
        assert sentence == "Failed to inactivate node: Input/output error"
        assert disk.is_active
        await device.close()

    play(scenario)


def test_a_user_who_comes_meanwhile_is_seen() -> None:
    async def scenario(graph: Graph) -> None:
        disk = MemoryNode(SIZE, name="m")
        disk.is_owned_by_user = True
        graph.add(disk)
        loop = asyncio.get_running_loop()
        async with disk.hold(Op.FLUSH) as gate:
            handing_over = loop.create_task(inactivate(graph, [disk]))
            await gate.reached()
            edge = use_by_root(graph, disk, WRITER)
        assert isinstance(edge.parent, PassiveRoot)
        assert await refusal(handing_over) == ("Failed to inactivate node: Operation not permitted")
        graph.detach(edge)

    play(scenario)
