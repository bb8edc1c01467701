# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Break points of blkdebug: what they hold, until when, and who waits meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest

from nbdjobs.nodes.blkdebug import BlkdebugNode, BlkdebugOptions
from nbdjobs.nodes.breakpoints import BreakPoints
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.events import DebugEvent
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.raw import RawOptions
from tests.jobs.rig import turns
from tests.nodes.faults import MemoryNode, Op

ALIGNMENT = 4096
GUEST = Permission.CONSISTENT_READ | Permission.WRITE


@dataclass
class Stack:
    """A device on a raw node on blkdebug on a disk in memory."""

    graph: Graph
    disk: MemoryNode
    debug: BlkdebugNode
    device: Device

    @property
    def points(self) -> BreakPoints:
        return self.debug.break_points

    def write(self, offset: int = 0, byte: bytes = b"x", length: int = 512) -> asyncio.Task[None]:
        return asyncio.create_task(self.device.pwrite(offset, memoryview(byte * length)))


def with_stack(scenario: Callable[[Stack], Awaitable[None]], align: int = 0) -> None:
    async def run() -> None:
        graph, disk = Graph(), MemoryNode(64 * 1024)
        graph.add(disk)
        options = BlkdebugOptions(driver="blkdebug", node_name="b", image="disk", align=align)
        top = await open_node(graph, RawOptions(driver="raw", node_name="top", file=options))
        debug = graph.find("b")
        assert isinstance(debug, BlkdebugNode)
        await scenario(Stack(graph, disk, debug, Device(graph, top, needed=GUEST)))
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


Request = Callable[[Device], Coroutine[Any, Any, None]]
REQUESTS: dict[DebugEvent, tuple[Request, Op, int]] = {
    DebugEvent.READ_AIO: (lambda d: d.pread(0, memoryview(bytearray(512))), Op.READ, 0),
    DebugEvent.WRITE_AIO: (lambda d: d.pwrite(0, memoryview(b"x" * 512)), Op.WRITE, 0),
    DebugEvent.PWRITEV: (lambda d: d.pwrite(0, memoryview(b"x" * 512)), Op.WRITE, 0),
    DebugEvent.PWRITEV_ZERO: (lambda d: d.pwrite_zeroes(0, 512), Op.ZERO, 0),
    DebugEvent.PWRITEV_DONE: (lambda d: d.pwrite(0, memoryview(b"x" * 512)), Op.WRITE, 1),
    DebugEvent.FLUSH_TO_OS: (lambda d: d.flush(), Op.FLUSH, 0),
    DebugEvent.FLUSH_TO_DISK: (lambda d: d.flush(), Op.FLUSH, 0),
}


@pytest.mark.parametrize("event", REQUESTS)
def test_a_request_stays_where_the_event_is_until_it_is_resumed(event: DebugEvent) -> None:
    request, op, done_while_held = REQUESTS[event]

    async def scenario(stack: Stack) -> None:
        stack.points.add(event, "A")
        task = asyncio.create_task(request(stack.device))
        await stack.points.reached("A")
        await turns()
        assert not task.done()
        assert stack.device.in_flight == 1
        assert stack.disk.counts[op] == done_while_held
        assert stack.points.resume("A")
        await task
        assert stack.disk.counts[op] == 1
        await request(stack.device)  # the break point was used up

    with_stack(scenario)


@pytest.mark.parametrize(
    ("event", "offset", "length", "reads"),
    [
        (DebugEvent.PWRITEV_RMW_HEAD, 512, ALIGNMENT - 512, 0),
        (DebugEvent.PWRITEV_RMW_AFTER_HEAD, 512, ALIGNMENT - 512, 1),
        (DebugEvent.PWRITEV_RMW_TAIL, 0, 512, 0),
        (DebugEvent.PWRITEV_RMW_AFTER_TAIL, 0, 512, 1),
    ],
)
def test_a_read_modify_write_is_held_with_others_of_its_blocks_waiting(
    event: DebugEvent, offset: int, length: int, reads: int
) -> None:
    async def scenario(stack: Stack) -> None:
        stack.points.add(event, "A")
        ragged = stack.write(offset, b"a", length)
        await stack.points.reached("A")
        assert stack.disk.counts[Op.READ] == reads
        same_block, next_block = stack.write(0, b"b", ALIGNMENT), stack.write(ALIGNMENT, b"c")
        await next_block
        await turns()
        assert not same_block.done()
        assert stack.disk.content[:ALIGNMENT] == bytes(ALIGNMENT)
        stack.points.resume("A")
        await asyncio.gather(ragged, same_block)
        assert stack.disk.content[:ALIGNMENT] == b"b" * ALIGNMENT

    with_stack(scenario, align=ALIGNMENT)


