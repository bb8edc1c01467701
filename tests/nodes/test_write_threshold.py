# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Write thresholds: reported once, for every way to write, and for free when there are none."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nbdjobs.errors import NodeError
from nbdjobs.nodes.config import DetectZeroes, Limits, NodeConfig
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.file import FileOptions
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.raw import RawOptions
from tests.nodes.faults import MemoryNode

THRESHOLD = 8192

Write = Callable[[Node, int, int], Awaitable[None]]


async def write(node: Node, offset: int, length: int) -> None:
    await node.pwrite(offset, memoryview(b"x" * length))


async def write_zero_bytes(node: Node, offset: int, length: int) -> None:
    await node.pwrite(offset, memoryview(bytes(length)))


async def write_zeroes(node: Node, offset: int, length: int) -> None:
    await node.pwrite_zeroes(offset, length)


async def discard(node: Node, offset: int, length: int) -> None:
    await node.pdiscard(offset, length)


def reports(act: Write, *ranges: tuple[int, int], node: Node | None = None) -> list[object]:
    """What is told while the ranges are written one after the other."""
    told: list[object] = []
    disk = node or MemoryNode(65536)
    disk.set_write_threshold(THRESHOLD, lambda *report: told.append(report))

    async def go() -> None:
        for offset, length in ranges:
            await act(disk, offset, length)

    asyncio.run(go())
    return told


@pytest.mark.parametrize("act", [write, write_zeroes, write_zero_bytes])
def test_a_write_beyond_is_told_once(act: Write) -> None:
    assert reports(act, (0, 8192), (8191, 512), (20000, 512)) == [(THRESHOLD, 511)]


@pytest.mark.parametrize("act", [write, write_zeroes, write_zero_bytes])
@pytest.mark.parametrize("detect", DetectZeroes)
def test_whatever_the_gate_makes_of_it_the_guests_request_counts(
    act: Write, detect: DetectZeroes
) -> None:
    node = MemoryNode(
        65536,
        config=NodeConfig(detect_zeroes=detect),
        limits=Limits(request_alignment=4096, max_transfer=4096),
    )
    assert reports(act, (7000, 10_000), node=node) == [(THRESHOLD, 7000 + 10_000 - THRESHOLD)]


def test_discards_are_no_writes() -> None:
    assert reports(discard, (0, 65536)) == []


def test_a_threshold_can_be_taken_back_or_moved() -> None:
    told: list[object] = []
    disk = MemoryNode(65536)

    async def go() -> None:
        disk.set_write_threshold(512, lambda *report: told.append(report))
        disk.set_write_threshold(0, lambda *report: told.append(report))
        await write(disk, 0, 1024)
        disk.set_write_threshold(4096, lambda *report: told.append(report))
        await write(disk, 0, 1024)
        assert disk.write_threshold == 4096
        await write(disk, 4096, 1)
        assert disk.write_threshold == 0

    asyncio.run(go())
    assert told == [(4096, 1)]


def test_a_negative_threshold_is_never_exceeded() -> None:
    told: list[object] = []
    disk = MemoryNode(65536)
    disk.set_write_threshold(-1, lambda *report: told.append(report))
    asyncio.run(write(disk, 0, 65536))
    assert (told, disk.write_threshold) == ([], -1)


def test_without_a_threshold_the_gate_is_open() -> None:
    disk = MemoryNode(65536)
    assert disk._writes_pass
    reports(write, (0, 8192), (8192, 1), node=disk)
    assert disk._writes_pass


def test_the_storage_does_not_copy_past_a_threshold(tmp_path: Path) -> None:
    """Neither that of the node written to, nor that of a layer above it."""

    async def go() -> None:
        graph = Graph()
        for name in ("source", "target"):
            path = tmp_path / name
            path.write_bytes(bytes(65536))
            options = FileOptions(driver="file", node_name=name, filename=str(path))
            await open_node(graph, options)
        top = await open_node(graph, RawOptions(driver="raw", node_name="top", file="target"))
        needed = Permission.CONSISTENT_READ | Permission.WRITE
        writer = Device(graph, top, needed=needed)
        reader = Device(graph, graph.find("source"))
        for watched in ("target", "top"):
            graph.find(watched).set_write_threshold(512, lambda *_: None)
            with pytest.raises(NodeError):
                await graph.find("source").copy_range(0, top, 0, 65536)
            graph.find(watched).set_write_threshold(0, lambda *_: None)
        await writer.close()
        await reader.close()
        for name in ("top", "target", "source"):
            await graph.drop(graph.find(name))

    asyncio.run(go())
