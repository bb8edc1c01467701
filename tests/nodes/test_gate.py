# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The gate: alignment, splitting, zero detection, FUA; random requests against a bytearray."""

from __future__ import annotations

import asyncio
import errno
import itertools
import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.errors import NodeError
from nbdjobs.nodes.config import NO_LIMITS, CacheMode, DetectZeroes, Limits, NodeConfig
from nbdjobs.nodes.file import FileOptions
from nbdjobs.nodes.gate import is_zero
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.rounding import round_down, round_up
from nbdjobs.nodes.status import DATA, HOLE, BlockStatus
from tests.nodes.faults import MemoryNode, Op, Request
from tests.nodes.graphs import Layer, make_graph, use

SIZE = 8192
UNMAP = NodeConfig(can_unmap=True)
BLOCKS_OF_4K = Limits(request_alignment=4096)


class StrictNode(MemoryNode):
    """Refuses whatever breaks its limits, and takes a random time over each request."""

    def __init__(
        self,
        content: bytes | int = SIZE,
        *,
        config: NodeConfig = UNMAP,
        limits: Limits = NO_LIMITS,
        can_zero: bool = True,
        chance: random.Random | None = None,
    ):
        super().__init__(content, config=config, limits=limits, can_zero=can_zero)
        self.declared = limits
        self.unmapped: list[bool] = []
        self._chance = chance

    async def _arrive(self, request: Request) -> None:
        limits = self.declared
        match request.op:
            case Op.READ | Op.WRITE:
                self._check(request, limits.request_alignment, limits.max_transfer)
            case Op.ZERO:
                unit = max(limits.request_alignment, limits.pwrite_zeroes_alignment)
                self._check(request, unit, limits.max_pwrite_zeroes)
            case Op.DISCARD:
                unit = max(limits.request_alignment, limits.pdiscard_alignment)
                self._check(request, unit, limits.max_pdiscard)
        if self._chance is not None:
            for _ in range(self._chance.randrange(4)):
                await asyncio.sleep(0)
        await super()._arrive(request)

    @staticmethod
    def _check(request: Request, unit: int, maximum: int) -> None:
        assert request.length > 0
        assert not request.offset % unit
        assert not request.length % unit
        # A maximum below the unit cannot be kept to.
        assert not maximum or request.length <= max(maximum, unit)

    async def _pwrite_zeroes(
        self, offset: int, length: int, fua: bool, may_unmap: bool, fast_only: bool
    ) -> None:
        self.unmapped.append(may_unmap)
        await super()._pwrite_zeroes(offset, length, fua, may_unmap, fast_only)


def run(operation: Coroutine[Any, Any, None]) -> None:
    asyncio.run(_await(operation))


async def _await(operation: Coroutine[Any, Any, None]) -> None:
    await operation


def pattern(length: int) -> bytes:
    return bytes(1 + n % 251 for n in range(length))


# Random requests against a bytearray

units = st.sampled_from([1, 1, 8, 64, 512])
maxima = st.sampled_from([0, 0, 8, 100, 512, 1000, 3000])
limits_of_all_kinds = st.builds(
    Limits,
    request_alignment=units,
    max_transfer=maxima,
    max_pdiscard=maxima,
    pdiscard_alignment=st.sampled_from([0, 64, 1024]),
    max_pwrite_zeroes=maxima,
    pwrite_zeroes_alignment=st.sampled_from([0, 64, 1024]),
)
configs = st.builds(
    NodeConfig, can_unmap=st.booleans(), detect_zeroes=st.sampled_from(DetectZeroes)
)


class Model:
    """Runs requests on a node and says what the content has to be."""

    def __init__(self, node: Node, content: bytes):
        self.node = node
        self.content = bytearray(content)

    async def run(self, op: Op, offset: int, length: int, byte: int, fua: bool) -> None:
        """Run one request; its range belongs to it alone while it lasts."""
        end = offset + length
        match op:
            case Op.READ:
                buffer = bytearray(length)
                await self.node.pread(offset, memoryview(buffer))
                assert buffer == self.content[offset:end]
            case Op.WRITE:
                await self.node.pwrite(offset, memoryview(bytes([byte]) * length), fua=fua)
                self.content[offset:end] = bytes([byte]) * length
            case Op.ZERO:
                await self.node.pwrite_zeroes(offset, length, fua=fua)
                self.content[offset:end] = bytes(length)
            case Op.DISCARD:
                await self.node.pdiscard(offset, length, fua=fua)
                limits = self.node.limits
                unit = max(limits.request_alignment, limits.pdiscard_alignment)
                offset, end = round_up(offset, unit), round_down(end, unit)
                if self.node.config.can_unmap and offset < end:
                    self.content[offset:end] = bytes(end - offset)


