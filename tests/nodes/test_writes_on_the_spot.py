# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Writes that are done without a coroutine: where that is right, and where it must not be."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nbdjobs.errors import NodeError
from nbdjobs.nodes import copy_before_write, file
from nbdjobs.nodes.config import DetectZeroes, NodeConfig
from nbdjobs.nodes.copy_before_write import CbwSettings, CopyBeforeWrite
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.file import FileNode, FileOptions
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import CacheOptions, Discard
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.qcow2.create import CreateOptions, create
from nbdjobs.nodes.raw import RawOptions
from tests.jobs.rig import CLUSTER, Rig
from tests.nodes import test_throttle as throttled
from tests.nodes.faults import MemoryNode, Op
from tests.nodes.qcow2.rig import opened

SIZE = 1 << 20
WRITER = Permission.CONSISTENT_READ | Permission.WRITE
DATA = memoryview(b"n" * 4096)

Scenario = Callable[[FileNode, Device], Awaitable[None]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"o" * SIZE)
    return path


def with_file(
    path: Path,
    scenario: Scenario,
    *,
    cache: CacheOptions | None = None,
    detect_zeroes: DetectZeroes = DetectZeroes.OFF,
) -> None:
    async def run() -> None:
        graph = Graph()
        chosen = FileOptions(
            driver="file",
            node_name="f",
            filename=str(path),
            discard=Discard.UNMAP,
            cache=cache or CacheOptions(),
            detect_zeroes=detect_zeroes,
        )
        node = await open_node(graph, chosen)
        assert isinstance(node, FileNode)
        device = Device(graph, node, needed=WRITER)
        await scenario(node, device)
        await device.close()
        await graph.drop(node)

    asyncio.run(run())


def test_a_write_into_the_page_cache_is_done_and_counted(path: Path) -> None:
    async def scenario(node: FileNode, device: Device) -> None:
        assert device.pwrite_now(8192, DATA)
        account = device.accounting
        assert (account.write.operations, account.write.length) == (1, 4096)
        assert account.highest_offset_written == 8192 + 4096
        assert node.highest_offset_written == 8192 + 4096

    with_file(path, scenario)
    assert path.read_bytes() == b"o" * 8192 + bytes(DATA) + b"o" * (SIZE - 8192 - 4096)


def test_what_was_written_is_flushed_when_a_flush_comes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []

    async def scenario(node: FileNode, device: Device) -> None:
        await device.flush()
        synced.clear()
        assert device.pwrite_now(0, DATA)
        await device.flush()
        assert synced

    fdatasync = os.fdatasync

    def recorded(fd: int) -> None:
        synced.append(fd)
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", recorded)
    with_file(path, scenario)


def test_beyond_the_end_nothing_is_written(path: Path) -> None:
    async def scenario(node: FileNode, device: Device) -> None:
        assert not device.pwrite_now(SIZE - 512, DATA)

    with_file(path, scenario)
    assert path.read_bytes() == b"o" * SIZE


def test_a_device_that_is_held_or_writes_through_does_nothing_on_the_spot(path: Path) -> None:
    async def scenario(node: FileNode, device: Device) -> None:
        device.hold()
        assert not device.pwrite_now(0, DATA)
        device.release()
        device.is_writethrough = True
        assert not device.pwrite_now(0, DATA)

    with_file(path, scenario)
    assert path.read_bytes() == b"o" * SIZE


@pytest.mark.parametrize("is_direct", [True, False])
def test_what_needs_more_than_a_write_is_not_done_on_the_spot(path: Path, is_direct: bool) -> None:
    async def scenario(node: FileNode, device: Device) -> None:
        assert not device.pwrite_now(0, DATA)

    if is_direct:
        with_file(path, scenario, cache=CacheOptions(direct=True))
    else:
        with_file(path, scenario, detect_zeroes=DetectZeroes.ON)


def test_a_threshold_sees_every_write(path: Path) -> None:
    async def scenario(node: FileNode, device: Device) -> None:
        told: list[tuple[int, int]] = []
        node.set_write_threshold(4096, lambda *exceeded: told.append(exceeded))
        assert not device.pwrite_now(4096, DATA)
        await device.pwrite(4096, DATA)
        assert told == [(4096, 4096)]
        assert device.pwrite_now(4096, DATA)

    with_file(path, scenario)


