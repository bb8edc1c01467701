# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import errno
import random

import pytest
from bitarray import bitarray
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdjobs.errors import NodeError
from nbdjobs.nodes.block_copy import (
    MAX_BUFFERS,
    BlockCopy,
    CopyError,
    CopyTuning,
    choose_cluster_size,
    new_bitmap,
)
from nbdjobs.nodes.buffers import BUFFER_SIZE
from nbdjobs.nodes.graph import Edge, Role, Root
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.rounding import round_down, round_up
from tests.nodes.faults import MemoryNode, Op
from tests.nodes.graphs import PassiveRoot

CLUSTER = 64 * 1024
MIB = 1024 * 1024
DEFAULT = CopyTuning()


def disk(size: int, seed: int = 1, *, name: str = "s", can_copy: bool = False) -> MemoryNode:
    return MemoryNode(random.Random(seed).randbytes(size), name=name, can_copy=can_copy)


def edge(node: Node, root: Root | None = None) -> Edge:
    return Edge(root or PassiveRoot(), "child", node, Role.ROOT)


def copy_between(
    source: MemoryNode,
    target: MemoryNode,
    *,
    cluster_size: int = CLUSTER,
    tuning: CopyTuning = DEFAULT,
) -> BlockCopy:
    return BlockCopy(edge(source), edge(target), cluster_size=cluster_size, tuning=tuning)


def pair(
    size: int = 4 * CLUSTER, tuning: CopyTuning = DEFAULT
) -> tuple[MemoryNode, MemoryNode, BlockCopy]:
    source, target = disk(size), disk(size, 2, name="t")
    return source, target, copy_between(source, target, tuning=tuning)


def pieces(begin: int, end: int) -> list[tuple[int, int]]:
    """What a background job copies one after the other."""
    return [(first, first + BUFFER_SIZE) for first in range(begin, end, BUFFER_SIZE)]


