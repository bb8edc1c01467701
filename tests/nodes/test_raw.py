# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Raw nodes: windows and filters, what they ask of the file below, and what they pass on."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable

import pytest

from nbdjobs.errors import NodeError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.graph import Graph, Role
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import Discard
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.raw import RawOptions
from tests.nodes.faults import MemoryNode, Op, Request

WRITER = Permission.CONSISTENT_READ | Permission.WRITE
SIZE = 64 * 1024


async def open_raw(
    graph: Graph, name: str, *, offset: int | None = None, size: int | None = None
) -> Node:
    return await open_node(
        graph,
        RawOptions(
            driver="raw",
            node_name=name,
            file="disk",
            offset=offset,
            size=size,
            discard=Discard.UNMAP,
        ),
    )


def new_graph() -> tuple[Graph, MemoryNode]:
    graph = Graph()
    disk = MemoryNode(SIZE)
    disk.is_owned_by_user = True
    graph.add(disk)
    return graph, disk


def test_sizes_follow_from_offset_and_size() -> None:
    async def scenario() -> list[int]:
        graph, _ = new_graph()
        nodes = [
            await open_raw(graph, "a"),
            await open_raw(graph, "b", offset=4096),
            await open_raw(graph, "c", offset=513),
            await open_raw(graph, "d", offset=512, size=1024),
            await open_raw(graph, "e", size=0),
            await open_raw(graph, "f", offset=SIZE),
        ]
        return [node.size for node in nodes]

    assert asyncio.run(scenario()) == [SIZE, SIZE - 4096, SIZE - 1024, 1024, 0, 0]


def test_a_size_that_was_not_given_follows_the_file() -> None:
    async def scenario() -> None:
        graph, disk = new_graph()
        whole, rest = await open_raw(graph, "a"), await open_raw(graph, "b", offset=4096)
        disk.content += bytes(SIZE)
        assert (whole.size, rest.size) == (2 * SIZE, 2 * SIZE - 4096)

    asyncio.run(scenario())


def test_every_request_is_shifted() -> None:
    async def scenario() -> None:
        graph, disk = new_graph()
        node = await open_raw(graph, "r", offset=4096)
        await node.pread(512, memoryview(bytearray(100)))
        await node.pwrite(512, memoryview(b"x" * 100), fua=True)
        await node.pwrite_zeroes(1024, 512)
        await node.pdiscard(2048, 512)
        await node.flush()
        await node.block_status(4096, 512)
        assert disk.requests == [
            Request(Op.READ, 4608, 100),
            Request(Op.WRITE, 4608, 100, is_fua=True),
            Request(Op.ZERO, 5120, 512),
            Request(Op.DISCARD, 6144, 512),
            Request(Op.FLUSH, 0, 0),
            Request(Op.STATUS, 8192, 512),
        ]

    asyncio.run(scenario())


class Immediate(MemoryNode):
    """Has everything in a cache."""

    def pread_now(self, offset: int, buffer: memoryview, data_only: bool) -> bool:
        buffer[:] = self.content[offset : offset + len(buffer)]
        return True


def test_a_read_on_the_spot_is_shifted() -> None:
    async def scenario() -> None:
        graph = Graph()
        disk = Immediate(bytes(range(256)) * (SIZE // 256))
        disk.is_owned_by_user = True
        graph.add(disk)
        node = await open_raw(graph, "r", offset=4096 + 7, size=1024)
        buffer = memoryview(bytearray(16))
        assert node.pread_now(512, buffer, False)
        assert buffer == disk.content[4096 + 7 + 512 :][:16]

    asyncio.run(scenario())


def test_several_writers_may_share_one_file() -> None:
    async def scenario() -> None:
        graph, disk = new_graph()
        shared = permissions.ALL & ~Permission.RESIZE
        windows = [await open_raw(graph, name, offset=at) for name, at in (("a", 0), ("b", 512))]
        devices = [Device(graph, node, needed=WRITER, shared=shared) for node in windows]
        await devices[0].pwrite(512, memoryview(b"a" * 512))
        await devices[1].pwrite(512, memoryview(b"b" * 512))
        assert disk.content[512:1536] == b"a" * 512 + b"b" * 512

    asyncio.run(scenario())


def test_only_a_window_forbids_others_to_resize_its_file() -> None:
    async def scenario() -> None:
        graph, _ = new_graph()
        plain = (await open_raw(graph, "a")).edges["file"]
        window = (await open_raw(graph, "b", offset=512)).edges["file"]
        assert (plain.needed, plain.shared) == (permissions.NONE, permissions.ALL)
        assert window.shared == permissions.ALL & ~Permission.RESIZE
        assert (plain.role, window.role) == (Role.FILTERED, Role.DATA)

    asyncio.run(scenario())


def test_nothing_behind_a_window_is_read_or_written() -> None:
    """A format in it does not know where it ends."""

    async def scenario() -> None:
        graph, disk = new_graph()
        disk.content[:] = b"x" * SIZE
        window = await open_raw(graph, "window", offset=4096, size=8192)
        buffer = memoryview(bytearray(b"?" * 1024))
        assert not window.pread_now(7680, buffer, False)
        await window.pread(7680, buffer)
        assert buffer == b"x" * 512 + bytes(512)
        await window.pread(1 << 20, buffer)
        assert buffer == bytes(1024)
        assert not window.pwrite_now(7680, buffer)
        assert window.stored_at(7680, 1024, False) is None
        requests: tuple[Callable[[], Awaitable[None]], ...] = (
            lambda: window.pwrite(7680, buffer),
            lambda: window.pwrite_zeroes(7680, 1024),
            lambda: window.pdiscard(7680, 1024),
        )
        for request in requests:
            with pytest.raises(NodeError) as caught:
                await request()
            assert caught.value.errno == errno.ENOSPC
        assert disk.content == b"x" * SIZE
        await window.pwrite(7168, buffer)
        assert disk.content[11264:12288] == bytes(1024)

    asyncio.run(scenario())
