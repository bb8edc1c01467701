# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What commands do to nodes in use: sizes change behind a drained section, thresholds are told."""

from __future__ import annotations

import asyncio

import pytest

from nbdjobs.daemon.daemon import BlockWriteThreshold, Daemon
from nbdjobs.errors import CommandError
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.permissions import ALL, Permission
from nbdjobs.qmp.commands.graph import x_debug_query_block_graph
from tests.nodes.faults import MemoryNode, Op

WRITER = Permission.CONSISTENT_READ | Permission.WRITE


class GrowingDisk(MemoryNode):
    """A disk in memory that changes its size, and remembers what was in flight then."""

    in_flight_then = -1

    async def _truncate(self, size: int) -> None:
        self.in_flight_then = self.in_flight
        await asyncio.sleep(0)
        self.content[:] = self.content[:size].ljust(size, b"\0")


class FixedDisk(MemoryNode):
    """A disk in memory whose size is what it is."""

    async def _truncate(self, size: int) -> None:
        await Node._truncate(self, size)


def test_a_size_changes_while_no_request_is_in_flight() -> None:
    async def go() -> None:
        daemon = Daemon()
        disk = GrowingDisk(4096)
        daemon.graph.add(disk)
        device = Device(daemon.graph, disk, needed=WRITER, shared=ALL)
        loop = asyncio.get_running_loop()
        async with disk.hold(Op.WRITE) as gate:
            write = loop.create_task(device.pwrite(0, memoryview(bytes(512))))
            await gate.reached()
            resize = loop.create_task(daemon.resize(None, "disk", 8192))
            for _ in range(5):
                await asyncio.sleep(0)
            late = loop.create_task(device.pwrite(4096, memoryview(bytes(512))))
            await asyncio.sleep(0)
            assert disk.size == 4096
        await asyncio.gather(write, resize, late)  # the late one finds the new size
        assert (disk.size, disk.in_flight_then) == (8192, 0)
        assert [edge.parent for edge in disk.parents] == [device]
        await device.close()

    asyncio.run(go())


def test_a_refused_change_leaves_no_user_behind() -> None:
    async def go() -> None:
        daemon = Daemon()
        disk = FixedDisk(4096)
        disk.is_owned_by_user = True
        daemon.graph.add(disk)
        with pytest.raises(CommandError, match="Image format driver does not support resize"):
            await daemon.resize(None, "disk", 8192)
        assert not disk.parents
        await daemon.shutdown()

    asyncio.run(go())


def test_a_device_comes_before_a_node() -> None:
    async def go() -> None:
        daemon = Daemon()
        disk = GrowingDisk(4096)
        daemon.graph.add(disk)
        daemon.devices["d"] = Device(daemon.graph, disk, name="d", shared=ALL)
        await daemon.resize("d", "nothing", 512)
        assert disk.size == 512
        await daemon.shutdown()

    asyncio.run(go())


def test_a_write_beyond_a_threshold_is_told() -> None:
    async def go() -> None:
        daemon = Daemon()
        told: list[object] = []
        daemon.subscribe(told.append)
        disk = MemoryNode(4096)
        daemon.graph.add(disk)
        device = Device(daemon.graph, disk, needed=WRITER)
        daemon.set_write_threshold("disk", 1024)
        await device.pwrite(0, memoryview(bytes(1024)))
        assert told == []
        await device.pwrite(1024, memoryview(bytes(512)))
        await device.pwrite(2048, memoryview(bytes(512)))
        expected = BlockWriteThreshold(node_name="disk", amount_exceeded=512, write_threshold=1024)
        assert told == [expected]
        await device.close()

    asyncio.run(go())


def test_the_graph_shows_devices_and_nodes() -> None:
    async def go() -> None:
        daemon = Daemon()
        disk = MemoryNode(4096)
        daemon.graph.add(disk)
        daemon.devices["d"] = Device(daemon.graph, disk, name="d")
        shown = x_debug_query_block_graph(daemon)
        assert [(node.id, node.type, node.name) for node in shown.nodes] == [
            (2, "block-driver", "disk"),
            (1, "block-backend", "d"),
        ]
        [edge] = shown.edges
        assert (edge.parent, edge.child, edge.name) == (1, 2, "root")
        assert edge.perm == ["consistent-read"]
        assert edge.shared_perm == ["write-unchanged", "write", "consistent-read"]
        await daemon.shutdown()

    asyncio.run(go())
