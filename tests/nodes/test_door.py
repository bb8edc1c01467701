# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The door of a device: stopping, limits, turning away, and what remains of those who give up."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdjobs.errors import NodeError
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.permissions import ALL, Permission
from nbdjobs.nodes.throttle_group import ThrottleGroup
from tests.jobs.rig import ManualClock
from tests.nodes.faults import MemoryNode, Op
from tests.nodes.graphs import make_graph
from tests.nodes.test_throttle_group import limited

WRITER = Permission.CONSISTENT_READ | Permission.WRITE
KIB = 1024


class Rig:
    """Devices on one disk, a throttle group with time by hand, and requests."""

    def __init__(self, *, devices: int = 1, **limits: int):
        self.clock = ManualClock()
        self.group = ThrottleGroup(limited(**limits), self.clock)
        self.disk = MemoryNode(1024 * KIB)
        self.graph: Graph = make_graph(self.disk)
        self.devices = [
            Device(self.graph, self.disk, needed=WRITER, shared=ALL) for _ in range(devices)
        ]
        self.device = self.devices[0]
        self.done: list[int] = []

    def write(self, number: int, *, device: int = 0, length: int = 512) -> asyncio.Task[None]:
        return asyncio.create_task(self._write(number, self.devices[device], length))

    async def _write(self, number: int, device: Device, length: int) -> None:
        await device.pwrite(number * 512, memoryview(b"w" * length))
        self.done.append(number)

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        await self.settle()


def run(scenario: Callable[[Rig], Awaitable[None]], *, devices: int = 1, **limits: int) -> None:
    async def main() -> None:
        await scenario(Rig(devices=devices, **limits))

    asyncio.run(main())


async def no_medium(request: Awaitable[None]) -> None:
    with pytest.raises(NodeError) as failure:
        await request
    assert failure.value.errno == errno.ENOMEDIUM


# Stopping


def test_stopping_twice_is_stopping_once_and_requests_keep_their_order() -> None:
    async def scenario(rig: Rig) -> None:
        rig.device.stop()
        rig.device.stop()
        for number in range(5):
            rig.write(number)
        await rig.settle()
        assert rig.done == []
        assert rig.device.in_flight == 0
        assert not rig.device.pread_now(0, memoryview(bytearray(512)), data_only=False)
        assert rig.device.stored_at(0, 512, data_only=False) is None
        rig.device.cont()
        rig.device.cont()
        await rig.settle()
        assert rig.done == [0, 1, 2, 3, 4]
        await rig.write(5)

    run(scenario)


def test_a_drained_section_does_not_continue_a_stopped_device() -> None:
    async def scenario(rig: Rig) -> None:
        rig.device.stop()
        async with rig.graph.drained(rig.disk):
            late = rig.write(0)
            await rig.settle()
        await rig.settle()
        assert not late.done()
        rig.device.cont()
        await late

    run(scenario)


def test_settling_waits_for_what_is_in_flight_and_flushes_it() -> None:
    async def scenario(rig: Rig) -> None:
        async with rig.disk.hold(Op.WRITE) as gate:
            first = rig.write(0)
            await gate.reached()
            rig.device.stop()
            settling = asyncio.create_task(rig.device.settle())
            await rig.settle()
            assert not settling.done()
        await settling
        await first
        assert rig.disk.stable[:512] == b"w" * 512
        assert rig.device.accounting.flush.operations == 0

    run(scenario)


def test_a_failed_flush_is_told_by_settling_and_leaves_nothing_in_flight() -> None:
    async def scenario(rig: Rig) -> None:
        rig.device.stop()
        rig.disk.fail(Op.FLUSH)
        with pytest.raises(NodeError):
            await rig.device.settle()
        assert rig.device.in_flight == 0

    run(scenario)


def test_settling_a_device_that_is_closed_meanwhile_touches_no_node() -> None:
    async def scenario(rig: Rig) -> None:
        async with rig.disk.hold(Op.WRITE) as gate:
            rig.write(0)
            await gate.reached()
            rig.device.stop()
            closing = asyncio.create_task(rig.device.close())
            await rig.settle()
            settling = asyncio.create_task(rig.device.settle())
            await rig.settle()
        await asyncio.gather(closing, settling)
        assert rig.disk.counts[Op.FLUSH] == 0

    run(scenario)


