# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The check finds what qemu-img finds, with the same numbers, and what it repairs is clean."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from random import Random
from typing import Any

import pytest

from nbdjobs.nodes.qcow2.check import CheckResult, Fix
from nbdjobs.nodes.qcow2.constants import COPIED, Incompatible
from nbdjobs.nodes.qcow2.create import CreateOptions, empty_image
from nbdjobs.nodes.qcow2.header import Header
from nbdjobs.nodes.qcow2.refcount_table import unpack_block
from tests.nodes.qcow2.logged_file import LoggedFile
from tests.nodes.qcow2.rig import HAS_QEMU_IMG, checked, content_of, image_of, opened

CLUSTER = 4096
DISK = 100 * CLUSTER
BLOCK, L1, L2 = 2 * CLUSTER, 3 * CLUSTER, 4 * CLUSTER

needs_qemu_img = pytest.mark.skipif(not HAS_QEMU_IMG, reason="needs qemu-img")


async def written(**options: Any) -> LoggedFile:
    """An image with data, zeroes, holes and compressed clusters."""
    wanted = CreateOptions(size=DISK, **{"cluster_size": CLUSTER, **options})
    file = LoggedFile(empty_image(wanted))
    random = Random(1)
    size = wanted.cluster_size
    async with opened(file) as device:
        await device.pwrite(0, memoryview(random.randbytes(20 * CLUSTER)))
        await device.pwrite(30 * CLUSTER, memoryview(random.randbytes(3 * CLUSTER)))
        await device.pwrite_zeroes(8 * CLUSTER, 4 * CLUSTER, may_unmap=False)
        if wanted.version > 2 and size == CLUSTER:
            content = (b"abcd" * size)[:size]
            for number in (50, 51, 60):
                node = image_of(device)
                await node.pwrite_compressed(number * CLUSTER, memoryview(content))
    return file


def theirs(image: bytes, folder: Path) -> dict[str, int]:
    """What qemu-img finds."""
    path = folder / "image.qcow2"
    path.write_bytes(image)
    done = subprocess.run(
        ["qemu-img", "check", "--output=json", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


def assert_same(ours: CheckResult, found: dict[str, int]) -> None:
    assert ours.leaks == found.get("leaks", 0), ours.messages
    assert ours.corruptions == found.get("corruptions", 0), ours.messages
    assert ours.total_clusters == found["total-clusters"]
    assert ours.allocated_clusters == found.get("allocated-clusters", 0)
    assert ours.fragmented_clusters == found.get("fragmented-clusters", 0)
    assert ours.compressed_clusters == found.get("compressed-clusters", 0)
    assert ours.image_end_offset == found["image-end-offset"]


def change_refcount(image: bytearray, cluster: int, value: int) -> None:
    block = unpack_block(bytes(image[BLOCK : BLOCK + CLUSTER]), 4)
    block[cluster] = value
    image[BLOCK : BLOCK + CLUSTER] = block.pack()


def flip_copied(image: bytearray, offset: int) -> None:
    image[offset] ^= COPIED >> 56


def leak(image: bytearray) -> None:
    change_refcount(image, 150, 1)
    change_refcount(image, 7, 3)


def lose(image: bytearray) -> None:
    change_refcount(image, 6, 0)
    change_refcount(image, 2, 0)


def flags(image: bytearray) -> None:
    flip_copied(image, L1)
    flip_copied(image, L2 + 8 * 3)
    flip_copied(image, L2 + 8 * 4)


def share(image: bytearray) -> None:
    image[L2 : L2 + 8] = image[L2 + 8 : L2 + 16]


def all_of_it(image: bytearray) -> None:
    leak(image)
    lose(image)
    flags(image)


@needs_qemu_img
@pytest.mark.interop
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"refcount_bits": 1, "cluster_size": 512},
        {"version": 2},
        {"is_extended": True, "cluster_size": 16384},
    ],
    ids=["plain", "small", "version 2", "subclusters"],
)
def test_sound_images_have_the_numbers_that_qemu_img_has(
    options: dict[str, Any], tmp_path: Path
) -> None:
    file = asyncio.run(written(**options))
    found = asyncio.run(checked(file))
    assert found.is_clean
    assert_same(found, theirs(bytes(file.content), tmp_path))


@needs_qemu_img
@pytest.mark.interop
@pytest.mark.parametrize("damage", [leak, lose, flags, share, all_of_it])
def test_damage_is_found_in_the_numbers_of_qemu_img_and_repaired(
    damage: Any, tmp_path: Path
) -> None:
    async def run() -> None:
        file = await written()
        damage(file.content)
        found = await checked(file)
        assert not found.is_clean
        assert found.messages
        assert_same(found, theirs(bytes(file.content), tmp_path))
        # In parts of a few clusters it finds the same.
        again = await checked(file, window=17)
        assert (again.leaks, again.corruptions) == (found.leaks, found.corruptions)
        fixed = await checked(file, Fix.ALL)
        assert fixed.is_clean, fixed.messages
        assert (await checked(file)).messages == []
        left = theirs(bytes(file.content), tmp_path)
        assert not left.get("leaks")
        assert not left.get("corruptions")

    asyncio.run(run())


def test_leaks_alone_can_be_repaired() -> None:
    async def run() -> None:
        file = await written()
        all_of_it(file.content)
        found = await checked(file, Fix.LEAKS)
        assert found.leaks == found.leaks_fixed > 0
        assert found.corruptions > found.corruptions_fixed == 0
        assert (await checked(file)).leaks == 0

    asyncio.run(run())


@pytest.mark.parametrize("offset", [BLOCK + 512, 1 << 40, L2], ids=["unaligned", "outside", "L2"])
def test_refcount_blocks_that_cannot_be_are_made_anew(offset: int) -> None:
    async def run() -> None:
        file = await written()
        async with opened(file, read_only=True) as device:
            before = await content_of(device)
        file.content[CLUSTER : CLUSTER + 8] = offset.to_bytes(8)
        fixed = await checked(file, Fix.ALL)
        assert fixed.corruptions
        assert fixed.is_clean, fixed.messages
        assert (await checked(file)).messages == []
        async with opened(file, read_only=True) as device:
            assert await content_of(device) == before

    asyncio.run(run())


def test_opening_for_writes_repairs_what_a_crash_left_of_late_refcounts() -> None:
    async def run() -> None:
        file = await written(is_lazy=True)
        clean = bytes(file.content)
        file.content[72 + 7] |= Incompatible.DIRTY
        change_refcount(file.content, 7, 3)
        lose(file.content)
        flags(file.content)
        async with opened(file, read_only=True):
            pass  # nothing is written, so nothing has to be right
        assert Header.parse(bytes(file.content)).incompatible & Incompatible.DIRTY
        async with opened(file):
            assert not Header.parse(bytes(file.content)).incompatible & Incompatible.DIRTY
        assert (await checked(file)).is_clean
        assert bytes(file.content) == clean

    asyncio.run(run())


def test_the_mark_of_corruption_goes_when_all_is_repaired() -> None:
    async def run() -> None:
        file = await written()
        file.content[72 + 7] |= Incompatible.CORRUPT
        flags(file.content)
        assert (await checked(file, Fix.ALL)).is_clean
        async with opened(file):
            pass

    asyncio.run(run())
