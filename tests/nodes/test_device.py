# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Devices: bounds, holding requests back, closing, accounts."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs import eager
from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.accounting import Account
from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.status import DATA, BlockStatus
from tests.nodes.faults import MemoryNode, Op
from tests.nodes.graphs import Storage, make_graph

SIZE = 4096
WRITER = Permission.CONSISTENT_READ | Permission.WRITE

Request = Callable[[Device, int, int], Coroutine[Any, Any, object]]
RANGES: dict[str, Request] = {
    "read": lambda device, offset, length: device.pread(offset, memoryview(bytearray(length))),
    "write": lambda device, offset, length: device.pwrite(offset, memoryview(b"x" * length)),
    "zeroes": lambda device, offset, length: device.pwrite_zeroes(offset, length),
    "discard": lambda device, offset, length: device.pdiscard(offset, length),
    "cache": lambda device, offset, length: device.cache(offset, length),
    "status": lambda device, offset, length: device.block_status(offset, length),
}
ALL: dict[str, Request] = {**RANGES, "flush": lambda device, offset, length: device.flush()}


def account_of(device: Device, kind: str) -> Account | None:
    accounts = device.accounting
    return {
        "read": accounts.read,
        "write": accounts.write,
        "zeroes": accounts.write,
        "discard": accounts.unmap,
        "flush": accounts.flush,
    }.get(kind)


def make_device(size: int = SIZE) -> tuple[Graph, MemoryNode, Device]:
    disk = MemoryNode(size)
    graph = make_graph(disk)
    return graph, disk, Device(graph, disk, needed=WRITER)


def write(device: Device, offset: int = 0, byte: bytes = b"x") -> asyncio.Task[None]:
    return asyncio.create_task(device.pwrite(offset, memoryview(byte * 512)))


async def let_all_run() -> None:
    """Give every task that can run the chance to do so."""
    for _ in range(20):
        await asyncio.sleep(0)


# Bounds


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 1), (-512, 4096), (SIZE, 1), (SIZE - 511, 512), (2**64, 1)]
)
def test_a_request_beyond_the_disk_never_reaches_it(kind: str, offset: int, length: int) -> None:
    _, disk, device = make_device()
    with pytest.raises(NodeError) as failure:
        asyncio.run(_await(RANGES[kind](device, offset, length)))
    assert failure.value.errno == errno.EIO
    assert failure.value.offset == offset
    assert not disk.requests
    assert device.in_flight == 0
    account = account_of(device, kind)
    if account is not None:
        assert account == Account(invalid=1)


@pytest.mark.parametrize("kind", ["zeroes", "discard", "cache", "status"])
def test_a_negative_length_is_beyond_the_disk(kind: str) -> None:
    _, disk, device = make_device()
    with pytest.raises(NodeError, match="beyond the end"):
        asyncio.run(_await(RANGES[kind](device, 512, -1)))
    assert not disk.requests


@pytest.mark.parametrize("kind", ["read", "write", "zeroes", "discard"])
def test_requests_up_to_the_last_byte_are_fine_and_so_are_empty_ones_there(kind: str) -> None:
    _, _, device = make_device()
    asyncio.run(_await(RANGES[kind](device, SIZE - 1, 1)))
    asyncio.run(_await(RANGES[kind](device, SIZE, 0)))


def test_bounds_are_those_of_the_disk_when_the_request_is_let_in() -> None:
    async def scenario() -> None:
        _, disk, device = make_device()
        device.hold()
        late = write(device, SIZE)
        await let_all_run()
        disk.content.extend(bytes(512))
        device.release()
        await late
        assert device.size == SIZE + 512
        assert device.accounting.highest_offset_written == SIZE + 512

    asyncio.run(scenario())


async def _await(request: Coroutine[Any, Any, object]) -> object:
    return await request


# What reaches the disk


def test_each_request_reaches_the_disk_and_is_accounted_for() -> None:
    async def scenario() -> None:
        _, disk, device = make_device()
        await device.pwrite(512, memoryview(b"a" * 1024), fua=True)
        await device.pwrite_zeroes(0, 1024, fua=True)
        await device.pdiscard(2048, 1024, fua=True)
        await device.flush()
        await device.cache(0, 512)
        buffer = bytearray(1024)
        await device.pread(1024, memoryview(buffer))
        assert buffer == b"a" * 512 + bytes(512)
        assert disk.stable == disk.content
        assert await device.block_status(4000, 96) == BlockStatus(96, DATA)
        assert not device.is_known_data(0, 512)
        accounts = device.accounting
        assert (accounts.write.operations, accounts.write.length) == (2, 2048)
        assert (accounts.read.operations, accounts.read.length) == (1, 1024)
        assert (accounts.unmap.operations, accounts.unmap.length) == (1, 1024)
        assert accounts.flush.operations == 1
        assert accounts.highest_offset_written == 1536
        for account in (accounts.read, accounts.write, accounts.unmap, accounts.flush):
            assert account.total_time_s > 0
            assert account.failed == account.invalid == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "cache"])