def test_what_is_turned_away_fails_and_so_does_all_that_comes_later() -> None:
    async def scenario(rig: Rig) -> None:
        rig.device.stop()
        held = rig.write(0)
        await rig.settle()
        rig.device.turn_away(errno.ESHUTDOWN)
        for request in (held, rig.write(1)):
            with pytest.raises(NodeError) as failure:
                await request
            assert failure.value.errno == errno.ESHUTDOWN
        rig.device.cont()
        with pytest.raises(NodeError):
            await rig.write(2)
        assert rig.device.in_flight == 0
        assert not rig.disk.requests
        await rig.device.close()

    run(scenario)


def test_a_stopped_device_can_be_closed() -> None:
    async def scenario(rig: Rig) -> None:
        rig.device.stop()
        held = rig.write(0)
        await rig.settle()
        await rig.device.close()
        rig.device.cont()
        await no_medium(held)
        await no_medium(rig.write(1))

    run(scenario)


# Who gives up


def test_who_asks_is_told_when_all_requests_wait() -> None:
    async def scenario(rig: Rig) -> None:
        told: list[int] = []
        rig.device.when_all_wait(lambda: told.append(0))
        assert not told, "nothing is held back"
        async with rig.disk.hold() as gate:
            first = rig.write(0)
            await gate.reached()
            rig.device.stop()
            rig.device.when_all_wait(lambda: told.append(rig.device.in_flight))
            assert not told, "one is in flight"
        await first
        assert told == [0]
        rig.device.when_all_wait(lambda: told.append(1))
        assert told == [0, 1]

    run(scenario)


# Limits


def test_the_rate_is_kept_and_what_waits_is_not_in_flight() -> None:
    async def scenario(rig: Rig) -> None:
        rig.device.limit_by(rig.group)
        for number in range(1000):
            rig.write(number)
        await rig.settle()
        assert rig.device.in_flight == 0
        begun = len(rig.done)
        for _ in range(100):
            await rig.advance(0.05)
        # 5 s at 100 per second.
        assert len(rig.done) - begun == pytest.approx(500, rel=0.05)
        assert rig.done == sorted(rig.done)
        rig.device.limit_by(None)
        await rig.settle()
        assert rig.done == list(range(1000))
        assert not rig.clock.pending

    run(scenario, iops_total=100)


