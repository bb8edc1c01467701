# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Latency histograms: bins, and which requests of a device are counted."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.errors import NodeError
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.latency import Histogram
from nbdjobs.nodes.permissions import Permission
from tests.nodes.faults import MemoryNode, Op
from tests.nodes.graphs import make_graph

MIB = 1024 * 1024
AGES_NS = 1 << 60


@given(
    boundaries=st.lists(st.integers(1, 1000), unique=True).map(sorted),
    durations_us=st.lists(st.integers(0, 1100)),
)
def test_a_request_is_in_the_bin_whose_interval_has_its_time(
    boundaries: list[int], durations_us: list[int]
) -> None:
    histogram = Histogram([boundary * 1000 for boundary in boundaries])
    for duration in durations_us:
        histogram.count(duration / 1e6)
    edges = [0, *boundaries, 10_000]
    assert histogram.bins == [
        sum(low <= duration < high for duration in durations_us)
        for low, high in itertools.pairwise(edges)
    ]


@pytest.mark.parametrize("boundaries", [[0], [5, 5], [10, 5], [1, 2, 2]])
def test_boundaries_ascend_from_above_zero(boundaries: list[int]) -> None:
    with pytest.raises(ValueError, match="ascend"):
        Histogram(boundaries)


def observed(disk: MemoryNode) -> Device:
    """A device of which everything is counted."""
    device = Device(make_graph(disk), disk, needed=Permission.CONSISTENT_READ | Permission.WRITE)
    for account in (device.accounting.read, device.accounting.write, device.accounting.flush):
        account.histogram = Histogram([AGES_NS])
    return device


def counts(device: Device) -> tuple[int, int, int]:
    accounts = (device.accounting.read, device.accounting.write, device.accounting.flush)
    histograms = [account.histogram for account in accounts]
    read, write, flush = (0 if each is None else each.bins[0] for each in histograms)
    return read, write, flush


def test_every_kind_of_request_is_counted_where_it_belongs() -> None:
    async def main() -> None:
        device = observed(MemoryNode(MIB))
        await device.pread(0, memoryview(bytearray(512)))
        assert counts(device) == (1, 0, 0)
        await device.pwrite(0, memoryview(bytes(512)))
        await device.pwrite_zeroes(0, 512)
        assert counts(device) == (1, 2, 0)
        await device.flush()
        await device.pdiscard(0, 512)
        await device.cache(0, 512)
        await device.block_status(0, 512)
        assert counts(device) == (1, 2, 1)

    asyncio.run(main())


def test_a_failed_request_took_time_too_and_an_invalid_one_did_not() -> None:
    async def main() -> None:
        disk = MemoryNode(MIB)
        device = observed(disk)
        disk.fail(Op.READ)
        with pytest.raises(NodeError):
            await device.pread(0, memoryview(bytearray(512)))
        with pytest.raises(NodeError):
            await device.pread(MIB, memoryview(bytearray(512)))
        assert counts(device) == (1, 0, 0)
        assert (device.accounting.read.failed, device.accounting.read.invalid) == (1, 1)

    asyncio.run(main())


def test_a_read_on_the_spot_is_counted() -> None:
    class Ready(MemoryNode):
        def pread_now(self, offset: int, buffer: memoryview, data_only: bool) -> bool:
            return True

    device = observed(Ready(MIB))
    assert device.pread_now(0, memoryview(bytearray(512)), data_only=False)
    assert counts(device) == (1, 0, 0)


def test_a_device_is_idle_since_its_last_request_of_any_kind() -> None:
    async def main() -> None:
        device = observed(MemoryNode(MIB))
        assert device.accounting.idle_time_ns is None
        await device.flush()
        after_flush = device.accounting.flush.last_end_s
        assert device.accounting.idle_time_ns is not None
        await device.pwrite(0, memoryview(bytes(512)))
        assert device.accounting.write.last_end_s >= after_flush
        assert device.accounting.idle_time_ns >= 0

    asyncio.run(main())