def random_request(chance: random.Random, begin: int, end: int) -> tuple[Op, int, int, int, bool]:
    offset = chance.randrange(begin, end)
    length = chance.randrange(1, end - offset + 1)
    op = chance.choice([Op.READ, Op.WRITE, Op.WRITE, Op.ZERO, Op.DISCARD])
    return op, offset, length, chance.choice([0, 1, 2, 255]), chance.random() < 0.3


@given(st.integers(0, 2**32), limits_of_all_kinds, configs, st.booleans())
def test_requests_one_after_another(
    seed: int, limits: Limits, config: NodeConfig, can_zero: bool
) -> None:
    async def scenario() -> None:
        chance = random.Random(seed)
        before = chance.randbytes(SIZE)
        node = StrictNode(before, config=config, limits=limits, can_zero=can_zero)
        model = Model(node, before)
        for _ in range(15):
            await model.run(*random_request(chance, 0, SIZE))
            assert node.content == model.content
        assert len(node.tracked) == 0

    asyncio.run(scenario())


@given(st.integers(0, 2**32), limits_of_all_kinds, configs, st.booleans())
def test_concurrent_requests_never_lose_a_neighbours_bytes(
    seed: int, limits: Limits, config: NodeConfig, can_zero: bool
) -> None:
    """Everyone works on bytes of their own, but the blocks that these are in are shared."""

    async def scenario() -> None:
        chance = random.Random(seed)
        before = chance.randbytes(SIZE)
        node = StrictNode(before, config=config, limits=limits, can_zero=can_zero, chance=chance)
        model = Model(node, before)

        async def worker(begin: int, end: int) -> None:
            for _ in range(4):
                await model.run(*random_request(chance, begin, end))

        cuts = [0, *sorted(chance.sample(range(1, SIZE), 9)), SIZE]
        async with asyncio.TaskGroup() as group:
            for begin, end in itertools.pairwise(cuts):
                group.create_task(worker(begin, end))
        assert node.content == model.content
        assert len(node.tracked) == 0

    asyncio.run(scenario())


@given(st.integers(0, 2**32), limits_of_all_kinds)
def test_of_overlapping_writes_each_byte_is_from_one(seed: int, limits: Limits) -> None:
    async def scenario() -> None:
        chance = random.Random(seed)
        node = StrictNode(SIZE, limits=limits, chance=chance)
        possible = [{0} for _ in range(SIZE)]
        covered = bytearray(SIZE)
        async with asyncio.TaskGroup() as group:
            for byte in range(1, 12):
                offset = chance.randrange(SIZE)
                length = chance.randrange(1, min(2000, SIZE - offset) + 1)
                group.create_task(_await(node.pwrite(offset, memoryview(bytes([byte]) * length))))
                covered[offset : offset + length] = b"\1" * length
                for at in range(offset, offset + length):
                    possible[at].add(byte)
        for byte, choices, is_covered in zip(node.content, possible, covered, strict=True):
            assert byte in choices
            assert bool(byte) == bool(is_covered)

    asyncio.run(scenario())


@given(st.integers(0, 2**32), limits_of_all_kinds)
def test_cancelled_and_failed_requests_leave_no_trace_in_the_overlap_table(
    seed: int, limits: Limits
) -> None:
    async def scenario() -> None:
        chance = random.Random(seed)
        before = chance.randbytes(SIZE)
        node = StrictNode(before, limits=limits, chance=chance)
        model = Model(node, before)
        fault = node.fail(None, nth=5, times=2)
        tasks = [
            asyncio.create_task(model.run(*random_request(chance, n * 512 + 7, n * 512 + 519)))
            for n in range(15)
        ]
        for task in chance.sample(tasks, 5):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert len(node.tracked) == 0
        fault.stop()  # those that were cancelled may have left it some to fail
        await node.pwrite(1, memoryview(bytes(SIZE - 2)))

    asyncio.run(scenario())