def test_a_failed_request_is_accounted_as_failed_and_not_as_done(kind: str) -> None:
    async def scenario() -> None:
        _, disk, device = make_device()
        disk.fail(None, errno.ENOSPC)
        with pytest.raises(NodeError) as failure:
            await ALL[kind](device, 0, 512)
        assert failure.value.errno == errno.ENOSPC
        assert device.in_flight == 0
        account = account_of(device, kind)
        if account is not None:
            assert (account.failed, account.operations, account.length) == (1, 0, 0)
        assert device.accounting.highest_offset_written == 0
        await ALL[kind](device, 0, 512)

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "cache"])
def test_a_cancelled_request_is_neither_done_nor_failed(kind: str) -> None:
    async def scenario() -> None:
        _, disk, device = make_device()
        async with disk.hold() as gate:
            request = asyncio.create_task(ALL[kind](device, 0, 512))
            await gate.reached()
            assert device.in_flight == 1
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
        assert device.in_flight == 0
        account = account_of(device, kind)
        assert account is None or account == Account()
        await device.idle()

    asyncio.run(scenario())


def test_time_is_told_in_nanoseconds() -> None:
    assert Account(total_time_s=1.5).total_time_ns == 1_500_000_000


# Holding requests back


@pytest.mark.parametrize("kind", ALL)
def test_a_held_device_lets_nothing_through_until_the_last_release(kind: str) -> None:
    async def scenario() -> None:
        _, disk, device = make_device()
        device.hold()
        device.hold()
        request = asyncio.create_task(ALL[kind](device, 0, 512))
        await let_all_run()
        device.release()
        await let_all_run()
        assert not request.done()
        assert not disk.requests
        assert device.in_flight == 0
        device.release()
        await request
        assert device.in_flight == 0

    asyncio.run(scenario())


def test_held_requests_go_on_in_the_order_in_which_they_came() -> None:
    async def scenario() -> None:
        _, disk, device = make_device(64 * 512)
        device.hold()
        writes = [write(device, 512 * n) for n in range(10)]
        await let_all_run()
        writes[3].cancel()
        device.release()
        await asyncio.gather(*writes, return_exceptions=True)
        expected = [512 * n for n in range(10) if n != 3]
        assert [request.offset for request in disk.requests] == expected

    asyncio.run(scenario())


def test_hold_and_release_in_turns_neither_starve_nor_overtake() -> None:
    async def scenario() -> None:
        _, disk, device = make_device(64 * 512)
        writes: list[asyncio.Task[None]] = []
        device.hold()
        for n in range(30):
            # Started eagerly, as the server does: the request is in the queue at once.
            task = eager.start(device.pwrite(512 * n, memoryview(b"x" * 512)))
            assert task is not None
            writes.append(task)
            device.release()
            device.hold()
        assert device.in_flight == 30
        await device.idle()
        assert [request.offset for request in disk.requests] == [512 * n for n in range(30)]
        device.release()
        await asyncio.gather(*writes)

    asyncio.run(scenario())


def test_cancelling_a_held_request_before_and_after_its_release_leaves_no_trace() -> None:
    async def scenario() -> None:
        _, disk, device = make_device()
        device.hold()
        before, after = write(device), write(device)
        await let_all_run()
        before.cancel()
        device.release()
        after.cancel()
        device.hold()
        await device.idle()
        assert before.cancelled()
        assert after.cancelled()
        assert device.in_flight == 0
        assert not disk.requests
        device.release()
        await write(device)

    asyncio.run(scenario())


def test_idle_waits_for_every_request_and_wakes_everyone() -> None:
    async def scenario() -> None:
        _, disk, device = make_device()
        first, second = disk.hold(offset=0, length=512), disk.hold(offset=512, length=512)
        writes = [write(device), write(device, 512)]
        await first.reached()
        await second.reached()
        waiters = [asyncio.create_task(device.idle()) for _ in range(3)]
        first.release()
        await writes[0]
        await let_all_run()
        assert not any(waiter.done() for waiter in waiters)
        waiters.pop().cancel()
        second.release()
        await asyncio.gather(*waiters, writes[1])
        await device.idle()

    asyncio.run(scenario())


@given(st.integers(0, 2**32))
def test_under_random_holds_cancels_and_failures_nothing_is_lost(seed: int) -> None:
    async def scenario() -> None:
        chance = random.Random(seed)
        _, disk, device = make_device(64 * 512)
        disk.fail(None, nth=3, times=2)
        tasks: list[asyncio.Task[object]] = []
        holds = 0
        for _ in range(60):
            match chance.choice(["request", "request", "hold", "release", "cancel", "run", "idle"]):
                case "request":
                    kind = chance.choice(list(ALL))
                    offset = chance.randrange(63) * 512
                    tasks.append(asyncio.create_task(ALL[kind](device, offset, 512)))
                case "hold":
                    device.hold()
                    holds += 1
                case "release" if holds:
                    device.release()
                    holds -= 1
                case "cancel" if tasks:
                    chance.choice(tasks).cancel()
                case "run":
                    await asyncio.sleep(0)
                case "idle":
                    device.hold()
                    await device.idle()
                    assert disk.in_flight == 0
                    device.release()
        for _ in range(holds):
            device.release()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert device.in_flight == 0
        assert not device._held_back
        assert not device._awaiting_idle
        done = sum(not isinstance(result, BaseException) for result in results)
        accounts = device.accounting
        counted = (accounts.read, accounts.write, accounts.unmap, accounts.flush)
        assert sum(account.operations for account in counted) <= done
        assert sum(account.failed for account in counted) <= 2

    asyncio.run(scenario())


