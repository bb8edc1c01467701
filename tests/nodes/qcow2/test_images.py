# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What images have beside data: snapshots, bitmaps, features of others, sizes and caches."""

from __future__ import annotations

import asyncio
import errno
import struct
from pathlib import Path
from random import Random
from typing import Any

import pytest

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.activity import activate, inactivate
from nbdjobs.nodes.block_copy import BlockCopy, CopyTuning, choose_cluster_size
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.file import FileOptions
from nbdjobs.nodes.graph import Edge, Graph, Role
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import Discard
from nbdjobs.nodes.permissions import ALL, Permission
from nbdjobs.nodes.qcow2.bitmaps import BitmapEntry, BitmapFlag, parse_directory
from nbdjobs.nodes.qcow2.constants import Autoclear, Incompatible
from nbdjobs.nodes.qcow2.create import CreateOptions, empty_image
from nbdjobs.nodes.qcow2.header import Header
from nbdjobs.nodes.qcow2.options import Qcow2Options
from nbdjobs.nodes.qcow2.refcount_table import unpack_block
from nbdjobs.nodes.qcow2.snapshots import Snapshot, parse_snapshots
from nbdjobs.nodes.status import Status
from tests.nodes.faults import MemoryNode
from tests.nodes.qcow2.logged_file import LoggedFile
from tests.nodes.qcow2.rig import (
    HAS_QEMU_IMG,
    WRITER,
    checked,
    content_of,
    image_of,
    make,
    opened,
    qemu_img,
)

CLUSTER = 4096
DISK = 64 * CLUSTER
OPTIONS = CreateOptions(size=DISK, cluster_size=CLUSTER)

needs_qemu_img = pytest.mark.skipif(not HAS_QEMU_IMG, reason="needs qemu-img")


def header_of(file: LoggedFile) -> Header:
    return Header.parse(bytes(file.content))


async def resize(device: Device, size: int) -> None:
    await device.node.truncate(size)


# Snapshots


@needs_qemu_img
@pytest.mark.interop
@pytest.mark.parametrize(("version", "is_extended"), [(2, False), (3, False), (3, True)])
def test_what_a_snapshot_holds_is_never_written(
    version: int, is_extended: bool, tmp_path: Path
) -> None:
    size = 16384
    disk = 60 * size
    path = tmp_path / "a.qcow2"
    random = Random(version)

    async def run() -> None:
        wanted = CreateOptions(
            size=disk, version=version, cluster_size=size, is_extended=is_extended
        )
        await make(path, wanted)
        model = bytearray(disk)
        async with opened(path) as device:
            for _ in range(10):
                await change(device, model, random)
            content = (b"compressed" * size)[:size]
            await image_of(device).pwrite_compressed(8 * size, memoryview(content))
            model[8 * size : 9 * size] = content
        qemu_img("snapshot", "-c", "then", path)
        before = bytes(model)
        async with opened(path) as device:
            for _ in range(20):
                await change(device, model, random)
            assert await content_of(device) == model
        qemu_img("check", path)
        qemu_img("convert", "-l", "snapshot.name=then", "-O", "raw", path, tmp_path / "then")
        assert (tmp_path / "then").read_bytes() == before
        qemu_img("snapshot", "-d", "then", path)
        qemu_img("check", path)
        async with opened(path) as device:
            assert await content_of(device) == model
            for _ in range(5):
                await change(device, model, random)
            assert await content_of(device) == model
        qemu_img("check", path)

    asyncio.run(run())


