# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""qcow2 images go on with other options and other backing files, while they are written."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.config import DetectZeroes
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.file import FileOptions
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.null import NullOptions
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import BlockdevOptions, CacheOptions
from nbdjobs.nodes.permissions import ALL, Permission
from nbdjobs.nodes.qcow2.create import CreateOptions, empty_image
from nbdjobs.nodes.qcow2.header_file import HeaderFile
from nbdjobs.nodes.qcow2.options import OverlapCheckMode, Qcow2Options
from nbdjobs.nodes.reopening import reopen
from nbdjobs.qapi.types import NULL
from tests.nodes.qcow2.rig import HAS_QEMU_IMG, content_of, image_of, qemu_img

SIZE = 1024 * 1024
CLUSTER = 65536
BASE = b"b" * SIZE
WRITER = Permission.CONSISTENT_READ | Permission.WRITE
SHARED = ALL & ~Permission.RESIZE


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """An overlay over a raw file."""
    (tmp_path / "base.raw").write_bytes(BASE)
    path = tmp_path / "top.qcow2"
    options = CreateOptions(size=SIZE, backing_file="base.raw", backing_format="raw")
    path.write_bytes(empty_image(options))
    return path


def file(path: Path, **more: Any) -> FileOptions:
    return FileOptions(driver="file", filename=str(path), **more)


def qcow2(path: Path, **more: Any) -> Qcow2Options:
    return Qcow2Options(driver="qcow2", node_name="disk", file=file(path), **more)


async def refusal(graph: Graph, *options: BlockdevOptions) -> str:
    with pytest.raises(CommandError) as caught:
        await reopen(graph, options)
    return caught.value.description


@contextmanager
def failing_reload() -> Iterator[None]:
    """While inside, no header can be read."""

    async def read(*_: object) -> HeaderFile:
        raise NodeError(5)

    patch = pytest.MonkeyPatch()
    patch.setattr(HeaderFile, "read", read)
    try:
        yield
    finally:
        patch.undo()


async def close(graph: Graph, device: Device) -> None:
    await device.close()
    for node in list(graph.nodes.values()):
        node.is_owned_by_user = False
        await graph.drop_if_unused(node)
    assert not graph.nodes


async def started(top: Path, **more: Any) -> tuple[Graph, Device]:
    graph = Graph()
    backing = file(top.with_name("base.raw"), node_name="base", read_only=True)
    await open_node(graph, backing)
    node = await open_node(graph, qcow2(top, backing="base", **more))
    needed = Permission.CONSISTENT_READ if more.get("read_only") else WRITER
    return graph, Device(graph, node, needed=needed, shared=SHARED)


def test_it_becomes_writable_and_read_only_again(top: Path) -> None:
    async def go() -> None:
        graph, device = await started(top, read_only=True)
        await reopen(graph, [qcow2(top, backing="base")])
        graph.set_permissions(device.edge, WRITER, SHARED)
        await device.pwrite(0, memoryview(b"x" * 512))
        refused = await refusal(graph, qcow2(top, backing="base", read_only=True))
        assert refused == "Read-only block node 'disk' cannot support read-write users"
        await device.pwrite(512, memoryview(b"y" * 512))
        graph.set_permissions(device.edge, Permission.CONSISTENT_READ, SHARED)
        await reopen(graph, [qcow2(top, backing="base", read_only=True)])
        assert await content_of(device) == b"x" * 512 + b"y" * 512 + BASE[1024:]
        await close(graph, device)

    asyncio.run(go())


def test_the_backing_file_is_exchanged(top: Path) -> None:
    async def go() -> None:
        graph, device = await started(top)
        await device.pwrite(0, memoryview(b"x" * CLUSTER))
        assert await refusal(graph, qcow2(top)) == "backing is missing for 'disk'"
        await reopen(graph, [qcow2(top, backing=NULL)])
        assert await content_of(device) == b"x" * CLUSTER + bytes(SIZE - CLUSTER)
        assert await refusal(graph, qcow2(top)) == "backing is missing for 'disk'"
        other = NullOptions(driver="null-co", node_name="n", size=SIZE, read_zeroes=True)
        await open_node(graph, other)
        await reopen(graph, [qcow2(top, backing="n")])
        refused = await refusal(graph, qcow2(top, backing=file(top)))
        assert refused == "Cannot change the option 'backing.driver'"
        assert await refusal(graph, qcow2(top, backing="disk")) == (
            "Making 'disk' a backing child of 'disk' would create a cycle"
        )
        await reopen(graph, [qcow2(top, backing="base")])
        assert await content_of(device) == b"x" * CLUSTER + BASE[CLUSTER:]
        await close(graph, device)

    asyncio.run(go())