OVERWRITES: dict[str, Callable[[Node], Coroutine[Any, Any, None]]] = {
    "write": lambda node: node.pwrite(0, memoryview(bytes(4096))),
    "ragged write": lambda node: node.pwrite(0, memoryview(bytes(4095))),
    "zeroes": lambda node: node.pwrite_zeroes(0, 4096),
    "discard": lambda node: node.pdiscard(0, 4096),
}


@pytest.mark.parametrize("overwrite", OVERWRITES.values(), ids=OVERWRITES)
def test_what_a_small_write_read_around_itself_never_comes_back(
    overwrite: Callable[[Node], Coroutine[Any, Any, None]],
) -> None:
    """The small write has read the old block: whatever replaces the block has to wait for it."""

    async def scenario() -> None:
        node = StrictNode(pattern(SIZE), limits=BLOCKS_OF_4K)
        async with node.hold(Op.WRITE) as gate:
            small = asyncio.create_task(_await(node.pwrite(100, memoryview(b"\xff" * 100))))
            await gate.reached()
            large = asyncio.create_task(_await(overwrite(node)))
            for _ in range(20):
                await asyncio.sleep(0)
            assert not large.done()
            assert len(node.requests) == 2
        await asyncio.gather(small, large)
        assert node.content[:4095] == bytes(4095)
        assert node.content[4096:] == pattern(SIZE)[4096:]

    asyncio.run(scenario())


# Alignment and splitting


def test_an_aligned_request_without_limits_reaches_the_driver_as_it_is() -> None:
    node = StrictNode()
    data = memoryview(pattern(1000))
    run(node.pwrite(3, data))
    run(node.pread(3, memoryview(bytearray(1000))))
    assert node.requests == [Request(Op.WRITE, 3, 1000), Request(Op.READ, 3, 1000)]


def test_a_ragged_write_reads_only_the_blocks_that_it_does_not_fill() -> None:
    node = StrictNode(16384, limits=BLOCKS_OF_4K)
    run(node.pwrite(4096, memoryview(pattern(5000))))
    assert node.requests == [Request(Op.READ, 8192, 4096), Request(Op.WRITE, 4096, 8192)]
    node.requests.clear()
    run(node.pwrite(100, memoryview(pattern(8092))))
    assert node.requests == [Request(Op.READ, 0, 4096), Request(Op.WRITE, 0, 8192)]
    node.requests.clear()
    run(node.pwrite(100, memoryview(pattern(100))))
    assert node.requests == [Request(Op.READ, 0, 4096), Request(Op.WRITE, 0, 4096)]


def test_maxima_are_cut_to_whole_units_and_stay_maxima() -> None:
    limits = Limits(
        request_alignment=512,
        max_transfer=1000,
        max_pdiscard=100,
        max_pwrite_zeroes=5000,
        pwrite_zeroes_alignment=4096,
    ).in_whole_units()
    assert (limits.max_transfer, limits.max_pdiscard, limits.max_pwrite_zeroes) == (512, 512, 4096)
    assert NO_LIMITS.in_whole_units() == NO_LIMITS


def test_the_end_of_a_node_that_is_no_multiple_of_the_alignment_can_be_read() -> None:
    node = StrictNode(pattern(1024), limits=BLOCKS_OF_4K)
    buffer = bytearray(30)
    run(node.pread(994, memoryview(buffer)))
    assert buffer == pattern(1024)[994:]


@pytest.mark.parametrize("limits", [NO_LIMITS, BLOCKS_OF_4K, Limits(max_transfer=512)])
@pytest.mark.parametrize("detect_zeroes", DetectZeroes)
def test_empty_requests_change_nothing(limits: Limits, detect_zeroes: DetectZeroes) -> None:
    config = NodeConfig(can_unmap=True, detect_zeroes=detect_zeroes)
    node = MemoryNode(pattern(SIZE), config=config, limits=limits)
    run(node.pread(5, memoryview(bytearray())))
    run(node.pwrite(5, memoryview(b"")))
    run(node.pwrite_zeroes(5, 0))
    run(node.pdiscard(5, 0))
    assert node.content == pattern(SIZE)
    assert len(node.tracked) == 0


