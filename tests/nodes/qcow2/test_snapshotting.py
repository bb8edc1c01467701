# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots: taken, read, applied and deleted; what a crash or a failure leaves."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.qcow2.check import Fix
from nbdjobs.nodes.qcow2.create import CreateOptions, empty_image
from tests.nodes.faults import MemoryNode, Op
from tests.nodes.qcow2.rig import HAS_QEMU_IMG, checked, content_of, image_of, opened, qemu_img

CLUSTER = 4096
SIZE = 32 * CLUSTER
NOW = 1_700_000_000_123_456_789

VARIANTS: list[dict[str, Any]] = [
    {},
    {"version": 2},
    {"is_extended": True, "cluster_size": 16384},
    {"is_lazy": True},
    {"refcount_bits": 64},
    {"cluster_size": 512, "refcount_bits": 2},
]


def new_image(**options: Any) -> MemoryNode:
    chosen = {"size": SIZE, "cluster_size": CLUSTER, **options}
    return MemoryNode(_whole(empty_image(CreateOptions(**chosen))), name="file")


def _whole(image: bytes) -> bytes:
    return image.ljust(4 * 1024 * 1024, b"\0")


async def take(disk: Device, name: str) -> None:
    await image_of(disk).take_snapshot(name, NOW)


async def done(work: Awaitable[None], options: dict[str, Any]) -> bool:
    """Whether it could be done: counters of two bits are full soon."""
    if options.get("refcount_bits") != 2:
        await work
        return True
    try:
        await work
    except NodeError:
        return False
    return True


