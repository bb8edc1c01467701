# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""throttle: what counts as what, what waits, and that nothing waits in a drained section."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.leaky_bucket import BucketConfig, BucketName, ThrottleConfig
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import Discard
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.throttle import ThrottleOptions
from nbdjobs.nodes.throttle_group import ThrottleGroup
from nbdjobs.protocol.export import FileRange
from tests.jobs.rig import ManualClock
from tests.nodes.faults import MemoryNode, Op

SIZE = 64 * 1024


class Rig:
    """Two throttle nodes of one group, over one disk each, with time by hand."""

    def __init__(self, **limits: int):
        self.clock = ManualClock()
        buckets = {
            BucketName(name.replace("_", "-")): BucketConfig(n) for name, n in limits.items()
        }
        self.group = ThrottleGroup(ThrottleConfig(buckets), self.clock)
        self.graph = Graph()
        self.graph.throttle_groups["limits"] = self.group
        self.disk = MemoryNode(SIZE, name="disk")
        self.graph.add(self.disk)

    async def open(self, name: str = "throttled", disk: str = "disk") -> Node:
        options = ThrottleOptions(
            driver="throttle",
            node_name=name,
            throttle_group="limits",
            discard=Discard.UNMAP,
            file=disk,
        )
        return await open_node(self.graph, options)


Scenario = Callable[[Rig, Node], Awaitable[None]]


def run(scenario: Scenario, **limits: int) -> None:
    async def go() -> None:
        rig = Rig(**limits)
        await scenario(rig, await rig.open())

    asyncio.run(go())