# Zeroes and discards


def test_zero_writes_are_split_at_all_limits_at_once() -> None:
    limits = Limits(
        request_alignment=512,
        max_transfer=1024,
        max_pwrite_zeroes=5000,
        pwrite_zeroes_alignment=2048,
    )
    node = StrictNode(pattern(16384), limits=limits)
    run(node.pwrite_zeroes(300, 13000))
    assert node.content[300:13300] == bytes(13000)
    assert (
        node.content[:300] + node.content[13300:] == pattern(16384)[:300] + pattern(16384)[13300:]
    )
    assert node.requests_of(Op.ZERO) == [
        Request(Op.ZERO, 2048, 4096),
        Request(Op.ZERO, 6144, 4096),
        Request(Op.ZERO, 10240, 2048),
    ]
    assert [(r.offset, r.length) for r in node.requests_of(Op.WRITE)] == [
        (0, 512),  # 300 to 512, read, changed and written
        (512, 1024),
        (1536, 512),  # up to the alignment of zero writes
        (12288, 512),
        (12800, 512),
    ]


def test_discards_are_split_and_leave_ragged_ends_alone() -> None:
    limits = Limits(request_alignment=512, pdiscard_alignment=1024, max_pdiscard=2500)
    node = StrictNode(pattern(SIZE), limits=limits)
    run(node.pdiscard(1000, 6000))
    assert node.requests == [
        Request(Op.DISCARD, 1024, 2048),
        Request(Op.DISCARD, 3072, 2048),
        Request(Op.DISCARD, 5120, 1024),
    ]
    assert node.content == pattern(SIZE)[:1024] + bytes(5120) + pattern(SIZE)[6144:]


def test_a_discard_of_less_than_a_unit_does_nothing() -> None:
    node = StrictNode(pattern(SIZE), limits=Limits(pdiscard_alignment=4096))
    run(node.pdiscard(1, 4095 * 2, fua=True))
    assert not node.requests


def test_a_discard_is_dropped_where_the_options_ask_for_that() -> None:
    node = MemoryNode(pattern(SIZE), config=NodeConfig(can_unmap=False))
    run(node.pdiscard(0, SIZE))
    assert not node.requests


def test_a_discard_that_the_storage_cannot_do_is_no_error_but_a_failed_one_is() -> None:
    run(MemoryNode(SIZE, can_discard=False).pdiscard(0, SIZE))
    node = MemoryNode(SIZE)
    node.fail(Op.DISCARD, errno.EIO)
    with pytest.raises(NodeError) as failure:
        run(node.pdiscard(0, SIZE))
    assert failure.value.errno == errno.EIO


@pytest.mark.parametrize("limits", [NO_LIMITS, Limits(request_alignment=512, max_transfer=1024)])
def test_zeroes_are_written_where_the_storage_knows_no_better(limits: Limits) -> None:
    node = StrictNode(pattern(SIZE), limits=limits, can_zero=False)
    run(node.pwrite_zeroes(512, 4096))
    assert node.content == pattern(SIZE)[:512] + bytes(4096) + pattern(SIZE)[4608:]


@pytest.mark.parametrize(
    ("limits", "offset"),
    [
        (NO_LIMITS, None),  # the storage cannot do it at all
        (Limits(request_alignment=512), 100),
        (Limits(pwrite_zeroes_alignment=4096), 512),
    ],
)
def test_fast_zeroes_fail_at_once_where_bytes_would_be_written(
    limits: Limits, offset: int | None
) -> None:
    node = StrictNode(pattern(SIZE), limits=limits, can_zero=offset is not None)
    with pytest.raises(NodeError) as failure:
        run(node.pwrite_zeroes(offset or 0, 4096, fast_only=True))
    assert failure.value.errno == errno.ENOTSUP
    assert node.content == pattern(SIZE)
    assert not node.requests_of(Op.WRITE)


def test_fast_zeroes_succeed_where_the_storage_can_do_all_of_it() -> None:
    node = StrictNode(pattern(SIZE), limits=BLOCKS_OF_4K)
    run(node.pwrite_zeroes(4096, 4096, fast_only=True))
    assert node.requests == [Request(Op.ZERO, 4096, 4096)]


