# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Which ranges count as being in the page cache."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from nbdjobs.nodes.device import Device
from nbdjobs.nodes.file import FileOptions
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import CacheOptions
from nbdjobs.nodes.raw import RawOptions
from nbdjobs.nodes.residency import NOTHING_RESIDENT, Residency

PAGE = 4096
SIZE = 64 * PAGE


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(SIZE))
    return path


def test_what_was_just_written_is_there_and_what_the_kernel_dropped_is_not(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    residency = Residency(fd, SIZE)
    try:
        assert residency.covers(0, SIZE)
        assert residency.covers(PAGE + 1, 3 * PAGE - 2)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if residency.covers(0, SIZE):
            pytest.skip("this file system keeps everything in memory")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(fd, PAGE, 8 * PAGE)
        assert residency.covers(8 * PAGE, PAGE)
        assert residency.covers(9 * PAGE - 1, 1)
        assert not residency.covers(9 * PAGE - 1, 2)
        assert not residency.covers(8 * PAGE - 1, 2)
        assert not residency.covers(0, 8 * PAGE)
    finally:
        residency.close()
        os.close(fd)


def test_nothing_behind_the_end_or_after_closing_is_there(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    residency = Residency(fd, SIZE - 512)
    os.close(fd)
    assert residency.covers(SIZE - PAGE, PAGE - 512)
    assert not residency.covers(SIZE - PAGE, PAGE - 511)
    residency.close()
    assert not residency.covers(0, PAGE)
    residency.close()


def test_a_disk_too_large_to_map_is_never_there() -> None:
    fd = os.memfd_create("disk")
    try:
        os.ftruncate(fd, 1 << 50)
        assert not Residency(fd, 1 << 50).covers(0, PAGE)
    finally:
        os.close(fd)
    assert not NOTHING_RESIDENT.covers(0, 0)


def file_options(path: Path, **cache: bool) -> FileOptions:
    return FileOptions(
        driver="file", node_name="file", filename=str(path), cache=CacheOptions(**cache)
    )


def test_a_device_tells_where_its_disk_is_stored_and_counts_it_as_read(path: Path) -> None:
    expected = path.read_bytes()[2 * PAGE : 4 * PAGE]

    async def scenario() -> None:
        graph = Graph()
        node = await open_node(
            graph,
            RawOptions(
                driver="raw",
                node_name="window",
                offset=PAGE,
                size=SIZE // 2,
                file=file_options(path),
            ),
        )
        device = Device(graph, node)
        found = device.stored_at(PAGE, 2 * PAGE, False)
        assert found is not None
        assert os.pread(found.fd, len(found), found.offset) == expected
        assert device.accounting.read.operations == 1
        assert device.accounting.read.length == 2 * PAGE
        device.hold()
        assert device.stored_at(PAGE, 2 * PAGE, False) is None
        device.release()
        assert device.accounting.read.operations == 1
        await device.close()
        await graph.drop(node)

    asyncio.run(scenario())


def stored_in_file(options: FileOptions, *, data_only: bool) -> bool:
    async def scenario() -> bool:
        graph = Graph()
        node = await open_node(graph, options)
        found = node.stored_at(0, PAGE, data_only)
        await graph.drop(node)
        return found is not None

    return asyncio.run(scenario())


def test_who_knows_of_holes_is_not_sent_their_zeroes(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, SIZE)
    path.read_bytes()
    assert not stored_in_file(file_options(path), data_only=True)
    assert stored_in_file(file_options(path), data_only=False)


@pytest.mark.parametrize("direct", [True, False])
def test_past_the_page_cache_nothing_is_sent_from_it(path: Path, direct: bool) -> None:
    assert stored_in_file(file_options(path, direct=direct), data_only=False) != direct
