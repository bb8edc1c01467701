# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Changing sizes: which nodes can, and what is there afterwards."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from nbdjobs.errors import CommandError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.config import MAX_SIZE
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.leaky_bucket import ThrottleConfig
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.status import HOLE, BlockStatus
from nbdjobs.nodes.throttle_group import ThrottleGroup
from nbdjobs.qapi.visitor import visit
from tests.nodes.loop_device import has_loop_devices, loop_device

KIB = 1024
NEEDED = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * 256 * KIB)
    return path


Scenario = Callable[[Device, Node], Awaitable[None]]


def run(options: dict[str, Any], scenario: Scenario, *, needed: Permission = NEEDED) -> None:
    """Open a node, and run the scenario as the only user of it."""

    async def go() -> None:
        graph = Graph()
        graph.throttle_groups["none"] = ThrottleGroup(ThrottleConfig())
        node = await open_node(graph, visit(BlockdevOptions, {"node-name": "disk"} | options))
        device = Device(graph, node, needed=needed, shared=permissions.ALL)
        node.is_owned_by_user = False
        try:
            await scenario(device, node)
        finally:
            await device.close()
        assert not graph.nodes

    asyncio.run(go())


def refused(options: dict[str, Any], size: int, *, needed: Permission = NEEDED) -> str:
    """Why the size does not change."""
    refusals = []

    async def scenario(device: Device, node: Node) -> None:
        before = node.size
        with pytest.raises(CommandError) as caught:
            await node.truncate(size)
        assert node.size == before
        refusals.append(caught.value.description)

    run(options, scenario, needed=needed)
    return refusals[0]


def file(path: Path, **options: object) -> dict[str, Any]:
    return {"driver": "file", "filename": str(path)} | options


def over(image: Path, driver: str, **options: object) -> dict[str, Any]:
    child = "image" if driver == "blkdebug" else "file"
    return {"driver": driver, child: file(image)} | options


LAYERS: dict[str, dict[str, Any]] = {
    "raw": {"driver": "raw"},
    "throttle": {"driver": "throttle", "throttle-group": "none"},
    "blkdebug": {"driver": "blkdebug"},
}


def test_a_file_shrinks_and_grows_with_zeroes(image: Path) -> None:
    async def scenario(device: Device, node: Node) -> None:
        await node.truncate(64 * KIB)
        assert node.size == os.stat(image).st_size == 64 * KIB
        await node.truncate(512 * KIB)
        buffer = bytearray(512 * KIB)
        await device.pread(0, memoryview(buffer))
        assert buffer == b"x" * 64 * KIB + bytes(448 * KIB)
        await device.pwrite(511 * KIB, memoryview(b"y" * KIB))

    run(file(image), scenario)
    assert image.read_bytes()[-2 * KIB :] == bytes(KIB) + b"y" * KIB


def test_what_was_known_of_holes_is_looked_at_again(image: Path) -> None:
    async def scenario(device: Device, node: Node) -> None:
        await device.pwrite(0, memoryview(b"z" * 256 * KIB))
        assert node.is_known_data(128 * KIB, 64 * KIB)
        await node.truncate(64 * KIB)
        await node.truncate(256 * KIB)
        assert not node.is_known_data(128 * KIB, 64 * KIB)
        run = await device.block_status(64 * KIB, 192 * KIB)
        assert run == BlockStatus(192 * KIB, HOLE)

    run(file(image), scenario)


def test_a_size_that_is_no_multiple_of_a_sector_is_rounded_up(image: Path) -> None:
    async def scenario(device: Device, node: Node) -> None:
        await node.truncate(1000)
        assert (node.size, os.stat(image).st_size) == (1024, 1000)

    run(file(image), scenario)


@pytest.mark.parametrize("driver", LAYERS)
def test_layers_change_with_their_file(driver: str, image: Path) -> None:
    async def scenario(device: Device, node: Node) -> None:
        await node.truncate(8 * KIB)
        assert node.size == os.stat(image).st_size == 8 * KIB

    run(over(image, **LAYERS[driver]), scenario)


def test_a_window_with_an_offset_changes_what_is_behind_it(image: Path) -> None:
    async def scenario(device: Device, node: Node) -> None:
        await node.truncate(8 * KIB)
        assert (node.size, os.stat(image).st_size) == (8 * KIB, 12 * KIB)

    run(over(image, "raw", offset=4 * KIB), scenario)


def test_a_window_of_fixed_size_stays(image: Path) -> None:
    window = over(image, "raw", size=4 * KIB)
    assert refused(window, 8 * KIB) == "Cannot resize fixed-size raw disks"


def test_an_offset_and_a_size_have_to_fit_together(tmp_path: Path) -> None:
    huge = tmp_path / "huge.img"
    huge.touch()
    os.truncate(huge, 2 << 30)
    window = over(huge, "raw", offset=2 << 30)
    assert refused(window, MAX_SIZE) == "Disk size too large for the chosen offset"


def test_sizes_have_an_end(image: Path) -> None:
    assert (
        refused(file(image), MAX_SIZE + 1) == f"offset({MAX_SIZE + 1}) exceeds maximum({MAX_SIZE})"
    )
    assert refused(file(image), 1 << 62) == "Could not resize file: File too large"


def test_what_is_read_only_stays(image: Path) -> None:
    options = file(image) | {"read-only": True}
    assert refused(options, 512, needed=Permission.RESIZE) == "Image is read-only"


def test_a_file_that_is_read_only_until_needed_is_opened_for_writing(image: Path) -> None:
    async def scenario(device: Device, node: Node) -> None:
        await node.truncate(512)
        assert os.stat(image).st_size == 512

    run(file(image) | {"auto-read-only": True}, scenario, needed=Permission.RESIZE)


def test_drivers_without_a_changing_size_refuse() -> None:
    options = {"driver": "null-co", "size": 4 * KIB}
    assert refused(options, 512) == "Image format driver does not support resize"


def test_a_device_may_be_larger_than_wanted_but_not_smaller(image: Path) -> None:
    if not has_loop_devices():
        pytest.skip("needs a loop device")
    with loop_device(image) as device:
        options = {"driver": "host_device", "filename": str(device)}
        assert refused(options, 512 * KIB) == "Cannot grow device files"

        async def scenario(user: Device, node: Node) -> None:
            await node.truncate(64 * KIB)
            assert node.size == 256 * KIB

        run(options, scenario)