def test_a_zero_write_that_fails_is_not_tried_with_bytes() -> None:
    node = MemoryNode(pattern(SIZE))
    node.fail(Op.ZERO, errno.ENOSPC)
    with pytest.raises(NodeError) as failure:
        run(node.pwrite_zeroes(0, SIZE))
    assert failure.value.errno == errno.ENOSPC
    assert not node.requests_of(Op.WRITE)


@pytest.mark.parametrize("can_unmap", [False, True])
@pytest.mark.parametrize("may_unmap", [False, True])
def test_zeroes_become_holes_only_if_request_and_options_agree(
    can_unmap: bool, may_unmap: bool
) -> None:
    node = StrictNode(config=NodeConfig(can_unmap=can_unmap))
    run(node.pwrite_zeroes(0, 512, may_unmap=may_unmap))
    assert node.unmapped == [can_unmap and may_unmap]


@pytest.mark.parametrize("limits", [NO_LIMITS, Limits(max_transfer=1024), BLOCKS_OF_4K])
def test_written_zeroes_are_detected(limits: Limits) -> None:
    for detect, unmapped in ((DetectZeroes.ON, False), (DetectZeroes.UNMAP, True)):
        config = NodeConfig(can_unmap=True, detect_zeroes=detect)
        node = StrictNode(pattern(SIZE), config=config, limits=limits)
        run(node.pwrite(4096, memoryview(bytes(4096)), fua=True))
        assert node.requests == [Request(Op.ZERO, 4096, 4096, is_fua=True)]
        assert node.unmapped == [unmapped]
        run(node.pwrite(4096, memoryview(bytes(4095) + b"x")))
        assert len(node.requests_of(Op.ZERO)) == 1


def test_written_zeroes_are_left_alone_where_detection_is_off() -> None:
    node = MemoryNode(SIZE, limits=Limits(max_transfer=SIZE))
    run(node.pwrite(0, memoryview(bytes(SIZE))))
    assert node.requests == [Request(Op.WRITE, 0, SIZE)]


@given(st.integers(0, 200_000), st.none() | st.integers(0, 199_999))
def test_is_zero_finds_the_one_byte_that_is_not(length: int, at: int | None) -> None:
    data = bytearray(length)
    if at is not None and at < length:
        data[at] = 1
    assert is_zero(memoryview(data)) == (not any(data))


# FUA and flush

Operation = Callable[[Node], Coroutine[Any, Any, None]]
FUA_OPERATIONS: dict[str, Operation] = {
    "write": lambda node: node.pwrite(100, memoryview(b"x" * 5000), fua=True),
    "write of zeroes": lambda node: node.pwrite(100, memoryview(bytes(5000)), fua=True),
    "zeroes": lambda node: node.pwrite_zeroes(100, 5000, fua=True),
    "kept zeroes": lambda node: node.pwrite_zeroes(100, 5000, fua=True, may_unmap=False),
    "discard": lambda node: node.pdiscard(100, 5000, fua=True),
}


@pytest.mark.parametrize("operation", FUA_OPERATIONS.values(), ids=FUA_OPERATIONS)
@given(limits=limits_of_all_kinds, config=configs, can_zero=st.booleans())
def test_with_fua_all_that_changed_is_stable(
    operation: Operation, limits: Limits, config: NodeConfig, can_zero: bool
) -> None:
    node = StrictNode(pattern(SIZE), config=config, limits=limits, can_zero=can_zero)
    run(operation(node))
    assert node.stable == node.content


@pytest.mark.parametrize("operation", FUA_OPERATIONS.values(), ids=FUA_OPERATIONS)
@pytest.mark.parametrize("limits", [NO_LIMITS, Limits(request_alignment=512, max_transfer=1024)])
def test_nothing_is_made_stable_where_flushes_are_off(operation: Operation, limits: Limits) -> None:
    config = NodeConfig(can_unmap=True, cache=CacheMode(is_no_flush=True))
    node = StrictNode(pattern(SIZE), config=config, limits=limits)
    run(operation(node))
    run(node.flush())
    assert node.requests
    assert not any(request.is_fua or request.op is Op.FLUSH for request in node.requests)


# Block status


