# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile images: a clear error, an event where metadata is wrong, and no more."""

from __future__ import annotations

import asyncio
import errno
import tracemalloc
from contextlib import suppress
from random import Random
from typing import Any

import pytest

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.preallocation import Preallocation
from nbdjobs.nodes.qcow2.constants import COMPRESSED, COPIED, Incompatible
from nbdjobs.nodes.qcow2.create import CreateOptions, empty_image
from nbdjobs.nodes.qcow2.event import BlockImageCorrupted
from nbdjobs.nodes.qcow2.header import Header
from nbdjobs.nodes.qcow2.options import OverlapCheckMode
from tests.nodes.qcow2.logged_file import LoggedFile
from tests.nodes.qcow2.rig import checked, image_of, opened

CLUSTER = 4096
DISK = 64 * CLUSTER
OPTIONS = CreateOptions(size=DISK, cluster_size=CLUSTER)
L2 = 4 * CLUSTER
"""Where the first L2 table goes, behind header, refcount table, refcount block and L1 table."""


async def written(options: CreateOptions = OPTIONS) -> bytearray:
    """An image whose first half is data."""
    file = LoggedFile(empty_image(options))
    async with opened(file) as device:
        await device.pwrite(0, memoryview(b"x" * (DISK // 2)))
    return file.content


def put(image: bytearray, offset: int, word: int) -> None:
    image[offset : offset + 8] = word.to_bytes(8)


def read(image: bytearray, offset: int = 0, **more: Any) -> list[object]:
    """Read 512 bytes, which must fail; returns the events."""
    events: list[object] = []

    async def run() -> None:
        async with opened(LoggedFile(image), events=events, **more) as device:
            with pytest.raises(NodeError) as caught:
                await device.pread(offset, memoryview(bytearray(512)))
            assert caught.value.errno == errno.EIO

    asyncio.run(run())
    return events


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            COPIED | 5 * CLUSTER + 512,
            "Cluster allocation offset 0x5200 unaligned (L2 offset: 0x4000, L2 index: 0)",
        ),
        (
            COPIED | 5 * CLUSTER + 512 | 1,
            "Preallocated zero cluster offset 0x5200 unaligned (L2 offset: 0x4000, L2 index: 0)",
        ),
    ],
)
def test_a_mapping_that_cannot_be_ends_the_use_of_the_image(entry: int, message: str) -> None:
    image = asyncio.run(written())
    put(image, L2, entry)
    file = LoggedFile(image)
    events: list[object] = []

    async def run() -> None:
        async with opened(file, events=events) as device:
            await device.pread(CLUSTER, memoryview(bytearray(512)))
            with pytest.raises(NodeError, match="corrupt"):
                await device.pread(0, memoryview(bytearray(512)))
            # From now on nothing goes, not even what went before.
            for offset in (0, CLUSTER):
                with pytest.raises(NodeError) as caught:
                    await device.pread(offset, memoryview(bytearray(512)))
                assert caught.value.errno == errno.ENOMEDIUM
        with pytest.raises(CommandError, match="Image is corrupt; cannot be opened read/write"):
            async with opened(file):
                pass
        async with opened(file, read_only=True) as device:
            await device.pread(CLUSTER, memoryview(bytearray(512)))

    asyncio.run(run())
    assert events == [
        BlockImageCorrupted(device="", node_name="disk", msg=message, fatal=True),
    ]
    assert Header.parse(bytes(file.content)).incompatible & Incompatible.CORRUPT


def test_an_image_that_is_only_read_is_not_marked_and_tells_once() -> None:
    image = asyncio.run(written())
    put(image, L2, COPIED | 5 * CLUSTER + 512)
    before = bytes(image)
    file = LoggedFile(image)
    events: list[object] = []

    async def run() -> None:
        async with opened(file, events=events, read_only=True) as device:
            for _ in range(2):
                with pytest.raises(NodeError):
                    await device.pread(0, memoryview(bytearray(512)))
            await device.pread(CLUSTER, memoryview(bytearray(512)))

    asyncio.run(run())
    assert [event.fatal for event in events if isinstance(event, BlockImageCorrupted)] == [False]
    assert file.content == before