def test_a_request_that_meets_two_break_points_has_to_be_resumed_for_both() -> None:
    async def scenario(stack: Stack) -> None:
        stack.points.add(DebugEvent.PWRITEV, "A")
        stack.points.add(DebugEvent.PWRITEV, "B")
        write = stack.write()
        await stack.points.reached("A")
        assert stack.points.is_holding("B")
        assert stack.points.resume("A")
        await turns()
        assert not write.done()
        assert stack.points.resume("B")
        await write

    with_stack(scenario)


def test_of_two_requests_under_a_tag_the_last_one_is_resumed_first() -> None:
    async def scenario(stack: Stack) -> None:
        stack.points.add(DebugEvent.PWRITEV, "A")
        first = stack.write(0)
        await stack.points.reached("A")
        stack.points.add(DebugEvent.PWRITEV, "A")
        second = stack.write(512)
        await turns()
        assert stack.points.resume("A")
        await second
        assert not first.done()
        assert stack.points.resume("A")
        await first
        assert not stack.points.resume("A")

    with_stack(scenario)


def test_removing_forgets_break_points_and_lets_go_what_they_hold() -> None:
    async def scenario(stack: Stack) -> None:
        for event in (DebugEvent.PWRITEV, DebugEvent.READ_AIO, DebugEvent.FLUSH_TO_OS):
            stack.points.add(event, "A")
        write = stack.write()
        await stack.points.reached("A")
        assert stack.points.remove("A")
        await write
        await stack.device.pread(0, memoryview(bytearray(512)))
        await stack.device.flush()
        assert not stack.points.remove("A")

    with_stack(scenario)


def test_a_cancelled_request_is_held_no_more() -> None:
    async def scenario(stack: Stack) -> None:
        stack.points.add(DebugEvent.PWRITEV, "A")
        write = stack.write()
        await stack.points.reached("A")
        write.cancel()
        await asyncio.gather(write, return_exceptions=True)
        assert not stack.points.is_holding("A")
        assert not stack.points.resume("A")
        assert stack.device.in_flight == 0

    with_stack(scenario)


def test_who_waits_for_a_request_is_woken_by_the_one_it_waits_for_or_cancelled() -> None:
    async def scenario(stack: Stack) -> None:
        waiting = [asyncio.create_task(stack.points.reached(tag)) for tag in ("A", "B", "B")]
        stack.points.add(DebugEvent.PWRITEV, "A")
        write = stack.write()
        await waiting[0]
        await turns()
        assert not waiting[1].done()
        waiting[1].cancel()
        await asyncio.gather(waiting[1], return_exceptions=True)
        stack.points.add(DebugEvent.READ_AIO, "B")
        read = asyncio.create_task(stack.device.pread(0, memoryview(bytearray(512))))
        await waiting[2]
        for tag in ("A", "B"):
            stack.points.resume(tag)
        await asyncio.gather(write, read)

    with_stack(scenario)


@pytest.mark.parametrize("end", ["remove", "shutdown"])
def test_who_waits_for_a_tag_gives_up_when_it_is_removed(end: str) -> None:
    async def scenario(stack: Stack) -> None:
        waiting = [asyncio.create_task(stack.points.reached(tag)) for tag in ("A", "B")]
        await turns()
        if end == "remove":
            assert not stack.points.remove("A")
            assert not await waiting[0]
            await turns()
            assert not waiting[1].done()
            stack.points.remove("B")
        else:
            stack.debug.begin_shutdown()
            assert not await waiting[0]
            assert not await stack.points.reached("A")
        assert not await waiting[1]

    with_stack(scenario)


def test_a_drained_section_waits_for_what_is_held() -> None:
    async def scenario(stack: Stack) -> None:
        stack.points.add(DebugEvent.PWRITEV, "A")
        write = stack.write()
        await stack.points.reached("A")

        async def drain() -> None:
            async with stack.graph.drained(stack.disk):
                assert write.done()

        drained = asyncio.create_task(drain())
        await turns()
        assert not drained.done()
        stack.points.resume("A")
        await drained

    with_stack(scenario)


def test_closing_a_device_waits_for_what_is_held() -> None:
    async def scenario(stack: Stack) -> None:
        stack.points.add(DebugEvent.PWRITEV, "A")
        write = stack.write()
        await stack.points.reached("A")
        closing = asyncio.create_task(stack.device.close())
        await turns()
        assert not closing.done()
        stack.points.resume("A")
        await asyncio.gather(write, closing)

    with_stack(scenario)


def test_nothing_is_held_once_the_daemon_ends() -> None:
    async def scenario(stack: Stack) -> None:
        stack.points.add(DebugEvent.PWRITEV, "A")
        stack.points.add(DebugEvent.READ_AIO, "B")
        write = stack.write()
        await stack.points.reached("A")
        stack.debug.begin_shutdown()
        await write
        stack.points.add(DebugEvent.PWRITEV, "A")
        await stack.write()
        await stack.device.pread(0, memoryview(bytearray(512)))

    with_stack(scenario)
