# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Whatever part of the unflushed writes a crash leaves: the image is sound, flushed data is there.

Several clients write, zero, discard and flush at the same time, on a file that remembers what was
written in which order. Then the file is put together as crashes at random instants could have left
it, sector by sector, and looked at.
"""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from nbdjobs.nodes.node import Node
from nbdjobs.nodes.qcow2.check import Fix
from nbdjobs.nodes.qcow2.constants import Incompatible
from nbdjobs.nodes.qcow2.create import CreateOptions, empty_image
from nbdjobs.nodes.qcow2.header import Header
from nbdjobs.nodes.qcow2.snapshots import parse_snapshots
from tests.nodes.faults import MemoryNode
from tests.nodes.qcow2.logged_file import SECTOR, LoggedFile
from tests.nodes.qcow2.rig import HAS_QEMU_IMG, checked, content_of, image_of, opened, qemu_img

DISK = 192 * 1024
CLIENTS = 4
OPERATIONS = 25
CRASHES = 25


@dataclass(slots=True, eq=False)
class Change:
    """What a client did to a range, and when."""

    begin: int
    end: int
    content: bytes
    begun: int
    ended: int | None = None


@dataclass(slots=True)
class History:
    """All that clients did, by the clock of the file."""

    before: bytes
    changes: list[Change] = field(default_factory=list)
    flushes: list[tuple[int, int]] = field(default_factory=list)

    def may_hold(self, sector: int, time: int) -> set[bytes]:
        """What a sector may hold after a crash at that time."""
        begin, end = sector * SECTOR, (sector + 1) * SECTOR
        flushed = max((begun for begun, ended in self.flushes if ended <= time), default=0)
        touching = [
            change
            for change in self.changes
            if change.begin <= begin and end <= change.end and change.begun <= time
        ]
        safe = [c for c in touching if c.ended is not None and c.ended <= flushed]
        newest = max((change.begun for change in safe), default=0)
        possible = {
            change.content[begin - change.begin : end - change.begin]
            for change in touching
            if change.ended is None or change.ended >= newest
        }
        return possible if safe else possible | {self.before[begin:end]}


async def client(device: Any, file: LoggedFile, history: History, random: Random) -> None:
    for _ in range(OPERATIONS):
        begin = random.randrange(DISK // SECTOR) * SECTOR
        length = min(random.choice((1, 2, 8, 40, 100)) * SECTOR, DISK - begin)
        kind = random.choice(("write",) * 6 + ("zero", "keep", "discard", "compressed", "flush"))
        if kind == "flush":
            started = file.tick()
            await device.flush()
            history.flushes.append((started, file.tick()))
            continue
        content = random.randbytes(length) if kind == "write" else bytes(length)
        if kind == "compressed" and image_of(device).header.has_data_file:
            kind = "zero"
        if kind == "compressed":
            size = image_of(device).cluster_size
            begin, length = begin // size * size, size
            content = (random.randbytes(8) * size)[:size]
        change = Change(begin, begin + length, content, file.tick())
        history.changes.append(change)
        if kind == "write":
            await device.pwrite(begin, memoryview(content))
        elif kind == "compressed":
            await image_of(device).pwrite_compressed(begin, memoryview(content))
        elif kind == "discard":
            # By itself it may leave anything of the old content.
            await device.pwrite_zeroes(begin, length, may_unmap=True)
            await device.pdiscard(begin, length)
        else:
            await device.pwrite_zeroes(begin, length, may_unmap=kind == "zero")
        change.ended = file.tick()


async def look_at(
    image: bytes, data: bytes | None, backing: bytes | None, time: int, history: History
) -> None:
    file = LoggedFile(image)
    if Header.parse(image).incompatible & Incompatible.DIRTY:
        await checked(file, Fix.ALL)
    found = await checked(file)
    assert not found.corruptions, found.messages
    async with opened(file, *others(data, backing), read_only=True, **named(data, backing)) as disk:
        content = await content_of(disk)
    for sector in range(DISK // SECTOR):
        part = content[sector * SECTOR : (sector + 1) * SECTOR]
        assert part in history.may_hold(sector, time), f"sector {sector} at {time}"


def others(data: bytes | None, backing: bytes | None) -> list[Node]:
    """The nodes beside the image file."""
    nodes: list[Node] = []
    if data is not None:
        nodes.append(LoggedFile(data, name="data"))
    if backing is not None:
        nodes.append(MemoryNode(backing, name="base"))
    return nodes


def named(data: bytes | None, backing: bytes | None) -> dict[str, Any]:
    """Options that name them."""
    options = {}
    if data is not None:
        options["data_file"] = "data"
    if backing is not None:
        options["backing"] = "base"
    return options


IMAGES = {
    "64k": CreateOptions(size=DISK),
    "4k": CreateOptions(size=DISK, cluster_size=4096),
    "512": CreateOptions(size=DISK, cluster_size=512, refcount_bits=64),
    "subclusters": CreateOptions(size=DISK, cluster_size=16384, is_extended=True),
    "version 2": CreateOptions(size=DISK, version=2, cluster_size=1024),
    "data file": CreateOptions(size=DISK, cluster_size=512, data_file="named by the option"),
    "late refcounts": CreateOptions(size=DISK, cluster_size=512, refcount_bits=32, is_lazy=True),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("has_backing", [False, True], ids=["alone", "with backing"])
@pytest.mark.parametrize("name", IMAGES)
def test_a_crash_at_any_instant_loses_nothing_that_was_flushed(
    name: str, has_backing: bool, seed: int
) -> None:
    random = Random(f"{name} {has_backing} {seed}")
    backing = random.randbytes(DISK) if has_backing else None

    async def run() -> None:
        file = LoggedFile(empty_image(IMAGES[name]), seed=seed)
        empty = bytes(DISK) if IMAGES[name].data_file else None
        nodes = others(None, backing)
        if empty is not None:
            nodes.append(LoggedFile(empty, seed=seed + 100, name="data", clock=file.clock))
        history = History(backing or bytes(DISK))
        # So small that tables have to be written before a flush.
        more = named(empty, backing)
        more |= {"l2_cache_size": 512, "l2_cache_entry_size": 512, "refcount_cache_size": 512}
        async with opened(file, *nodes, pass_discard_other=True, **more) as device:
            clients = (client(device, file, history, random) for _ in range(CLIENTS))
            await asyncio.gather(*clients)
        last = file.tick()
        for _ in range(CRASHES):
            time = random.randrange(last + 1)
            image = file.after_crash(time, random)
            files = [node for node in nodes if isinstance(node, LoggedFile)]
            data = files[0].after_crash(time, random) if files else None
            await look_at(image, data, backing, time, history)
        found = await checked(file)
        assert (found.corruptions, found.leaks) == (0, 0), found.messages

    asyncio.run(run())


def test_a_crash_while_the_refcount_table_moves_loses_nothing() -> None:
    # A table of one cluster counts two MiB.
    size = 5 << 20
    options = CreateOptions(size=size, cluster_size=512, refcount_bits=64)
    random = Random(1)
    content = random.randbytes(5 << 19)

    async def run() -> None:
        file = LoggedFile(empty_image(options), seed=1)
        flushed = [(0, 0)]
        async with opened(file) as device:
            for begin in range(0, len(content), 1 << 18):
                await device.pwrite(begin, memoryview(content[begin : begin + (1 << 18)]))
                await device.flush()
                flushed.append((file.tick(), begin + (1 << 18)))
        assert Header.parse(bytes(file.content)).refcount_table_clusters > 1
        for _ in range(30):
            time = random.randrange(file.clock.time)
            image = LoggedFile(file.after_crash(time, random))
            found = await checked(image)
            assert not found.corruptions, found.messages
            length = max(length for ended, length in flushed if ended <= time)
            async with opened(image, read_only=True) as device:
                assert (await content_of(device))[:length] == content[:length]

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(3))
def test_a_crash_while_the_size_changes_leaves_the_old_or_the_new(seed: int) -> None:
    random = Random(seed)
    sizes = [DISK, 3 * DISK, DISK + 512, 40 * DISK, 2048, DISK]
    backing = random.randbytes(4 * DISK)

    async def run() -> None:
        file = LoggedFile(empty_image(CreateOptions(size=DISK, cluster_size=512)), seed=seed)
        base = MemoryNode(backing, name="base")
        changes = [(0, 0)]
        async with opened(file, base, backing="base") as device:
            for number, size in enumerate(sizes):
                begun = file.tick()
                await device.node.truncate(size)
                changes.append((begun, number))
                await device.pwrite(random.randrange(4) * 512, memoryview(random.randbytes(512)))
        last = file.tick()
        for _ in range(40):
            time = random.randrange(last + 1)
            image = LoggedFile(file.after_crash(time, random))
            found = await checked(image)
            assert not found.corruptions, found.messages
            now = max(number for begun, number in changes if begun <= time)
            async with opened(image, base, backing="base") as device:
                assert device.size in (sizes[now], sizes[max(now - 1, 0)])
                tail = bytearray(min(device.size, DISK))
                await device.pread(device.size - len(tail), memoryview(tail))
                if device.size > 4 * DISK:
                    assert not any(tail)

    asyncio.run(run())


@pytest.mark.interop
@pytest.mark.skipif(not HAS_QEMU_IMG, reason="needs qemu-img")
@pytest.mark.parametrize("name", ["4k", "512", "subclusters"])
def test_a_crash_never_touches_what_a_snapshot_holds(name: str, tmp_path: Path) -> None:
    random = Random(name)
    before = random.randbytes(DISK // 2) + bytes(DISK // 2)
    path = tmp_path / "image.qcow2"

    async def run() -> None:
        empty = LoggedFile(empty_image(IMAGES[name]))
        async with opened(empty) as device:
            await device.pwrite(0, memoryview(before[: DISK // 2]))
        path.write_bytes(empty.content)
        qemu_img("snapshot", "-c", "then", path)
        file = LoggedFile(path.read_bytes(), seed=1)
        history = History(before)
        more: dict[str, Any] = {"l2_cache_size": 512, "l2_cache_entry_size": 512}
        async with opened(file, **more) as device:
            clients = (client(device, file, history, random) for _ in range(CLIENTS))
            await asyncio.gather(*clients)
        last = file.tick()
        for _ in range(CRASHES):
            time = random.randrange(last + 1)
            image = file.after_crash(time, random)
            await look_at(image, None, None, time, history)
            async with opened(LoggedFile(with_snapshot_active(image)), read_only=True) as device:
                assert await content_of(device) == before
        found = await checked(file)
        assert (found.corruptions, found.leaks) == (0, 0), found.messages

    asyncio.run(run())


def with_snapshot_active(image: bytes) -> bytes:
    """The image as if its only snapshot were the disk."""
    header = Header.parse(image)
    table = image[header.snapshots_offset :]
    (snapshot,), _ = parse_snapshots(table, 1, header.cluster_size)
    shown = bytearray(image)
    struct.pack_into(">IQ", shown, 36, snapshot.l1_size, snapshot.l1_offset)
    return bytes(shown)