async def runs_of(node: Node, offset: int, length: int) -> list[tuple[int, BlockStatus]]:
    return [run async for run in node.extents(offset, length)]


def test_extents_walk_the_range_without_gaps() -> None:
    node = MemoryNode(bytes(4096) + pattern(4096) + bytes(8192))
    assert asyncio.run(runs_of(node, 100, 16000)) == [
        (100, BlockStatus(3996, HOLE)),
        (4096, BlockStatus(4096, DATA)),
        (8192, BlockStatus(7908, HOLE)),
    ]


def test_block_status_comes_in_whole_blocks_and_mixed_ones_count_as_data() -> None:
    content = bytes(8192) + pattern(4096) + bytes(4096) + bytes(16384)
    node = MemoryNode(content, limits=Limits(request_alignment=8192))
    assert asyncio.run(runs_of(node, 100, 32768 - 200)) == [
        (100, BlockStatus(8092, HOLE)),
        (8192, BlockStatus(8192, DATA)),
        (16384, BlockStatus(16284, HOLE)),
    ]


def test_block_status_ends_with_the_node_and_not_with_the_block() -> None:
    class Checked(MemoryNode):
        async def _block_status(self, offset: int, length: int) -> BlockStatus:
            assert offset + length <= self.size
            return await super()._block_status(offset, length)

    node = Checked(bytes(5120), limits=BLOCKS_OF_4K)
    assert asyncio.run(runs_of(node, 4000, 1120)) == [(4000, BlockStatus(1120, HOLE))]


@given(st.integers(0, 2**32), st.sampled_from([1, 512, 4096, 16384]))
def test_holes_that_block_status_reports_read_as_zeroes(seed: int, alignment: int) -> None:
    async def scenario() -> None:
        chance = random.Random(seed)
        content = b"".join(
            bytes(2048) if chance.random() < 0.6 else pattern(2048) for _ in range(32)
        )
        node = MemoryNode(content, limits=Limits(request_alignment=alignment))
        offset = chance.randrange(len(content))
        length = chance.randrange(1, len(content) - offset + 1)
        at = offset
        for begin, (run_length, status) in await runs_of(node, offset, length):
            assert begin == at
            assert run_length > 0
            at += run_length
            assert status == DATA or not any(content[begin:at])
            assert at == offset + length or not at % alignment
        assert at == offset + length

    asyncio.run(scenario())


def test_block_status_of_nothing_is_refused() -> None:
    async def scenario() -> None:
        with pytest.raises(NodeError) as failure:
            await MemoryNode(512).block_status(0, 0)
        assert failure.value.errno == errno.EINVAL

    asyncio.run(scenario())


# What else a node says and does


def test_caching_goes_down_to_the_storage() -> None:
    class Caching(MemoryNode):
        async def cache(self, offset: int, length: int) -> None:
            cached.append((offset, length))

    cached: list[tuple[int, int]] = []
    disk, layer = Caching(name="disk"), Layer("layer")
    use(make_graph(disk, layer), layer, disk)
    run(layer.cache(512, 1024))
    assert cached == [(512, 1024)]


def test_attributes_of_files_are_read_the_fast_way(tmp_path: Path) -> None:
    """CPython keeps up to 30 attributes in place, and looks for more in a dictionary."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(512))

    async def attributes() -> int:
        graph = Graph()
        options = FileOptions(driver="file", node_name="f", filename=str(path))
        node = await open_node(graph, options)
        count = len(vars(node))
        await graph.drop(node)
        return count

    assert asyncio.run(attributes()) < 30


def test_a_copy_that_the_storage_cannot_do_is_left_to_the_caller() -> None:
    with pytest.raises(NodeError) as failure:
        run(Node.copy_range(MemoryNode(512), 0, MemoryNode(512), 0, 512))
    assert failure.value.errno == errno.ENOTSUP


@given(st.integers(0, 2**40), st.integers(1, 2**20))
def test_rounding_is_to_the_nearest_multiple_on_its_side(value: int, alignment: int) -> None:
    below, above = round_down(value, alignment), round_up(value, alignment)
    assert below <= value <= above
    assert not below % alignment
    assert not above % alignment
    assert above - below in (0, alignment)
    assert (above == below) == (not value % alignment)