async def change(device: Device, model: bytearray, random: Random) -> None:
    offset = random.randrange(len(model) // 512) * 512
    length = min(random.choice((512, 5000, 16384, 100_000)), len(model) - offset)
    kind = random.choice(("write", "write", "zero", "unmap"))
    content = random.randbytes(length) if kind == "write" else bytes(length)
    if kind == "write":
        await device.pwrite(offset, memoryview(content))
    else:
        await device.pwrite_zeroes(offset, length, may_unmap=kind == "unmap")
    model[offset : offset + length] = content


def test_a_table_of_snapshots_is_read_as_it_is_written() -> None:
    snapshots = (
        Snapshot(l1_offset=CLUSTER, l1_size=1, identifier=b"1", name=b"a", extra=b"x" * 16),
        Snapshot(l1_offset=2 * CLUSTER, l1_size=3, identifier=b"22", name=b"", date_s=5),
    )
    table = b"".join(snapshot.pack() for snapshot in snapshots)
    assert parse_snapshots(table + b"behind", 2, CLUSTER) == (snapshots, len(table))
    for cut in range(len(table) - 6):  # the padding at the end need not be there
        with pytest.raises(CommandError, match="Snapshot table too large"):
            parse_snapshots(table[:cut], 2, CLUSTER)


@pytest.mark.parametrize(
    ("offset", "size", "extra"), [(1, 1, 0), (1 << 63, 1, 0), (0, 1 << 31, 0), (0, 1, 1 << 20)]
)
def test_snapshots_that_cannot_be_are_refused(offset: int, size: int, extra: int) -> None:
    entry = struct.pack(">QIHHIIQII", offset, size, 1, 1, 0, 0, 0, 0, extra)
    with pytest.raises(CommandError):
        parse_snapshots(entry + bytes(100), 1, CLUSTER)


# Bitmaps


def entry(name: bytes, flags: int) -> BitmapEntry:
    return BitmapEntry(
        table_offset=CLUSTER,
        table_size=1,
        flags=flags,
        kind=1,
        granularity_bits=16,
        extra=b"",
        name=name,
    )


@needs_qemu_img
@pytest.mark.interop
def test_bitmaps_stay_and_those_that_missed_changes_say_so(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"

    async def run() -> None:
        await make(path, OPTIONS)
        for name in ("on", "off"):
            qemu_img("bitmap", "--add", path, name)
        qemu_img("bitmap", "--disable", path, "off")
        before = path.read_bytes()
        async with opened(path) as device:
            await content_of(device)
        assert path.read_bytes() == before
        async with opened(path) as device:
            await device.pwrite(0, memoryview(b"x"))
        qemu_img("check", path)
        told = qemu_img("info", "--output=json", path)
        bitmaps = Header.parse(path.read_bytes()).bitmaps
        assert bitmaps is not None
        begin = bitmaps.directory_offset
        directory = path.read_bytes()[begin : begin + bitmaps.directory_size]
        flags = {each.name: each.flags for each in parse_directory(directory, bitmaps.count)}
        assert flags == {b"on": BitmapFlag.AUTO | BitmapFlag.IN_USE, b"off": 0}, told

    asyncio.run(run())


def test_a_directory_of_bitmaps_is_read_as_it_is_written_or_refused() -> None:
    entries = (entry(b"a", 2), entry(b"longer name", 0))
    directory = b"".join(each.pack() for each in entries)
    assert parse_directory(directory, 2) == entries
    for cut in range(len(directory)):
        with pytest.raises(CommandError, match="Bitmap directory is damaged"):
            parse_directory(directory[:cut], 2)


# Features of others


def test_features_that_a_writer_must_clear_are_cleared_by_writers_only() -> None:
    unknown = 1 << 40

    async def run() -> None:
        file = LoggedFile(empty_image(OPTIONS))
        file.content[88:96] = (unknown | Autoclear.BITMAPS).to_bytes(8)
        async with opened(file, read_only=True):
            pass
        assert header_of(file).autoclear & unknown
        async with opened(file):
            pass
        assert header_of(file).autoclear == Autoclear.BITMAPS

    asyncio.run(run())


def test_the_mark_of_late_refcounts_is_there_while_they_are_late() -> None:
    async def run() -> None:
        file = LoggedFile(empty_image(OPTIONS))
        async with opened(file, lazy_refcounts=True) as device:
            assert not header_of(file).incompatible
            await device.pwrite(0, memoryview(b"x"))
            assert header_of(file).incompatible == Incompatible.DIRTY
            await device.flush()
        assert not header_of(file).incompatible
        assert (await checked(file)).is_clean

    asyncio.run(run())


# Sizes


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("has_backing", [False, True])
def test_a_disk_grows_and_shrinks_and_what_is_new_is_zero(version: int, has_backing: bool) -> None:
    options = CreateOptions(size=DISK, version=version, cluster_size=512)
    random = Random(3)
    backing = random.randbytes(3 * DISK)

    async def run() -> None:
        file = LoggedFile(empty_image(options))
        nodes = [MemoryNode(backing, name="base")] if has_backing else []
        more: dict[str, Any] = {"backing": "base"} if has_backing else {}
        model = bytearray(backing[:DISK] if has_backing else DISK)
        async with opened(file, *nodes, **more) as device:
            await device.pwrite(DISK - 700, memoryview(b"x" * 700))
            model[-700:] = b"x" * 700
            for size in (DISK + 512, 2 * DISK, DISK - 1024, 5 * DISK, 1536, DISK):
                await resize(device, size)
                assert device.size == size
                del model[size:]
                model += bytes(size - len(model))
                assert await content_of(device) == model
                await change(device, model, random)
        found = await checked(file)
        assert (found.corruptions, found.leaks) == (0, 0), found.messages
        assert header_of(file).size == DISK
        async with opened(file, *nodes, **more) as device:
            assert await content_of(device) == model

    asyncio.run(run())


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (1000, "The new size must be a multiple of 512"),
        (1 << 50, "Failed to grow the L1 table: File too large"),
    ],
)
def test_sizes_that_cannot_be_are_refused(size: int, message: str) -> None:
    async def run() -> None:
        options = CreateOptions(size=DISK, cluster_size=512)
        async with opened(LoggedFile(empty_image(options))) as device:
            with pytest.raises(CommandError, match=message):
                await resize(device, size)
            assert device.size == DISK

    asyncio.run(run())