def test_an_l2_table_at_no_place_for_one_is_told() -> None:
    image = asyncio.run(written())
    put(image, 3 * CLUSTER, COPIED | L2 + 512)
    (event,) = read(image)
    assert isinstance(event, BlockImageCorrupted)
    assert event.msg == "L2 table offset 0x4200 unaligned (L1 index: 0)"


@pytest.mark.parametrize(
    ("cluster", "kind"),
    [
        (1, "refcount table"),
        (2, "refcount block"),
        (3, "active L1 table"),
        (4, "active L2 table"),
    ],
)
def test_data_is_never_written_over_metadata(cluster: int, kind: str) -> None:
    image = asyncio.run(written())
    put(image, L2, COPIED | cluster * CLUSTER)
    file = LoggedFile(image)
    events: list[object] = []

    async def run() -> None:
        async with opened(file, events=events) as device:
            # What is next to it can be written.
            await device.pwrite(2 * CLUSTER, memoryview(b"y" * 512))
            with pytest.raises(NodeError, match=f"overlaps with {kind}"):
                await device.pwrite(0, memoryview(b"y" * 512))

    asyncio.run(run())
    (event,) = events
    assert isinstance(event, BlockImageCorrupted)
    assert (event.offset, event.size) == (cluster * CLUSTER, 512)
    assert event.fatal
    assert event.msg == f"Preventing invalid write on metadata (overlaps with {kind})"


def test_data_is_not_written_to_where_the_file_never_was() -> None:
    image = asyncio.run(written())
    put(image, L2, COPIED | 1 << 50)
    file = LoggedFile(image)

    async def run() -> None:
        async with opened(file) as device:
            with pytest.raises(NodeError, match="outside of the image file"):
                await device.pwrite(0, memoryview(b"y" * 512))

    asyncio.run(run())
    assert len(file.content) == len(image)


