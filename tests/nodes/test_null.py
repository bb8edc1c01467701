# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Null disks: sizes, contents and block status."""

from __future__ import annotations

import asyncio

import pytest

from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.null import DEFAULT_SIZE, NullOptions
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.status import DATA, BlockStatus, Status


def null(*, size: int | None = None, read_zeroes: bool = False, latency_ns: int = 0) -> Node:
    options = NullOptions(
        driver="null-co",
        node_name="n",
        size=size,
        read_zeroes=read_zeroes,
        latency_ns=latency_ns,
    )
    return asyncio.run(open_node(Graph(), options))


@pytest.mark.parametrize(("size", "actual"), [(None, DEFAULT_SIZE), (1000, 1024), (0, 0)])
def test_sizes(size: int | None, actual: int) -> None:
    assert null(size=size).size == actual


def test_only_with_read_zeroes_does_a_read_change_the_buffer() -> None:
    for read_zeroes, expected in ((False, b"x" * 512), (True, bytes(512))):
        buffer = bytearray(b"x" * 512)
        asyncio.run(null(read_zeroes=read_zeroes).pread(0, memoryview(buffer)))
        assert buffer == expected


def test_block_status_tells_zeroes_only_where_they_can_be_read() -> None:
    assert asyncio.run(null().block_status(0, 4096)) == BlockStatus(4096, DATA)
    zeroes = BlockStatus(4096, DATA | Status.ZERO)
    assert asyncio.run(null(read_zeroes=True).block_status(0, 4096)) == zeroes


def test_latency_makes_every_request_wait() -> None:
    async def scenario() -> None:
        options = NullOptions(driver="null-aio", node_name="n", latency_ns=1000)
        node = await open_node(Graph(), options)
        block = memoryview(bytearray(512))
        for request in (node.pread(0, block), node.pwrite(0, block), node.flush()):
            task = asyncio.ensure_future(request)
            await asyncio.sleep(0)
            assert not task.done()
            await task

    asyncio.run(scenario())