def begin(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    return asyncio.get_running_loop().create_task(coroutine)


async def settle() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


def buffer(length: int = 512) -> memoryview:
    return memoryview(bytearray(length))


READS: dict[str, Callable[[Node], Coroutine[Any, Any, None]]] = {
    "read": lambda node: node.pread(0, buffer()),
    "cache": lambda node: node.cache(0, 512),
}
WRITES: dict[str, Callable[[Node], Coroutine[Any, Any, None]]] = {
    "write": lambda node: node.pwrite(0, buffer()),
    "write zeroes": lambda node: node.pwrite_zeroes(0, 512),
    "discard": lambda node: node.pdiscard(0, 512),
}


async def pause_after(rig: Rig, node: Node, request: str) -> bool:
    """Whether the second request of a kind has to wait, and does begin once it may."""
    operation = (READS | WRITES)[request]
    await operation(node)
    second = begin(operation(node))
    await settle()
    if second.done():
        return False
    rig.clock.advance(0.85)
    await settle()
    assert not second.done()
    rig.clock.advance(0.1)
    await settle()
    assert second.done()
    return True


@pytest.mark.parametrize("request_", [*READS, *WRITES])
@pytest.mark.parametrize("limited", ["reads", "writes"])
def test_requests_count_as_reads_or_writes(request_: str, limited: str) -> None:
    async def scenario(rig: Rig, node: Node) -> None:
        waits = await pause_after(rig, node, request_)
        assert waits == (request_ in (READS if limited == "reads" else WRITES))

    if limited == "reads":
        run(scenario, bps_read=512)
    else:
        run(scenario, bps_write=512)


def test_flushes_and_block_status_are_free() -> None:
    async def scenario(rig: Rig, node: Node) -> None:
        await node.pwrite(0, buffer())
        await node.pread(0, buffer())
        await node.flush()
        await node.block_status(0, SIZE)
        assert rig.disk.counts[Op.FLUSH] == rig.disk.counts[Op.STATUS] == 1

    run(scenario, iops_read=1, iops_write=1)


def test_content_passes_unchanged() -> None:
    async def scenario(rig: Rig, node: Node) -> None:
        await node.pwrite(512, memoryview(b"x" * 512), fua=True)
        await node.pwrite(1024, memoryview(b"y" * 512))
        await node.pwrite_zeroes(2048, 512)
        found = buffer(2048)
        await node.pread(0, found)
        assert bytes(found) == bytes(512) + b"x" * 512 + b"y" * 512 + bytes(512)
        assert rig.disk.stable[512:1536] == b"x" * 512 + bytes(512)

    run(scenario)


def test_a_read_that_waited_reads_what_is_there_then() -> None:
    async def scenario(rig: Rig, node: Node) -> None:
        await node.pread(0, buffer())
        found = buffer()
        waiting = begin(node.pread(0, found))
        await settle()
        rig.disk.content[:512] = b"z" * 512
        rig.clock.advance(2)
        await waiting
        assert bytes(found) == b"z" * 512

    run(scenario, iops_total=1)


class InstantDisk(MemoryNode):
    """A disk that answers every read on the spot."""

    def pread_now(self, offset: int, buffer: memoryview, data_only: bool) -> bool:
        buffer[:] = self.content[offset : offset + len(buffer)]
        return True


def test_a_read_on_the_spot_counts_and_is_refused_when_it_would_have_to_wait() -> None:
    async def go() -> None:
        rig = Rig(iops_total=1)
        rig.graph.add(InstantDisk(SIZE, name="instant"))
        node = await rig.open(disk="instant")
        assert node.pread_now(0, buffer(), False)
        assert not node.pread_now(0, buffer(), False)
        rig.clock.advance(1)
        assert node.pread_now(0, buffer(), False)

    asyncio.run(go())


class StoredDisk(MemoryNode):
    """A disk whose content is all in one file."""

    def stored_at(self, offset: int, length: int, data_only: bool) -> FileRange | None:
        return FileRange(0, offset, length)


def test_what_is_sent_without_being_read_counts_all_the_same() -> None:
    async def go() -> None:
        rig = Rig(iops_total=1)
        rig.graph.add(StoredDisk(SIZE, name="stored"))
        node = await rig.open(disk="stored")
        assert node.stored_at(0, 512, False)
        assert not node.stored_at(0, 512, False)
        rig.clock.advance(1)
        assert node.stored_at(0, 512, False)

    asyncio.run(go())


def test_a_read_that_the_child_cannot_do_on_the_spot_does_not_count() -> None:
    async def scenario(rig: Rig, node: Node) -> None:
        assert not node.pread_now(0, buffer(), False)
        await node.pread(0, buffer())

    run(scenario, iops_total=1)


def test_nodes_of_a_group_share_its_limits() -> None:
    async def scenario(rig: Rig, node: Node) -> None:
        rig.graph.add(MemoryNode(SIZE, name="disk2"))
        other = await rig.open("other", "disk2")
        await node.pread(0, buffer())
        waiting = begin(other.pread(0, buffer()))
        await settle()
        assert not waiting.done()
        rig.clock.advance(1)
        await waiting

    run(scenario, iops_total=1)


def test_storage_does_not_copy_past_the_limits_by_itself() -> None:
    async def scenario(rig: Rig, node: Node) -> None:
        source = MemoryNode(SIZE, name="source", can_copy=True)
        for from_, to in [(node, source), (source, node)]:
            with pytest.raises(NodeError):
                await from_.copy_range(0, to, 0, 512)

    run(scenario, iops_total=1)


def test_a_cancelled_request_leaves_nothing_behind() -> None:
    async def scenario(rig: Rig, node: Node) -> None:
        await node.pwrite(0, buffer())
        waiting = begin(node.pwrite(0, memoryview(b"x" * 512)))
        await settle()
        waiting.cancel()
        await settle()
        assert not rig.clock.pending
        rig.clock.advance(10)
        assert rig.disk.counts[Op.WRITE] == 1

    run(scenario, iops_total=1)


def test_a_drained_section_does_not_wait_for_limits() -> None:
    """They hold again afterwards, and what went through meanwhile has counted."""

    async def scenario(rig: Rig, node: Node) -> None:
        device = Device(rig.graph, node, needed=Permission.WRITE | Permission.CONSISTENT_READ)
        writes = [begin(device.pwrite(0, buffer())) for _ in range(3)]
        await settle()
        assert [write.done() for write in writes] == [True, False, False]
        async with rig.graph.drained(rig.disk):
            assert all(write.done() for write in writes)
            late = begin(device.pwrite(0, buffer()))
        await settle()
        rig.clock.advance(2.8)
        await settle()
        assert not late.done()
        rig.clock.advance(0.2)
        await late

    run(scenario, iops_total=1)


def test_closing_a_device_does_not_wait_for_limits() -> None:
    async def scenario(rig: Rig, node: Node) -> None:
        device = Device(rig.graph, node, needed=Permission.WRITE | Permission.CONSISTENT_READ)
        writes = [begin(device.pwrite(0, buffer())) for _ in range(3)]
        await settle()
        await device.close()
        await settle()
        assert all(write.done() for write in writes)
        assert rig.disk.counts[Op.WRITE] == 3

    run(scenario, iops_total=1)


def test_closing_an_idle_device_does_not_hurry_others() -> None:
    async def scenario(rig: Rig, node: Node) -> None:
        await node.pread(0, buffer())
        waiting = begin(node.pread(0, buffer()))
        await settle()
        await Device(rig.graph, node).close()
        await settle()
        assert not waiting.done()
        rig.clock.advance(1)
        await waiting

    run(scenario, iops_total=1)


def test_the_filter_shows_what_is_below_it() -> None:
    async def scenario(rig: Rig, node: Node) -> None:
        assert node.size == SIZE
        assert node.filtered is rig.disk
        assert node.allocated_size == rig.disk.allocated_size
        assert node.content_options == {
            "driver": "throttle",
            "throttle-group": "limits",
            "file": {"driver": "memory"},
        }
        assert node.filename.startswith("json:")

    run(scenario)


def test_a_closed_node_is_no_member_any_more() -> None:
    async def scenario(rig: Rig, node: Node) -> None:
        assert rig.group.is_used
        await rig.graph.drop(node)
        assert not rig.group.is_used

    run(scenario)


def test_the_group_has_to_exist() -> None:
    async def go() -> None:
        rig = Rig()
        del rig.graph.throttle_groups["limits"]
        with pytest.raises(CommandError) as caught:
            await rig.open()
        assert caught.value.description == "Throttle group 'limits' does not exist"
        assert list(rig.graph.nodes) == ["disk"]
        assert not rig.disk.parents

    asyncio.run(go())