@pytest.mark.parametrize("place", [0, 7 * CLUSTER])
def test_places_in_a_data_file_are_those_of_the_disk(place: int) -> None:
    options = CreateOptions(size=DISK, cluster_size=CLUSTER, data_file="data")
    events: list[object] = []

    async def run() -> None:
        file = LoggedFile(empty_image(options))
        data = LoggedFile(bytes(DISK), name="data")
        async with opened(file, data, data_file="data") as device:
            await device.pwrite(0, memoryview(b"x" * (DISK // 2)))
        put(file.content, L2 + 8, COPIED | place)
        before = bytes(data.content)
        async with opened(file, data, events=events, data_file="data") as device:
            with pytest.raises(NodeError, match="does not match guest cluster offset: 0x1000"):
                await device.pwrite(CLUSTER, memoryview(b"y" * 512))
        assert data.content == before

    asyncio.run(run())
    assert len(events) == 1


def test_overlaps_are_not_looked_for_when_nobody_wants_that() -> None:
    image = asyncio.run(written())
    put(image, L2, COPIED | L2)

    async def run() -> None:
        async with opened(LoggedFile(image), overlap_check=OverlapCheckMode.NONE) as device:
            await device.pwrite(1024, memoryview(b"y" * 512))

    asyncio.run(run())


def test_free_clusters_that_hold_metadata_are_not_used() -> None:
    image = asyncio.run(written())
    # All refcounts are zero.
    image[2 * CLUSTER : 3 * CLUSTER] = bytes(CLUSTER)
    events: list[object] = []

    async def run() -> None:
        async with opened(LoggedFile(image), events=events) as device:
            with pytest.raises(NodeError):
                await device.pwrite(DISK - 512, memoryview(b"y" * 512))

    asyncio.run(run())
    assert len(events) == 1


@pytest.mark.parametrize(
    "entry",
    [COMPRESSED | 1 << 50, COMPRESSED | 5 * CLUSTER, COMPRESSED | (1 << 62) - 1],
    ids=["beyond the end", "no stream", "everything"],
)
def test_a_compressed_cluster_that_is_none_fails_that_read_alone(entry: int) -> None:
    image = asyncio.run(written())
    put(image, L2, entry)
    assert read(image) == []


def test_a_backing_name_that_leads_nowhere_is_refused() -> None:
    options = CreateOptions(size=DISK, cluster_size=CLUSTER, backing_file="/nowhere/at/all")

    async def run() -> None:
        with pytest.raises(CommandError, match="Could not open backing file: Could not open"):
            async with opened(LoggedFile(empty_image(options))):
                pass

    asyncio.run(run())


IMAGES = [
    CreateOptions(size=DISK, cluster_size=CLUSTER),
    CreateOptions(size=DISK, cluster_size=512, refcount_bits=1),
    CreateOptions(size=DISK, cluster_size=16384, is_extended=True),
    CreateOptions(size=DISK, cluster_size=512, version=2),
    CreateOptions(size=DISK, cluster_size=CLUSTER, is_lazy=True, refcount_bits=64),
]
assert all(options.preallocation is Preallocation.OFF for options in IMAGES)


def damaged(image: bytearray, random: Random) -> bytearray:
    """Change a few bytes or words, most of them in metadata."""
    broken = bytearray(image)
    for _ in range(random.choice((1, 1, 2, 5, 20))):
        end = random.choice((128, 512, 8 * CLUSTER, len(broken)))
        place = random.randrange(min(end, len(broken)) // 8) * 8
        old = int.from_bytes(broken[place : place + 8])
        word = random.choice(
            (
                random.getrandbits(64),
                old ^ 1 << random.randrange(64),
                random.randrange(len(broken)) & ~511 | COPIED,
                random.randrange(8) * CLUSTER | COPIED,
                0,
                (1 << 64) - 1,
            )
        )
        put(broken, place, word)
    return broken


async def use(file: LoggedFile, random: Random) -> None:
    """Do what a client would, whatever comes of it."""
    events: list[object] = []
    is_read_only = random.random() < 0.2
    async with opened(file, events=events, read_only=is_read_only) as device:
        for _ in range(8):
            offset = random.randrange(max(min(device.size, 1 << 40) // 512, 1)) * 512
            length = min(random.choice((512, 4096, 30000)), max(device.size - offset, 0))
            with suppress(NodeError):
                if is_read_only or random.random() < 0.5:
                    await device.pread(offset, memoryview(bytearray(length)))
                elif random.random() < 0.6:
                    await device.pwrite(offset, memoryview(b"z" * length))
                elif random.random() < 0.5:
                    await device.pwrite_zeroes(offset, max(length, 512))
                else:
                    await device.pdiscard(offset, max(length, 512))
            with suppress(NodeError):
                await device.block_status(offset, max(length, 512))
            with suppress(NodeError):
                await device.flush()
        assert len([e for e in events if isinstance(e, BlockImageCorrupted)]) <= 2
        assert image_of(device).filename is not None


@pytest.mark.parametrize("seed", range(40))
def test_damaged_images_are_refused_or_used_with_bounded_memory(seed: int) -> None:
    random = Random(seed)
    options = IMAGES[seed % len(IMAGES)]

    async def run() -> None:
        image = await written(options)
        for _ in range(12):
            file = LoggedFile(damaged(image, random))
            with suppress(CommandError, NodeError):
                async with asyncio.timeout(60):
                    await checked(file)
            with suppress(CommandError):
                async with asyncio.timeout(60):
                    await use(file, random)
            # A write to a mad place would have made the file as large.
            assert len(file.content) < 1 << 40

    tracemalloc.start()
    try:
        asyncio.run(run())
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
    finally:
        tracemalloc.stop()


def test_an_own_table_that_is_nowhere_is_made() -> None:
    image = bytearray(empty_image(OPTIONS))
    put(image, 3 * CLUSTER, COPIED)

    async def run() -> None:
        async with opened(LoggedFile(image)) as device:
            buffer = memoryview(bytearray(b"?" * 512))
            await device.pread(0, buffer)
            assert bytes(buffer) == bytes(512)
            await device.pwrite(0, memoryview(b"x" * 512))
            await device.pread(0, buffer)
            assert bytes(buffer) == b"x" * 512

    asyncio.run(run())