@pytest.mark.parametrize("length", [512, 4096, 65536])
def test_bytes_per_second_are_kept(length: int) -> None:
    async def scenario(rig: Rig) -> None:
        rig.device.limit_by(rig.group)
        requests = [rig.write(0, length=length) for _ in range(8 * 1024 * KIB // length)]
        for _ in range(40):
            await rig.advance(0.05)
        moved = len(rig.done) * length
        # 2 s at 1 MiB per second, and a tenth of a second's worth that begins at once.
        assert moved == pytest.approx(2.1 * 1024 * KIB, rel=0.05)
        rig.device.limit_by(None)
        await asyncio.gather(*requests)

    run(scenario, bps_write=1024 * KIB)


def test_reads_and_what_is_free_do_not_wait_for_a_limit_on_writes() -> None:
    async def scenario(rig: Rig) -> None:
        rig.device.limit_by(rig.group)
        writes = [rig.write(number) for number in range(5)]
        await rig.settle()
        await rig.device.pread(0, memoryview(bytearray(512)))
        await rig.device.flush()
        await rig.device.block_status(0, 512)
        await rig.device.cache(0, 512)
        for request in (rig.device.pdiscard(0, 512), rig.device.pwrite_zeroes(0, 512)):
            task = asyncio.create_task(request)
            await rig.settle()
            assert not task.done()
            task.cancel()
        rig.device.limit_by(None)
        await asyncio.gather(*writes)

    run(scenario, iops_write=1)


def test_devices_of_a_group_get_equal_shares() -> None:
    async def scenario(rig: Rig) -> None:
        for device in rig.devices:
            device.limit_by(rig.group)
        shares = [0, 0, 0]

        async def keep_busy(number: int) -> None:
            while True:
                await rig.devices[number].pwrite(0, memoryview(b"w" * 512))
                shares[number] += 1

        # The first has sixteen times as many requests waiting as the others.
        busy = [asyncio.create_task(keep_busy(0)) for _ in range(16)]
        busy += [asyncio.create_task(keep_busy(number)) for number in (1, 2)]
        await rig.advance(0.0)
        shares[:] = [0, 0, 0]  # what begins at once goes to those who come first
        for _ in range(1000):
            await rig.advance(0.002)
        for task in busy:
            task.cancel()
        assert sum(shares) == pytest.approx(300 * 2, rel=0.05)
        assert all(share == pytest.approx(sum(shares) / 3, rel=0.05) for share in shares)

    run(scenario, devices=3, iops_total=300)


def test_draining_does_not_wait_for_limits_and_the_rate_holds_across_it() -> None:
    async def scenario(rig: Rig) -> None:
        rig.device.limit_by(rig.group)
        for number in range(10):
            rig.write(number)
        await rig.settle()
        async with rig.graph.drained(rig.disk):
            assert rig.done == [0]
            await rig.advance(1.0)
            assert rig.done == [0], "its turn has come, and it is held"
        await rig.settle()
        assert rig.done == [0, 1]
        await rig.advance(1.0)
        assert rig.done == [0, 1, 2]
        rig.device.limit_by(None)

    run(scenario, iops_total=1)


def test_continuing_does_not_let_a_burst_through_a_limit() -> None:
    async def scenario(rig: Rig) -> None:
        rig.device.limit_by(rig.group)
        rig.device.stop()
        for number in range(10):
            rig.write(number)
        await rig.advance(60.0)
        rig.device.cont()
        await rig.settle()
        assert rig.done == [0]
        await rig.advance(1.0)
        assert rig.done == [0, 1]
        rig.device.limit_by(None)

    run(scenario, iops_total=1)


def test_closing_does_not_wait_for_limits_nor_burden_the_group() -> None:
    async def scenario(rig: Rig) -> None:
        for device in rig.devices:
            device.limit_by(rig.group)
        rig.write(0, device=1)
        waiting = [rig.write(number) for number in range(1, 50)]
        other = rig.write(50, device=1)
        await rig.settle()
        await rig.device.close()
        for request in waiting:
            await no_medium(request)
        await rig.advance(1.0)
        assert other.done()
        assert rig.done == [0, 50]

    run(scenario, devices=2, iops_total=1)


def test_moving_to_another_group_lets_what_waits_begin() -> None:
    async def scenario(rig: Rig) -> None:
        rig.device.limit_by(rig.group)
        for number in range(5):
            rig.write(number)
        await rig.settle()
        left: list[bool] = []
        other = ThrottleGroup(rig.group.config, rig.clock, on_unused=lambda: left.append(True))
        rig.device.limit_by(other)
        await rig.settle()
        assert rig.done == [0, 1, 2, 3, 4]
        assert rig.device.limiting_group is other
        assert not rig.group.is_used
        rig.device.limit_by(other)  # the same again: it stays in use all the time
        assert not left
        await rig.device.close()
        assert left == [True]

    run(scenario, iops_total=1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_under_random_limits_stops_and_cancels_nothing_is_lost(seed: int) -> None:
    async def scenario(rig: Rig) -> None:
        chance = random.Random(seed)
        tasks: list[asyncio.Task[None]] = []
        steps = ["request"] * 4 + ["limit", "free", "stop", "cont", "cancel", "time", "drain"]
        for number in range(80):
            match chance.choice(steps):
                case "request":
                    tasks.append(rig.write(number, length=512 * chance.randint(1, 4)))
                case "limit":
                    rig.device.limit_by(rig.group)
                case "free":
                    rig.device.limit_by(None)
                case "stop":
                    rig.device.stop()
                case "cont":
                    rig.device.cont()
                case "cancel" if tasks:
                    chance.choice(tasks).cancel()
                case "time":
                    await rig.advance(chance.random() / 5)
                case "drain":
                    async with rig.graph.drained(rig.disk):
                        assert rig.disk.in_flight == 0
        rig.device.cont()
        rig.device.limit_by(None)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert rig.device.in_flight == 0
        assert rig.device._obstacles == 0
        assert not rig.device._held_back
        assert len(rig.done) == sum(not task.cancelled() for task in tasks)
        assert not rig.clock.pending

    run(scenario, iops_total=50, bps_write=40 * KIB)