async def change(disk: Device, random: Random, count: int = 10) -> None:
    for _ in range(count):
        offset = random.randrange(SIZE // 512) * 512
        length = min(random.randrange(1, 30) * 512, SIZE - offset)
        kind = random.random()
        if kind < 0.6:
            await disk.pwrite(offset, memoryview(random.randbytes(length)))
        elif kind < 0.8:
            await disk.pwrite_zeroes(offset, length)
        elif kind < 0.9:
            await disk.pdiscard(offset, length)
        else:
            cluster = image_of(disk).cluster_size
            data = bytes([random.randrange(256)]) * cluster
            begin = offset // cluster * cluster
            await image_of(disk).pwrite_compressed(begin, memoryview(data))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_random_changes_and_snapshots_against_a_model(options: dict[str, Any], seed: int) -> None:
    random = Random(seed)

    async def go() -> None:
        file = new_image(**options)
        snapshots: dict[str, bytes] = {}
        for turn in range(10):
            async with opened(file) as disk:
                image = image_of(disk)
                await change(disk, random)
                names = {each.name.decode(): each for each in image.snapshots}
                assert set(names) == set(snapshots)
                kind = random.random()
                if kind < 0.5:
                    if await done(take(disk, f"s{turn}"), options):
                        snapshots[f"s{turn}"] = await content_of(disk)
                elif kind < 0.7 and names:
                    name = random.choice(sorted(names))
                    await image.delete_snapshot(names[name])
                    del snapshots[name]
                elif names:
                    name = random.choice(sorted(names))
                    if await done(image.apply_snapshot(names[name]), options):
                        assert await content_of(disk) == snapshots[name]
                await change(disk, random, 3)
                now = await content_of(disk)
            result = await checked(file)
            assert (result.corruptions, result.leaks) == (0, 0), result.messages
            async with opened(file, read_only=True) as disk:
                assert await content_of(disk) == now
            for name, content in snapshots.items():
                async with opened(file, read_only=True, snapshot=name) as disk:
                    assert await content_of(disk) == content

    asyncio.run(go())


def test_a_snapshot_is_found_by_its_id_and_then_by_its_name() -> None:
    async def go() -> None:
        file = new_image()
        async with opened(file) as disk:
            for name in ("2", "other"):
                await disk.pwrite(0, memoryview(name.encode().ljust(512, b"\0")))
                await take(disk, name)
            assert [each.identifier for each in image_of(disk).snapshots] == [b"1", b"2"]
            (first, second) = image_of(disk).snapshots
            assert (first.date_s, first.date_ns) == (1_700_000_000, 123_456_789)
            assert first.size == second.size == SIZE
            assert (first.saved_state_size, first.instruction_count) == (0, None)
        for wanted, found in (("2", b"other"), ("1", b"2"), ("other", b"other")):
            async with opened(file, read_only=True, snapshot=wanted) as disk:
                assert (await content_of(disk)).startswith(found + b"\0")
        with pytest.raises(CommandError, match="Snapshot '3' does not exist"):
            async with opened(file, read_only=True, snapshot="3"):
                pass
        with pytest.raises(CommandError, match="only be opened read-only"):
            async with opened(file, snapshot="1"):
                pass

    asyncio.run(go())


def test_a_counter_that_is_full_refuses_the_snapshot_and_nothing_has_changed() -> None:
    async def go() -> None:
        file = new_image(refcount_bits=1)
        async with opened(file) as disk:
            await disk.pwrite(0, memoryview(b"a" * SIZE))
            with pytest.raises(NodeError) as refusal:
                await take(disk, "s")
            assert refusal.value.errno == errno.EINVAL
            assert image_of(disk).snapshots == ()
            assert not image_of(disk).header.incompatible
            await disk.pwrite(0, memoryview(b"b" * 512))
        result = await checked(file)
        assert result.is_clean, result.messages

    asyncio.run(go())


def test_a_disk_that_has_grown_since_is_as_small_as_it_was() -> None:
    async def go() -> None:
        file = new_image(cluster_size=512)
        async with opened(file) as disk:
            await disk.pwrite(0, memoryview(b"a" * SIZE))
            await take(disk, "small")
            await image_of(disk).truncate(4 * SIZE)
            await disk.pwrite(3 * SIZE, memoryview(b"b" * 512))
            await take(disk, "large")
            large = await content_of(disk)
            (small, _) = image_of(disk).snapshots
            await image_of(disk).apply_snapshot(small)
            assert disk.size == SIZE
            assert await content_of(disk) == b"a" * SIZE
        async with opened(file, read_only=True, snapshot="large") as disk:
            assert await content_of(disk) == large
        async with opened(file) as disk:
            assert disk.size == SIZE
            await image_of(disk).apply_snapshot(image_of(disk).snapshots[1])
            assert await content_of(disk) == large
        assert (await checked(file)).is_clean

    asyncio.run(go())


async def _three(disk: Device) -> None:
    """A snapshot is taken, another applied, and that deleted."""
    await take(disk, "third")
    image = image_of(disk)
    await image.apply_snapshot(image.snapshots[0])
    await image.delete_snapshot(image.snapshots[0])


@pytest.mark.parametrize("options", VARIANTS[:4], ids=str)
@pytest.mark.parametrize("operation", [Op.WRITE, Op.FLUSH])
def test_what_fails_at_any_write_can_be_repaired_and_loses_nothing(
    options: dict[str, Any], operation: Op
) -> None:
    async def attempt(nth: int) -> bool:
        """Let the nth request fail; returns whether it came so far."""
        file = new_image(**options)
        kept: dict[str, bytes] = {}
        async with opened(file) as disk:
            for name in ("first", "second"):
                await change(disk, Random(name))
                await take(disk, name)
                kept[name] = await content_of(disk)
            await change(disk, Random("now"))
            kept["now"] = await content_of(disk)
            await disk.flush()
            fault = file.fail(operation, errno.EIO, nth=nth)
            failed = False
            try:
                await _three(disk)
            except NodeError:
                failed = True
            fault.stop()
            names = [each.name.decode() for each in image_of(disk).snapshots]
            content = await content_of(disk)
            assert content in (kept["now"], kept["first"])
        result = await checked(file, Fix.ALL)
        assert result.corruptions == result.corruptions_fixed, result.messages
        assert (await checked(file)).is_clean
        async with opened(file, read_only=True) as disk:
            assert await content_of(disk) == content
            assert [each.name.decode() for each in image_of(disk).snapshots] == names
        assert "second" in names
        for name in set(names) & set(kept):
            async with opened(file, read_only=True, snapshot=name) as disk:
                assert await content_of(disk) == kept[name]
        return failed

    async def go() -> None:
        nth = 1
        while await attempt(nth):
            nth += 1
        assert nth > 3

    asyncio.run(go())


@pytest.mark.interop
@pytest.mark.skipif(not HAS_QEMU_IMG, reason="qemu-img is not installed")
@pytest.mark.parametrize(
    "options", ["", "compat=0.10", "extended_l2=on", "lazy_refcounts=on", "cluster_size=512"]
)
def test_snapshots_go_to_qemu_and_come_from_there(tmp_path: Path, options: str) -> None:
    path = tmp_path / "disk.qcow2"
    given = ["-o", options] if options else []
    qemu_img("create", "-q", "-f", "qcow2", *given, path, str(SIZE))
    contents: list[bytes] = []

    async def ours(*names: str) -> None:
        async with opened(path) as disk:
            for name in names:
                await change(disk, Random(name))
                await take(disk, name)
                contents.append(await content_of(disk))

    asyncio.run(ours("a", "b"))
    qemu_img("check", path)
    qemu_img("snapshot", "-c", "c", path)
    contents.append(contents[-1])
    asyncio.run(ours("d"))
    listed = qemu_img("snapshot", "-l", path).splitlines()[2:]
    assert [line.split()[:2] for line in listed] == [["1", "a"], ["2", "b"], ["3", "c"], ["4", "d"]]
    raw = tmp_path / "raw"
    for number, content in enumerate(contents, 1):
        qemu_img("convert", "-l", f"snapshot.id={number}", "-O", "raw", path, raw)
        assert raw.read_bytes() == content
    qemu_img("snapshot", "-a", "a", path)

    async def read_and_delete() -> None:
        async with opened(path) as disk:
            assert await content_of(disk) == contents[0]
            image = image_of(disk)
            await image.delete_snapshot(image.snapshots[1])
            await image.apply_snapshot(image.snapshots[1])

    asyncio.run(read_and_delete())
    qemu_img("check", path)
    qemu_img("snapshot", "-d", "a", path)
    qemu_img("check", path)
    qemu_img("convert", "-O", "raw", path, raw)
    assert raw.read_bytes() == contents[2]