def spans(target: MemoryNode, op: Op) -> list[tuple[int, int]]:
    return [(request.offset, request.length) for request in target.requests_of(op)]


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 6 * 128 + 3).map(lambda sectors: sectors * 512),
    st.lists(st.tuples(st.integers(0, 6 * CLUSTER), st.integers(1, 3 * CLUSTER)), max_size=12),
)
def test_any_ranges_end_up_on_the_target_each_cluster_once(
    size: int, ranges: list[tuple[int, int]]
) -> None:
    async def main() -> None:
        source, target, copy = pair(size)
        expected = bytearray(target.content)
        clusters: set[int] = set()
        async with source.hold():
            tasks = []
            for offset, length in ranges:
                begin = min(offset, size - 1)
                end = min(begin + length, size)
                tasks.append(asyncio.create_task(copy.copy(begin, end - begin)))
                begin, end = round_down(begin, CLUSTER), min(round_up(end, CLUSTER), size)
                expected[begin:end] = source.content[begin:end]
                clusters |= set(range(begin // CLUSTER, -(-end // CLUSTER)))
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert target.content == expected
        written = [0] * (size // CLUSTER + 1)
        for offset, length in spans(target, Op.WRITE):
            for cluster in range(offset // CLUSTER, -(-(offset + length) // CLUSTER)):
                written[cluster] += 1
        assert {n for n, times in enumerate(written) if times} == clusters
        assert max(written) <= 1
        assert copy.copied == sum(length for _, length in spans(target, Op.WRITE))
        assert copy.in_flight == 0
        assert all(
            copy.needs_copy(n * CLUSTER, 1) is (n not in clusters)
            for n in range(-(-size // CLUSTER))
        )

    asyncio.run(main())


def test_a_bit_is_cleared_only_when_the_cluster_is_on_the_target() -> None:
    async def main() -> None:
        source, target, copy = pair()
        async with target.hold(Op.WRITE) as gate:
            task = asyncio.create_task(copy.copy(0, CLUSTER))
            await gate.reached()
            assert copy.to_copy[0]
            assert copy.copied == 0
        await task
        assert not copy.to_copy[0]
        assert copy.copied == CLUSTER
        assert target.content[:CLUSTER] == source.content[:CLUSTER]

    asyncio.run(main())


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_failed_copy_says_which_side_failed_and_stays_to_do(side: str) -> None:
    async def main() -> None:
        source, target, copy = pair()
        if side == "source":
            source.fail(Op.READ, errno.EIO)
        else:
            target.fail(Op.WRITE, errno.ENOSPC)
        with pytest.raises(CopyError) as caught:
            await copy.copy(0, 1)
        assert caught.value.is_read is (side == "source")
        assert caught.value.errno == (errno.EIO if side == "source" else errno.ENOSPC)
        assert copy.to_copy.all()
        assert copy.in_flight == 0
        await copy.copy(0, 1)
        assert target.content[:CLUSTER] == source.content[:CLUSTER]

    asyncio.run(main())


def test_who_waits_for_a_copy_that_fails_tries_again_itself() -> None:
    async def main() -> None:
        source, target, copy = pair()
        target.fail(Op.WRITE)
        async with target.hold(Op.WRITE) as gate:
            first = asyncio.create_task(copy.copy(0, CLUSTER))
            await gate.reached()
            second = asyncio.create_task(copy.copy(100, 1))
            await asyncio.sleep(0)
        with pytest.raises(CopyError):
            await first
        await second
        assert target.content[:CLUSTER] == source.content[:CLUSTER]

    asyncio.run(main())


def test_a_safe_range_asks_nobody() -> None:
    async def main() -> None:
        source, target, copy = pair()
        await copy.copy(0, copy.size)
        before = len(source.requests), len(target.requests)
        await copy.copy(5, 100)
        assert (len(source.requests), len(target.requests)) == before
        assert not copy.has_work

    asyncio.run(main())


def test_contiguous_clusters_are_copied_together() -> None:
    async def main() -> None:
        source, target, copy = pair(4 * MIB)
        await copy.copy(0, copy.size)
        copied = [(begin, end - begin) for begin, end in pieces(0, 4 * MIB)]
        assert spans(target, Op.WRITE) == copied
        assert source.content == target.content

    asyncio.run(main())


def test_max_chunk_bounds_a_piece() -> None:
    async def main() -> None:
        _, target, copy = pair(MIB, CopyTuning(max_chunk=3 * CLUSTER + 5))
        await copy.copy(0, copy.size)
        assert max(length for _, length in spans(target, Op.WRITE)) == 3 * CLUSTER

    asyncio.run(main())


def test_a_cluster_larger_than_a_buffer_is_copied_in_pieces_and_is_safe_as_a_whole() -> None:
    async def main() -> None:
        source, target = disk(5 * MIB), disk(5 * MIB, 2, name="t")
        copy = copy_between(source, target, cluster_size=4 * MIB)
        target.fail(Op.WRITE, nth=3)
        with pytest.raises(CopyError):
            await copy.copy(0, 1)
        assert copy.to_copy.all()
        await copy.copy(0, 1)
        assert copy.to_copy.tolist() == [0, 1]
        await copy.copy(4 * MIB, 1)
        assert source.content == target.content
        assert copy.copied == 5 * MIB

    asyncio.run(main())


def test_zeroes_replace_old_content_and_are_not_written_as_bytes() -> None:
    async def main() -> None:
        source, target, copy = pair(6 * CLUSTER)
        source.content[CLUSTER : 4 * CLUSTER] = bytes(3 * CLUSTER)
        await copy.copy(0, copy.size)
        assert target.content == source.content
        assert spans(target, Op.WRITE) == [(0, CLUSTER), (4 * CLUSTER, 2 * CLUSTER)]
        assert spans(target, Op.ZERO) == [(CLUSTER, 3 * CLUSTER)]

    asyncio.run(main())


def test_zeroes_that_the_target_has_already_cost_no_request() -> None:
    async def main() -> None:
        source, target = MemoryNode(4 * CLUSTER), MemoryNode(4 * CLUSTER, name="t")
        target.content[CLUSTER : CLUSTER + 4096] = bytes([7]) * 4096
        copy = copy_between(source, target)
        await copy.copy(0, copy.size)
        assert spans(target, Op.ZERO) == [(CLUSTER, 4096)]
        assert spans(target, Op.WRITE) == []
        assert target.content == source.content
        assert copy.copied == 4 * CLUSTER

    asyncio.run(main())


def test_data_that_turns_out_to_be_zeroes_stays_sparse() -> None:
    class KnowsNothing(MemoryNode):
        def is_known_data(self, offset: int, length: int) -> bool:
            return True

    async def main() -> None:
        source = KnowsNothing(4 * CLUSTER)
        source.content[2 * CLUSTER] = 1
        target = MemoryNode(4 * CLUSTER, name="t")
        await copy_between(source, target).copy(0, 4 * CLUSTER)
        assert spans(target, Op.WRITE) == [(2 * CLUSTER, CLUSTER)]
        assert source.requests_of(Op.STATUS) == []

    asyncio.run(main())


def test_a_disk_that_cannot_tell_its_holes_is_read() -> None:
    async def main() -> None:
        source, target, copy = pair()
        source.fail(Op.STATUS, times=None)
        target.fail(Op.STATUS, times=None)
        await copy.copy(0, copy.size)
        assert source.content == target.content

    asyncio.run(main())


def test_failing_to_zero_the_target_is_the_targets_fault() -> None:
    async def main() -> None:
        source, target, copy = pair()
        source.content[:] = bytes(copy.size)
        target.fail(Op.ZERO)
        with pytest.raises(CopyError) as caught:
            await copy.copy(0, CLUSTER)
        assert not caught.value.is_read
        assert copy.to_copy.all()

    asyncio.run(main())


def test_storage_that_can_copy_does_it() -> None:
    async def main() -> None:
        source, target = disk(2 * MIB, can_copy=True), disk(2 * MIB, 2, name="t")
        copy = copy_between(source, target, tuning=CopyTuning(use_copy_range=True, max_chunk=MIB))
        await copy.copy(0, copy.size)
        assert source.requests_of(Op.READ) == []
        assert target.content == source.content

    asyncio.run(main())


def test_storage_that_cannot_copy_is_asked_once_and_one_that_fails_again() -> None:
    async def main() -> None:
        source, target, copy = pair(2 * MIB, CopyTuning(use_copy_range=True, max_chunk=MIB))
        await copy.copy(0, copy.size)
        assert source.counts[Op.COPY] == 1
        assert target.content == source.content
        source = disk(2 * MIB, can_copy=True)
        source.fail(Op.COPY, errno.EIO)
        copy = copy_between(source, target, tuning=CopyTuning(use_copy_range=True, max_chunk=MIB))
        await copy.copy(0, copy.size)
        assert source.counts[Op.COPY] == 2
        assert target.content == source.content

    asyncio.run(main())


def test_after_cancel_no_copy_begins_and_one_in_flight_ends() -> None:
    async def main() -> None:
        source, target, copy = pair()
        async with target.hold(Op.WRITE) as gate:
            task = asyncio.create_task(copy.copy(0, CLUSTER))
            await gate.reached()
            waiting = asyncio.create_task(copy.copy(0, 2 * CLUSTER))
            await asyncio.sleep(0)
            copy.cancel()
            assert not copy.needs_copy(0, copy.size)
        await asyncio.gather(task, waiting)
        assert copy.to_copy.tolist() == [0, 1, 1, 1]
        assert target.content[:CLUSTER] == source.content[:CLUSTER]
        assert target.content[CLUSTER:] != source.content[CLUSTER:]

    asyncio.run(main())


def test_memory_is_bounded_and_who_waits_for_it_gets_it() -> None:
    async def main() -> None:
        source, target, copy = pair(80 * MIB)
        async with source.hold(Op.READ) as gate:
            tasks = [asyncio.create_task(copy.copy(n * MIB, MIB)) for n in range(80)]
            await gate.reached(MAX_BUFFERS)
            for _ in range(10):
                await asyncio.sleep(0)
            assert len(gate.held) == MAX_BUFFERS
            tasks[MAX_BUFFERS + 3].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results if result] == [asyncio.CancelledError]
        assert copy.copied == 79 * MIB
        await copy.copy(0, copy.size)
        assert target.content == source.content

    asyncio.run(main())


def test_next_run_gives_long_holes_whole_and_data_in_chunks() -> None:
    async def main() -> None:
        source, target = disk(64 * MIB), MemoryNode(64 * MIB, name="t")
        copy = copy_between(source, target)
        source.content[2 * MIB : 60 * MIB + 5000] = bytes(58 * MIB + 5000)
        runs = []
        position = 0
        while (run := await copy.next_run(position, 0)) is not None:
            runs.append(run)
            position = run[1]
        assert runs == [
            *pieces(0, 2 * MIB),
            (2 * MIB, 60 * MIB),
            *pieces(60 * MIB, 64 * MIB),
        ]
        assert await copy.next_run(0, 2 * CLUSTER) == (0, 2 * CLUSTER)
        assert await copy.next_run(0, 1) == (0, CLUSTER)
        await copy.copy(CLUSTER, 1)
        assert await copy.next_run(0, 0) == (0, CLUSTER)
        assert await copy.next_run(CLUSTER, 0) == (2 * CLUSTER, 2 * CLUSTER + BUFFER_SIZE)
        assert await copy.next_run(copy.size, 0) is None
        assert len(target.requests_of(Op.WRITE)) == 1

    asyncio.run(main())


def test_a_hole_is_cut_down_where_the_target_has_to_write_zeroes() -> None:
    async def main() -> None:
        source, target = MemoryNode(64 * MIB, name="s"), disk(64 * MIB, name="t")
        copy = copy_between(source, target)
        runs = []
        position = 0
        while (run := await copy.next_run(position, 0)) is not None:
            runs.append(run)
            position = run[1]
        assert runs == [(n * 16 * MIB, (n + 1) * 16 * MIB) for n in range(4)]

    asyncio.run(main())


def test_the_bitmap_may_lie_in_memory_of_someone_else() -> None:
    async def main() -> None:
        source, target = disk(8 * CLUSTER), disk(8 * CLUSTER, 2, name="t")
        memory = bytearray([0b0000_0110])
        copy = BlockCopy(
            edge(source),
            edge(target),
            cluster_size=CLUSTER,
            to_copy=bitarray(buffer=memory, endian="little"),
        )
        assert copy.total == 2 * CLUSTER
        await copy.copy(0, 2 * CLUSTER)
        assert memory == bytes([0b0000_0100])

    asyncio.run(main())


def test_the_bitmap_covers_the_last_incomplete_cluster() -> None:
    assert new_bitmap(CLUSTER, CLUSTER).tolist() == [1]
    assert new_bitmap(CLUSTER + 512, CLUSTER).tolist() == [1, 1]
    assert new_bitmap(0, CLUSTER).tolist() == []


def test_the_cluster_size_is_the_largest_of_what_counts() -> None:
    class Clustered(MemoryNode):
        @property
        def cluster_size(self) -> int:
            return 128 * 1024

    assert choose_cluster_size(MemoryNode()) == CLUSTER
    assert choose_cluster_size(MemoryNode(), 4096) == CLUSTER
    assert choose_cluster_size(Clustered()) == 2 * CLUSTER
    assert choose_cluster_size(Clustered(), MIB) == MIB


def test_an_error_keeps_the_words_of_the_node() -> None:
    error = CopyError(NodeError(errno.EIO, "the disk is on fire", offset=7), is_read=True)
    assert (error.errno, str(error), error.offset) == (errno.EIO, "the disk is on fire", 7)