def test_the_refcount_table_grows_with_the_image() -> None:
    # One block counts 64 clusters and one table cluster has 64 blocks: two MiB.
    options = CreateOptions(size=5 << 20, cluster_size=512, refcount_bits=64)

    async def run() -> None:
        file = LoggedFile(empty_image(options))
        content = Random(1).randbytes(4 << 20)
        async with opened(file) as device:
            for begin in range(0, len(content), 1 << 19):
                await device.pwrite(begin, memoryview(content[begin : begin + (1 << 19)]))
        assert header_of(file).refcount_table_clusters > 1
        assert (await checked(file)).is_clean
        async with opened(file, read_only=True) as device:
            assert (await content_of(device))[: len(content)] == content

    asyncio.run(run())


# Compressed clusters


@pytest.mark.parametrize("refcount_bits", [1, 2, 16])
def test_compressed_clusters_are_packed_as_far_as_refcounts_can_tell(refcount_bits: int) -> None:
    options = CreateOptions(size=DISK, cluster_size=CLUSTER, refcount_bits=refcount_bits)

    async def run() -> None:
        file = LoggedFile(empty_image(options))
        before = len(file.content)
        async with opened(file) as device:
            node = image_of(device)
            content = Random(1).randbytes(CLUSTER // 4) * 64
            await node.pwrite_compressed(0, memoryview(content))
            await device.flush()
            assert await content_of(device) == content + bytes(DISK - len(content))
        used = len(file.content) - before
        assert used < 16 * CLUSTER // (2 if refcount_bits == 16 else 1) + 2 * CLUSTER
        assert (await checked(file)).is_clean

    asyncio.run(run())


def test_compressed_writes_are_of_whole_clusters() -> None:
    async def run() -> None:
        async with opened(LoggedFile(empty_image(OPTIONS))) as device:
            for offset, length in ((512, CLUSTER), (0, 512)):
                with pytest.raises(NodeError, match="whole clusters"):
                    await image_of(device).pwrite_compressed(offset, memoryview(bytes(length)))

    asyncio.run(run())


@pytest.mark.parametrize("cluster_size", [512, 65536, 1 << 20])
def test_a_copy_can_be_compressed(cluster_size: int) -> None:
    size = (3 << 20) + 512
    content = bytearray((b"some words that come again " * size)[:size])
    content[1 << 20 : 2 << 20] = bytes(1 << 20)
    content[70_000:75_000] = bytes(5000)

    async def run() -> None:
        file = LoggedFile(empty_image(CreateOptions(size=size, cluster_size=cluster_size)))
        before = len(file.content)
        source = MemoryNode(bytes(content), name="source")
        async with opened(file) as device:
            target = device.node
            copy = BlockCopy(
                Edge(device, "source", source, Role.ROOT),
                Edge(device, "target", target, Role.ROOT),
                cluster_size=choose_cluster_size(target),
                tuning=CopyTuning(compresses=True),
            )
            await copy.copy(0, size)
            assert await content_of(device) == content
        found = await checked(file)
        assert found.is_clean
        assert found.compressed_clusters == found.allocated_clusters > 0
        assert len(file.content) - before < 2 * cluster_size + size // 4

    asyncio.run(run())


# Reading without a wait, and caches


def test_allocated_clusters_are_read_on_the_spot(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"

    async def run() -> None:
        await make(path, OPTIONS)
        content = Random(1).randbytes(8 * CLUSTER)
        async with opened(path) as device:
            buffer = memoryview(bytearray(6 * CLUSTER))
            assert not device.pread_now(100, buffer, True)
            await device.pwrite(0, memoryview(content))
            assert device.pread_now(100, buffer, True)
            assert buffer == content[100 : 100 + len(buffer)]
            assert device.is_known_data(0, 8 * CLUSTER)
            assert not device.is_known_data(0, 8 * CLUSTER + 1)
            assert not device.pread_now(DISK - 100, buffer, False)
            assert not device.pread_now(-100, buffer, False)

    asyncio.run(run())


def test_a_small_cache_is_enough_for_a_large_disk() -> None:
    options = CreateOptions(size=1 << 40, cluster_size=CLUSTER)
    random = Random(5)

    async def run() -> None:
        file = LoggedFile(empty_image(options))
        small = {"l2_cache_size": 2048, "l2_cache_entry_size": 512}
        written = {}
        async with opened(file, **small) as device:  # type: ignore[arg-type]
            for _ in range(60):
                offset = random.randrange(1 << 31) * 512
                written[offset] = random.randbytes(512)
                await device.pwrite(offset, memoryview(written[offset]))
            image = image_of(device)._image
            assert image is not None
            assert len(image.tables.slices) <= 4
            buffer = bytearray(512)
            for offset, content in written.items():
                await device.pread(offset, memoryview(buffer))
                assert buffer == content
        found = await checked(file)
        assert (found.corruptions, found.leaks) == (0, 0), found.messages

    asyncio.run(run())


def test_a_cluster_is_not_used_anew_while_a_slow_write_to_it_is_under_way() -> None:
    """The write began before the cluster was given up, and would hit somebody else's data."""

    class SlowFile(LoggedFile):
        gate: asyncio.Event | None = None
        reached = asyncio.Event()

        async def _pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
            gate, self.gate = self.gate, None
            if gate is not None:
                self.reached.set()
                await gate.wait()
            await super()._pwrite(offset, data, fua)

    async def run() -> None:
        file = SlowFile(empty_image(OPTIONS))
        async with opened(file) as device:
            await device.pwrite(0, memoryview(b"a" * CLUSTER))
            await device.flush()
            gate = file.gate = asyncio.Event()
            slow = asyncio.create_task(device.pwrite(0, memoryview(b"slow" * (CLUSTER // 4))))
            await file.reached.wait()
            await device.pwrite_zeroes(0, CLUSTER, may_unmap=True)
            for _ in range(3):
                await device.flush()
            others = memoryview(b"b" * (10 * CLUSTER))
            await device.pwrite(20 * CLUSTER, others)
            gate.set()
            await slow
            content = await content_of(device)
        assert content[20 * CLUSTER : 30 * CLUSTER] == others
        assert content[:CLUSTER] in (bytes(CLUSTER), b"slow" * (CLUSTER // 4))
        assert (await checked(file)).is_clean

    asyncio.run(run())


def test_status_tells_what_this_image_holds_and_what_is_below() -> None:
    async def run() -> None:
        base = MemoryNode(b"d" * (8 * CLUSTER) + bytes(8 * CLUSTER), name="base")
        file = LoggedFile(empty_image(OPTIONS))
        async with opened(file, base, backing="base") as device:
            await device.pwrite(0, memoryview(b"x" * CLUSTER))
            await device.pwrite_zeroes(CLUSTER, CLUSTER)
            found = []
            offset = 0
            while offset < DISK:
                run = await device.block_status(offset, DISK - offset)
                found.append((offset // CLUSTER, run.status))
                offset += run.length
        assert found == [
            (0, Status.DATA | Status.ALLOCATED),
            (1, Status.ZERO | Status.ALLOCATED),
            (2, Status.DATA),
            (8, Status.ZERO),
            (16, Status.ZERO),
        ]

    asyncio.run(run())


def test_only_a_writer_of_the_image_may_change_the_file() -> None:
    async def run() -> None:
        file = LoggedFile(empty_image(OPTIONS))
        async with opened(file) as device:
            graph = device._graph
            with pytest.raises(CommandError, match="uses node 'file' as 'file' child"):
                Device(graph, file, needed=WRITER, shared=ALL)
            assert device.edge.needed == WRITER
            assert Permission.RESIZE in image_of(device).edges["file"].needed

    asyncio.run(run())


def test_an_image_is_handed_over_and_taken_back(tmp_path: Path) -> None:
    """What others did to it meanwhile is seen, and what was put off was written before."""
    path = tmp_path / "a.qcow2"

    async def run() -> None:
        await make(path, CreateOptions(size=DISK, cluster_size=CLUSTER, is_lazy=True))
        graph = Graph()
        wanted = Qcow2Options(
            driver="qcow2",
            node_name="disk",
            discard=Discard.UNMAP,
            file=FileOptions(driver="file", filename=str(path)),
        )
        node = await open_node(graph, wanted)
        buffer = bytearray(512)
        for _ in range(2):
            device = Device(graph, node, needed=WRITER)
            await device.pwrite(0, memoryview(b"mine" * CLUSTER))
            await device.pwrite_zeroes(0, CLUSTER)
            await device.close()
            await inactivate(graph, [node])
            found = await checked(LoggedFile(path.read_bytes()))
            assert (found.leaks, found.corruptions) == (0, 0)
            assert not Header.parse(path.read_bytes()).incompatible
            async with opened(path) as other:
                await other.pwrite(512, memoryview(b"o" * 512))
            await activate(graph, [node])
            await node.pread(512, memoryview(buffer))
            assert buffer == b"o" * 512
        node.is_owned_by_user = False
        await graph.drop_if_unused(node)
        found = await checked(LoggedFile(path.read_bytes()))
        assert (found.leaks, found.corruptions) == (0, 0)

    asyncio.run(run())


@pytest.mark.parametrize("nth", range(1, 500, 25))
def test_requests_cancelled_at_any_point_leave_a_sound_image(nth: int) -> None:
    # So small that all kinds of tables have to grow meanwhile.
    options = CreateOptions(size=5 << 20, cluster_size=512, refcount_bits=64)
    content = Random(nth).randbytes(3 << 20)

    class CancellingFile(LoggedFile):
        victim: asyncio.Task[None] | None = None
        writes_left = nth

        async def _put(self, offset: int, data: bytes) -> None:
            self.writes_left -= 1
            if not self.writes_left and self.victim is not None:
                self.victim.cancel()
            await super()._put(offset, data)

    async def run() -> None:
        file = CancellingFile(empty_image(options), seed=nth)
        async with opened(file, l2_cache_size=512, l2_cache_entry_size=512) as device:
            file.victim = asyncio.create_task(device.pwrite(0, memoryview(content)))
            await asyncio.wait([file.victim])
            assert file.victim.cancelled()
            await device.pwrite(0, memoryview(content))
        assert header_of(file).refcount_table_clusters > 1
        found = await checked(file)
        assert (found.corruptions, found.leaks) == (0, 0), found.messages
        async with opened(file, read_only=True) as device:
            assert (await content_of(device))[: len(content)] == content

    asyncio.run(run())


@pytest.mark.parametrize("nth", range(1, 520, 52))
@pytest.mark.parametrize("is_written", [False, True])
def test_an_error_at_any_write_fails_that_request_alone(nth: int, is_written: bool) -> None:
    """A write that failed may have reached the file all the same."""
    options = CreateOptions(size=5 << 20, cluster_size=512, refcount_bits=64)
    content = Random(nth).randbytes(3 << 20)

    class FailingFile(LoggedFile):
        writes_left = nth

        async def _put(self, offset: int, data: bytes) -> None:
            self.writes_left -= 1
            if self.writes_left or is_written:
                await super()._put(offset, data)
            if not self.writes_left:
                raise NodeError(errno.EIO)

    async def run() -> None:
        file = FailingFile(empty_image(options), seed=nth)
        events: list[object] = []
        small: dict[str, Any] = {"l2_cache_size": 512, "l2_cache_entry_size": 512}
        async with opened(file, events=events, **small) as device:
            failures = 0
            for begin in range(0, len(content), 100_000):
                part = memoryview(content[begin : begin + 100_000])
                try:
                    await device.pwrite(begin, part)
                    await device.flush()
                except NodeError:
                    failures += 1
                    await device.pwrite(begin, part)
            assert failures == 1
            await device.flush()
            assert (await content_of(device))[: len(content)] == content
        assert not events
        found = await checked(file)
        assert (found.corruptions, found.leaks) == (0, 0), found.messages
        async with opened(file, read_only=True) as device:
            assert (await content_of(device))[: len(content)] == content

    asyncio.run(run())


def test_clusters_of_a_write_that_failed_are_free_again_when_the_image_is_closed() -> None:
    class FullFile(LoggedFile):
        is_full = False

        async def _put(self, offset: int, data: bytes) -> None:
            if self.is_full and offset >= len(self.content):
                raise NodeError(errno.ENOSPC)
            await super()._put(offset, data)

    async def run() -> None:
        file = FullFile(empty_image(OPTIONS))
        async with opened(file) as device:
            await device.pwrite(0, memoryview(b"x" * CLUSTER))
            await device.flush()
            file.is_full = True
            with pytest.raises(NodeError) as caught:
                await device.pwrite(CLUSTER, memoryview(b"x" * CLUSTER))
            assert caught.value.errno == errno.ENOSPC
        found = await checked(file)
        assert found.messages == []
        assert unpack_block(bytes(file.content[2 * CLUSTER : 3 * CLUSTER]), 4)[6] == 0

    asyncio.run(run())


def test_an_image_that_others_have_broken_is_not_taken_back_until_it_is_whole(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.qcow2"

    async def run() -> None:
        await make(path, OPTIONS)
        graph = Graph()
        file = FileOptions(driver="file", filename=str(path))
        node = await open_node(graph, Qcow2Options(driver="qcow2", node_name="disk", file=file))
        await inactivate(graph, [node])
        whole = path.read_bytes()
        path.write_bytes(bytes(4) + whole[4:])
        with pytest.raises(CommandError, match="Image is not in qcow2 format"):
            await activate(graph, [node])
        await node.pread(0, memoryview(bytearray(512)))
        path.write_bytes(whole)
        await activate(graph, [node])
        await node.pwrite(0, memoryview(b"x" * 512))
        node.is_owned_by_user = False
        await graph.drop_if_unused(node)

    asyncio.run(run())