def test_options_that_do_not_fit_leave_all_as_it_was(top: Path) -> None:
    async def go() -> None:
        graph, device = await started(top)
        await open_node(graph, file(top.with_name("base.raw"), node_name="r", read_only=True))
        image = image_of(device)
        before = image.config, image.given, image.edges["file"].node
        for more, sentence in (
            ({"cache_size": 1, "l2_cache_size": 2, "refcount_cache_size": 3}, "may not be set"),
            ({"l2_cache_entry_size": 100}, "L2 cache entry size must be a power of two"),
            ({"cache_clean_interval": -1}, "Cache clean interval too big"),
            ({"data_file": "r"}, "'data-file'"),
        ):
            assert sentence in await refusal(graph, qcow2(top, backing="base", **more))
            assert (image.config, image.given, image.edges["file"].node) == before
        other_image = Qcow2Options(driver="qcow2", node_name="disk", file="r", backing="base")
        assert await refusal(graph, other_image) == "Cannot change the option 'file'"
        assert (image.config, image.given, image.edges["file"].node) == before
        await device.pwrite(0, memoryview(b"x" * 512))
        await close(graph, device)

    asyncio.run(go())


def test_an_image_that_cannot_be_read_again_serves_nobody(top: Path) -> None:
    async def go() -> None:
        graph, device = await started(top)
        with failing_reload():
            refused = await refusal(graph, qcow2(top, backing="base", lazy_refcounts=True))
        assert "Could not read qcow2 header" in refused
        with pytest.raises(NodeError):
            await device.pread(0, memoryview(bytearray(512)))
        with pytest.raises(NodeError):
            await device.pwrite(0, memoryview(bytes(512)))
        await close(graph, device)

    asyncio.run(go())


def test_writers_notice_nothing_while_an_image_is_reopened_over_and_over(top: Path) -> None:
    model = bytearray(BASE)
    part = SIZE // 4

    async def client(device: Device, begin: int) -> None:
        rng = random.Random(begin)
        for number in range(30):
            offset = begin + rng.randrange(part - 1)
            length = rng.randrange(1, begin + part - offset + 1)
            data = bytes([number + 1]) * length
            if number % 4 == 3:
                await device.pwrite_zeroes(offset, length)
                data = bytes(length)
            elif number % 4 == 2:
                await device.flush()
                continue
            else:
                await device.pwrite(offset, memoryview(data))
            model[offset : offset + length] = data
            found = bytearray(part)
            await device.pread(begin, memoryview(found))
            assert found == model[begin : begin + part]

    async def go() -> None:
        graph, device = await started(top)
        rng = random.Random(2)
        clients = [asyncio.create_task(client(device, begin)) for begin in range(0, SIZE, part)]
        times = 0
        while not all(each.done() for each in clients):
            changed = qcow2(
                top,
                backing="base",
                lazy_refcounts=rng.choice([True, False, None]),
                overlap_check=rng.choice([None, *OverlapCheckMode]),
                l2_cache_entry_size=rng.choice([None, 512, 65536]),
                detect_zeroes=rng.choice([None, DetectZeroes.ON]),
                cache=CacheOptions(direct=rng.random() < 0.3),
            )
            await reopen(graph, [changed])
            times += 1
        await asyncio.gather(*clients)
        assert times > 3
        assert await content_of(device) == model
        await close(graph, device)

    asyncio.run(go())
    if HAS_QEMU_IMG:
        qemu_img("check", top)
        copy = top.with_name("copy.raw")
        qemu_img("convert", "-O", "raw", top, copy)
        assert copy.read_bytes() == model