def test_a_slow_write_is_the_last_on_the_spot(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(node: FileNode, device: Device) -> None:
        times = iter([0, 3_000_000])
        with monkeypatch.context() as patch:
            patch.setattr(file, "perf_counter_ns", lambda: next(times))
            assert device.pwrite_now(0, DATA)
        assert not device.pwrite_now(0, DATA)

    with_file(path, scenario)


@pytest.mark.parametrize("written", [None, 100])
def test_what_fails_or_stops_short_is_left_to_the_write_that_can_tell(
    path: Path, monkeypatch: pytest.MonkeyPatch, written: int | None
) -> None:
    def failing(*arguments: object) -> int:
        if written is None:
            raise OSError(errno.EIO, "broken")
        return written

    async def scenario(node: FileNode, device: Device) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(file, "pwritev", failing)
            assert not device.pwrite_now(0, DATA)
            assert not device.accounting.write.operations
            if written is None:
                with pytest.raises(NodeError) as caught:
                    await device.pwrite(0, DATA)
                assert caught.value.errno == errno.EIO

    with_file(path, scenario)


def test_a_window_shifts_what_is_written(path: Path) -> None:
    async def window() -> None:
        graph = Graph()
        chosen = FileOptions(driver="file", filename=str(path))
        options = RawOptions(
            driver="raw", node_name="w", file=chosen, offset=4096, size=8192, discard=Discard.UNMAP
        )
        node = await open_node(graph, options)
        device = Device(graph, node, needed=WRITER)
        assert device.pwrite_now(4096, DATA)
        assert not device.pwrite_now(8192, DATA)
        await device.close()
        await graph.drop(node)

    asyncio.run(window())
    assert path.read_bytes() == b"o" * 8192 + bytes(DATA) + b"o" * (SIZE - 8192 - 4096)


class InstantDisk(MemoryNode):
    """A disk that does every write on the spot."""

    def pwrite_now(self, offset: int, data: memoryview) -> bool:
        self.content[offset : offset + len(data)] = data
        return True


def test_limits_count_it_and_refuse_it_when_it_would_have_to_wait() -> None:
    async def main() -> None:
        rig = throttled.Rig(iops_total=1)
        rig.graph.add(InstantDisk(throttled.SIZE, name="instant"))
        node = await rig.open(disk="instant")
        data = memoryview(b"x" * 512)
        assert node.pwrite_now(0, data)
        assert not node.pwrite_now(0, data)
        rig.clock.advance(1)
        assert node.pwrite_now(0, data)

    asyncio.run(main())


def test_old_content_is_saved_before_anything_is_written_over_it() -> None:
    async def main() -> None:
        rig = Rig()
        rig.source.__class__ = InstantDisk
        node = CopyBeforeWrite("flt", NodeConfig(can_unmap=True), CbwSettings(), rig.clock)
        async with rig.graph.drained(rig.source):
            copy_before_write.insert(rig.graph, rig.source, rig.target, node)
            node.arm()
        new = memoryview(b"n" * 512)
        assert not node.pwrite_now(0, new)
        assert rig.source.content == rig.before
        await node.pwrite(0, new)
        assert rig.target.content[:CLUSTER] == rig.before[:CLUSTER]
        assert node.pwrite_now(512, new)
        assert not node.pwrite_now(CLUSTER - 256, new)  # half of it is not safe
        assert rig.source.content[512:1024] == bytes(new)

        # A reader of the snapshot who still reads the source must not see the new content.
        async with rig.source.hold(Op.READ) as gate:
            buffer = memoryview(bytearray(512))
            reading = asyncio.create_task(node.snapshot.pread(2 * CLUSTER, buffer))
            await gate.reached()
            assert not node.pwrite_now(0, new)
        await reading
        assert node.pwrite_now(0, new)
        await node.settled()
        async with rig.graph.drained(node):
            await copy_before_write.remove(rig.graph, node)

    asyncio.run(main())


def test_clusters_of_an_image_are_written_on_the_spot_once_they_are_its_own() -> None:
    async def main() -> None:
        storage = InstantDisk(1 << 20, name="file")
        await create(CreateOptions(size=SIZE), storage)
        async with opened(storage) as device:
            assert not device.pwrite_now(65536, DATA)
            await device.pwrite(65536, DATA)
            assert device.pwrite_now(65536 + 4096, DATA)
            assert not device.pwrite_now(2 * 65536 - 2048, DATA)  # half of it is nowhere
            buffer = memoryview(bytearray(8192))
            await device.pread(65536, buffer)
            assert bytes(buffer) == bytes(DATA) * 2

    asyncio.run(main())