# Closing


def test_closing_waits_for_requests_in_flight_and_lets_go_of_the_node() -> None:
    async def scenario() -> None:
        graph, disk, device = make_device()
        gate = disk.hold()
        request = write(device)
        await gate.reached()
        close = asyncio.create_task(device.close())
        await let_all_run()
        assert not close.done()
        assert disk.parents == [device.edge]
        gate.release()
        await close
        await request
        assert not disk.parents
        assert disk.was_closed
        assert not graph.nodes

    asyncio.run(scenario())


def test_closing_leaves_a_node_that_the_user_added() -> None:
    async def scenario() -> None:
        graph, disk, device = make_device()
        disk.is_owned_by_user = True
        await device.close()
        assert not disk.was_closed
        assert graph.find("disk") is disk
        await Device(graph, disk).close()

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", ALL)
def test_requests_that_a_closed_device_held_back_fail_and_so_do_later_ones(kind: str) -> None:
    async def scenario() -> None:
        _, disk, device = make_device()
        device.hold()
        held = [asyncio.create_task(ALL[kind](device, 0, 512)) for _ in range(3)]
        await let_all_run()
        await device.close()
        held[1].cancel()  # when it is woken already
        late = asyncio.create_task(ALL[kind](device, 0, 512))
        device.release()
        results = await asyncio.gather(*held, late, return_exceptions=True)
        assert isinstance(results.pop(1), asyncio.CancelledError)
        for error in results:
            assert isinstance(error, NodeError)
            assert error.errno == errno.ENOMEDIUM
        assert not disk.requests
        assert device.in_flight == 0

    asyncio.run(scenario())


def test_cancelling_a_close_leaves_the_device_open() -> None:
    async def scenario() -> None:
        _, disk, device = make_device()
        gate = disk.hold(offset=0, length=512)
        stuck = write(device)
        await gate.reached()
        close = asyncio.create_task(device.close())
        await let_all_run()
        held = write(device, 512)
        await let_all_run()
        assert not held.done()
        close.cancel()
        with pytest.raises(asyncio.CancelledError):
            await close
        await held
        gate.release()
        await stuck
        assert disk.parents == [device.edge]

    asyncio.run(scenario())


def test_closing_twice_at_once_closes_once() -> None:
    async def scenario() -> None:
        graph, disk, device = make_device()
        gate = disk.hold()
        request = write(device)
        await gate.reached()
        closes = [asyncio.create_task(device.close()) for _ in range(2)]
        await let_all_run()
        gate.release()
        await asyncio.gather(*closes, request)
        await device.close()
        assert not graph.nodes

    asyncio.run(scenario())


def test_a_device_closed_inside_a_drained_section_stays_closed_after_it() -> None:
    async def scenario() -> None:
        graph, disk, device = make_device()
        disk.is_owned_by_user = True
        async with graph.drained(disk):
            held = write(device)
            await let_all_run()
            await device.close()
        with pytest.raises(NodeError, match="No medium found"):
            await held
        with pytest.raises(NodeError, match="No medium found"):
            await device.flush()

    asyncio.run(scenario())


def test_a_drained_section_waiting_for_a_device_that_is_closed_begins() -> None:
    async def scenario() -> None:
        graph, disk, device = make_device()
        disk.is_owned_by_user = True
        gate = disk.hold()
        request = write(device)
        await gate.reached()

        async def drain() -> None:
            async with graph.drained(disk):
                assert disk.in_flight == 0

        section = asyncio.create_task(drain())
        close = asyncio.create_task(device.close())
        await let_all_run()
        gate.release()
        await asyncio.gather(section, close, request)
        assert not disk.parents

    asyncio.run(scenario())


def test_a_device_that_is_refused_leaves_nothing_behind() -> None:
    disk = Storage("disk", is_read_only=True)
    graph = make_graph(disk)
    with pytest.raises(CommandError, match="Block node is read-only"):
        Device(graph, disk, needed=WRITER)
    assert not disk.parents


def test_requests_go_to_the_node_that_is_below_when_they_are_let_in() -> None:
    async def scenario() -> None:
        old = MemoryNode(SIZE, name="old", config=NodeConfig())
        new = MemoryNode(SIZE, name="new", config=NodeConfig())
        graph = make_graph(old, new)
        device = Device(graph, old, needed=WRITER)
        async with graph.drained(old):
            request = write(device)
            await let_all_run()
            graph.replace(old, new)
        await request
        assert device.node is new
        assert (old.counts[Op.WRITE], new.counts[Op.WRITE]) == (0, 1)

    asyncio.run(scenario())
