# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Block devices: sizes, limits, discards and zeroes on a loop device."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes import permissions, syscalls
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.file import FileOptions
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import CacheOptions, Discard
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.raw import RawOptions
from tests.nodes.loop_device import loop_device, needs_loop_device

SIZE = 1024 * 1024
WRITER = Permission.CONSISTENT_READ | Permission.WRITE
SHARED = permissions.ALL & ~Permission.RESIZE


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"\x22" * SIZE)
    return path


def options(path: Path, *, direct: bool = False, **more: bool) -> FileOptions:
    return FileOptions(
        driver="host_device",
        node_name="d",
        filename=str(path),
        discard=Discard.UNMAP,
        cache=CacheOptions(direct=direct),
        **more,  # type: ignore[arg-type]  # members of the options, by name
    )


@needs_loop_device
@pytest.mark.parametrize("direct", [False, True])
def test_discards_and_zeroes_reach_the_device(direct: bool, image: Path) -> None:
    async def scenario(device_path: Path) -> None:
        graph = Graph()
        node = await open_node(graph, options(device_path, direct=direct))
        assert node.size == SIZE
        assert node.limits.request_alignment == (512 if direct else 1)
        device = Device(graph, node, needed=WRITER, shared=SHARED)
        await device.pdiscard(0, 65536)
        await device.pwrite_zeroes(131072, 65536, may_unmap=True, fast_only=True)
        await device.pwrite_zeroes(262144, 65536, may_unmap=False)
        with pytest.raises(NodeError):  # the kernel might have to write these zeroes
            await device.pwrite_zeroes(0, 65536, may_unmap=False, fast_only=True)
        await device.pwrite_zeroes(524288 + 100, 1000)
        await device.flush()
        await device.close()
        await graph.drop(node)

    with loop_device(image) as path:
        asyncio.run(scenario(path))
    expected = bytearray(b"\x22" * SIZE)
    for begin, length in ((0, 65536), (131072, 65536), (262144, 65536), (524388, 1000)):
        expected[begin : begin + length] = bytes(length)
    assert image.read_bytes() == expected


@needs_loop_device
def test_a_device_that_is_read_only_is_told_from_one_that_is_not(image: Path) -> None:
    async def scenario(path: Path) -> None:
        graph = Graph()
        words = "The device is not writable: Permission denied"
        with pytest.raises(CommandError) as caught:
            await open_node(graph, options(path))
        assert caught.value.description == words
        node = await open_node(graph, options(path, auto_read_only=True))
        with pytest.raises(CommandError) as caught:
            Device(graph, node, needed=WRITER, shared=SHARED)
        assert caught.value.description == words
        await graph.drop(node)
        await graph.drop(await open_node(graph, options(path, read_only=True)))

    with loop_device(image, is_read_only=True) as path:
        asyncio.run(scenario(path))


@needs_loop_device
def test_a_block_device_is_not_a_file(image: Path) -> None:
    with loop_device(image) as path:
        chosen = FileOptions(driver="file", node_name="f", filename=str(path))
        with pytest.raises(CommandError) as caught:
            asyncio.run(open_node(Graph(), chosen))
    assert caught.value.description == f"'file' driver requires '{path}' to be a regular file"


@needs_loop_device
@pytest.mark.parametrize("rotational", [0, 1])
def test_whether_a_disk_spins_is_what_the_kernel_says(
    rotational: int, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = syscalls.queue_limit

    def limit(fd: int, name: str) -> int:
        return rotational if name == "rotational" else real(fd, name)

    monkeypatch.setattr(syscalls, "queue_limit", limit)

    async def scenario(path: Path) -> None:
        graph = Graph()
        inner = await open_node(graph, options(path))
        outer = await open_node(graph, RawOptions(driver="raw", node_name="r", file="d"))
        assert outer.is_rotational is inner.is_rotational is bool(rotational)
        await graph.drop(outer)
        await graph.drop(inner)

    with loop_device(image) as path:
        asyncio.run(scenario(path))


def test_a_character_device_may_have_no_content() -> None:
    async def scenario() -> int:
        graph = Graph()
        node = await open_node(graph, options(Path("/dev/null")))
        size = node.size
        await graph.drop(node)
        return size

    assert asyncio.run(scenario()) == 0
