# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The fault node itself: other tests lean on what it promises."""

from __future__ import annotations

import asyncio
import errno

import pytest

from nbdjobs.errors import NodeError
from nbdjobs.nodes.status import DATA, HOLE, BlockStatus
from tests.nodes.faults import MemoryNode, Op, Request


def test_a_held_write_takes_effect_only_when_released() -> None:
    async def scenario() -> None:
        disk = MemoryNode(8192)
        async with disk.hold(Op.WRITE) as gate:
            write = asyncio.create_task(disk.pwrite(512, memoryview(b"a" * 512)))
            await gate.reached()
            assert not any(disk.content)
            assert disk.in_flight == 1
        await write
        assert disk.content == bytes(512) + b"a" * 512 + bytes(8192 - 1024)

    asyncio.run(scenario())


def test_a_gate_holds_only_requests_that_touch_its_range() -> None:
    async def scenario() -> None:
        disk = MemoryNode(8192)
        gate = disk.hold(Op.READ, offset=4096, length=512)
        await disk.pread(0, memoryview(bytearray(4096)))
        read = asyncio.create_task(disk.pread(4000, memoryview(bytearray(200))))
        await gate.reached()
        assert gate.held == [Request(Op.READ, 4000, 200)]
        gate.release()
        await read

    asyncio.run(scenario())


def test_a_cancelled_request_leaves_the_gate() -> None:
    async def scenario() -> None:
        disk = MemoryNode(8192)
        async with disk.hold() as gate:
            flush = asyncio.create_task(disk.flush())
            await gate.reached()
            flush.cancel()
            with pytest.raises(asyncio.CancelledError):
                await flush
            assert disk.in_flight == 0

    asyncio.run(scenario())


def test_the_nth_request_fails_and_the_next_one_succeeds() -> None:
    async def scenario() -> list[str]:
        disk = MemoryNode(8192)
        disk.fail(Op.WRITE, errno.ENOSPC, nth=2)
        outcomes = []
        for _ in range(3):
            try:
                await disk.pwrite(0, memoryview(b"x" * 512))
                outcomes.append("done")
            except NodeError as error:
                outcomes.append(errno.errorcode[error.errno])
        return outcomes

    assert asyncio.run(scenario()) == ["done", "ENOSPC", "done"]


def test_a_fault_strikes_until_stopped() -> None:
    async def scenario() -> None:
        disk = MemoryNode(8192)
        fault = disk.fail(times=None)
        for _ in range(2):
            with pytest.raises(NodeError):
                await disk.flush()
        fault.stop()
        await disk.flush()
        assert fault.failed == 2

    asyncio.run(scenario())


def test_only_flushed_content_is_stable() -> None:
    async def scenario() -> None:
        disk = MemoryNode(1024)
        await disk.pwrite(0, memoryview(b"a" * 512))
        assert not any(disk.stable)
        await disk.flush()
        await disk.pwrite(512, memoryview(b"b" * 512), fua=True)
        assert disk.stable == b"a" * 512 + b"b" * 512

    asyncio.run(scenario())


def test_zero_blocks_are_holes() -> None:
    async def scenario() -> None:
        disk = MemoryNode(bytes(8192) + b"a" * 4096 + bytes(4096))
        assert await disk.block_status(512, 16384 - 512) == BlockStatus(8192 - 512, HOLE)
        assert await disk.block_status(8192, 8192) == BlockStatus(4096, DATA)
        assert disk.counts == {Op.STATUS: 2}

    asyncio.run(scenario())
