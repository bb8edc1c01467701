# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Images by file name: made, found, opened, and nothing lost that somebody uses."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes import new_file
from nbdjobs.nodes.config import CacheMode
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.drivers import DRIVERS
from nbdjobs.nodes.file import FileNode, FileOptions
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.image_formats import format_of
from nbdjobs.nodes.image_lock import ImageLock
from nbdjobs.nodes.images import ImagePlace, create_image, open_image
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.permissions import ALL, Permission
from nbdjobs.nodes.raw import RawNode
from tests.nodes.loop_device import has_loop_devices, loop_device

MIB = 1024 * 1024
QCOW2 = b"QFI\xfb" + bytes(508)


def run(scenario: Callable[[Graph], Awaitable[None]]) -> None:
    asyncio.run(_run(scenario))


async def _run(scenario: Callable[[Graph], Awaitable[None]]) -> None:
    graph = Graph()
    await scenario(graph)
    assert not graph.nodes


async def refusal(awaitable: Awaitable[object]) -> str:
    with pytest.raises(CommandError) as caught:
        await awaitable
    return str(caught.value)


def test_file_names_tell_the_driver(tmp_path: Path) -> None:
    async def scenario(graph: Graph) -> None:
        found = {
            name: await ImagePlace.find(graph, name)
            for name in ("a.img", "./a:b", "/dev/null", "file:/x:y", "host_device:d", "null-co://")
        }
        assert {name: (place.protocol, place.path) for name, place in found.items()} == {
            "a.img": ("file", "a.img"),
            "./a:b": ("file", "./a:b"),
            "/dev/null": ("host_device", "/dev/null"),
            "file:/x:y": ("file", "/x:y"),
            "host_device:d": ("host_device", "d"),
            "null-co://": ("null-co", "//"),
        }
        for name, protocol in {"a:b": "a", ":x": "", "json:{}": "json"}.items():
            text = await refusal(ImagePlace.find(graph, name))
            assert text == f"Unknown protocol '{protocol}'"

    run(scenario)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("image_format", ["raw", "file"])
def test_a_new_image_is_empty_and_sparse(tmp_path: Path, image_format: str) -> None:
    path = tmp_path / "new.img"

    async def scenario(graph: Graph) -> None:
        place = await ImagePlace.find(graph, str(path))
        await create_image(place, image_format, MIB)
        status = path.stat()
        assert (status.st_size, status.st_blocks, place.is_new) == (MIB, 0, True)
        assert stat.S_IMODE(status.st_mode) == 0o644 & ~_umask()
        node = await open_image(place, image_format, CacheMode(is_no_flush=True))
        assert node.driver == image_format
        assert node.config.can_unmap
        assert node.config.detect_zeroes == "unmap"
        assert node.config.cache == CacheMode(is_no_flush=True)
        assert not node.is_owned_by_user
        await graph.drop_if_unused(node)
        await place.remove()
        assert not path.exists()
        await place.remove()  # once is enough

    run(scenario)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_new_qcow2_image_has_its_tables_and_is_gone_if_they_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new.qcow2"

    async def scenario(graph: Graph) -> None:
        place = await ImagePlace.find(graph, str(path))
        await create_image(place, "qcow2", MIB)
        assert not graph.nodes
        for image_format in ("qcow2", None):
            node = await open_image(place, image_format, CacheMode())
            assert (node.driver, node.size) == ("qcow2", MIB)
            await graph.drop_if_unused(node)
        await place.remove()
        assert not path.exists()
        text = await refusal(create_image(place, "qcow2", MIB + 1))
        assert text == "Image size must be a multiple of 512 bytes"

        async def full(self: FileNode, offset: int, data: memoryview, fua: bool) -> None:
            raise NodeError(errno.ENOSPC)

        monkeypatch.setattr(FileNode, "_pwrite", full)
        text = await refusal(create_image(place, "qcow2", MIB))
        assert text == f"Could not create '{path}': No space left on device"
        assert not path.exists()

    run(scenario)


def test_an_image_that_was_there_is_emptied_and_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "old.img"
    path.write_bytes(b"old" * 1000)
    link = tmp_path / "link"
    link.symlink_to(path)

    async def scenario(graph: Graph) -> None:
        place = await ImagePlace.find(graph, str(link))
        await create_image(place, "raw", MIB)
        assert path.read_bytes() == bytes(MIB)
        await place.remove()
        assert path.stat().st_size == MIB

    run(scenario)


def test_what_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    async def scenario(graph: Graph) -> None:
        async def attempt(name: str, image_format: str = "raw", size: int = MIB) -> str:
            place = await ImagePlace.find(graph, name)
            return await refusal(create_image(place, image_format, size))

        new = str(tmp_path / "new")
        assert await attempt(new, "x") == "Unknown file format 'x'"
        assert await attempt(new, "throttle") == (
            "Format driver 'throttle' does not support image creation"
        )
        assert await attempt("null-co://") == (
            "Protocol driver 'null-co' does not support image creation"
        )
        assert await attempt("") == "Could not create '': No such file or directory"
        assert await attempt(f"{tmp_path}") == f"Could not create '{tmp_path}': Is a directory"
        assert "embedded null byte" in await attempt(f"{new}\0")
        assert await attempt(new, size=(1 << 63) - 512) == "Could not resize file: File too large"
        assert await attempt(str(pipe)) == f"Could not create '{pipe}': it is not a regular file"
        assert await attempt(f"host_device:{new}") == (
            "Protocol driver 'host_device' does not support image creation, and opening the image"
            f" failed: Could not open '{new}': No such file or directory"
        )

    run(scenario)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_format_that_fails_later_takes_its_file_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new.img"

    async def create_image_then_fail(place: ImagePlace, *_: object) -> None:
        await place.make_room(0)
        assert path.exists()
        raise CommandError("no header for you")

    monkeypatch.setattr(RawNode, "create_image", create_image_then_fail)

    async def scenario(graph: Graph) -> None:
        place = await ImagePlace.find(graph, str(path))
        assert await refusal(create_image(place, "raw", MIB)) == "no header for you"
        assert not path.exists()

    run(scenario)


def test_a_file_that_a_node_has_open_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"precious" * 64)
    (tmp_path / "link").symlink_to(path)

    async def scenario(graph: Graph) -> None:
        disk = await open_node(
            graph, FileOptions(driver="file", node_name="disk", filename=str(path))
        )
        place = await ImagePlace.find(graph, str(tmp_path / "link"))
        assert await refusal(create_image(place, "raw", MIB)) == (
            f"Could not create '{tmp_path / 'link'}': node 'disk' has the file open"
        )
        disk.is_owned_by_user = False
        await graph.drop_if_unused(disk)
        assert path.read_bytes() == b"precious" * 64

    run(scenario)


def test_a_file_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"precious" * 64)
    with path.open("r+b") as file:
        lock = ImageLock(file.fileno())
        lock.acquire(Permission.WRITE, ALL & ~Permission.WRITE)
        with pytest.raises(CommandError, match='Failed to get "write" lock'):
            new_file.make_file(str(path), MIB, {})
    assert path.read_bytes() == b"precious" * 64
    assert not new_file.make_file(str(path), MIB, {})


def test_a_device_has_to_be_large_enough(tmp_path: Path) -> None:
    if not has_loop_devices():
        pytest.skip("needs a loop device")
    image = tmp_path / "disk.img"
    image.write_bytes(b"d" * MIB)

    async def scenario(graph: Graph) -> None:
        with loop_device(image) as device:
            place = await ImagePlace.find(graph, str(device))
            assert place.protocol == "host_device"
            assert await refusal(create_image(place, "raw", 2 * MIB)) == "Cannot grow device files"
            await create_image(place, "raw", MIB)
            node = await open_image(place, None, CacheMode())
            assert (node.driver, node.size) == ("raw", MIB)
            await graph.drop_if_unused(node)
            await place.remove()
        assert image.read_bytes() == b"d" * MIB

    run(scenario)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"", "raw"),
        (b"QFI", "raw"),
        (QCOW2, "qcow2"),
        (b"QED\0", "qed"),
        (b"LUKS\xba\xbe", "luks"),
        (b"conectix", "vpc"),
        (bytes(0x40) + b"\x7f\x10\xda\xbe", "vdi"),
        (b"# Disk DescriptorFile\nversion=1", "vmdk"),
    ],
)
def test_contents_tell_the_format(content: bytes, name: str) -> None:
    assert format_of(content) == format_of(memoryview(content)) == name


def test_an_image_of_a_format_without_driver_is_not_taken_for_raw(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(b"QED\0" + bytes(MIB))
    assert "qed" not in DRIVERS

    async def scenario(graph: Graph) -> None:
        place = await ImagePlace.find(graph, str(path))
        assert await refusal(open_image(place, None, CacheMode())) == (
            f"'{path}' is a qed image, for which there is no driver"
        )
        node = await open_image(place, "raw", CacheMode())  # who says so has it
        await graph.drop_if_unused(node)

    run(scenario)


def test_an_image_taken_for_raw_cannot_become_another_format(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(MIB))

    async def scenario(graph: Graph) -> None:
        place = await ImagePlace.find(graph, str(path))
        for image_format in (None, "raw"):
            node = await open_image(place, image_format, CacheMode())
            device = Device(graph, node, needed=Permission.WRITE)
            await device.pwrite(512, memoryview(QCOW2))
            await device.pwrite(0, memoryview(b"a disk" * 1000))
            if image_format is None:
                for offset, data in ((0, QCOW2), (0, QCOW2 * 3), (0, QCOW2[:4])):
                    with pytest.raises(NodeError) as caught:
                        await device.pwrite(offset, memoryview(data))
                    assert caught.value.errno == errno.EPERM
                await device.pwrite(1, memoryview(QCOW2[1:4]))
                with pytest.raises(NodeError):
                    await device.pwrite(0, memoryview(b"Q"))  # the rest is there
                assert node.storage_at(0) == (node, 0)
                assert path.read_bytes()[:4] == b"aFI\xfb"
            else:
                await device.pwrite(0, memoryview(QCOW2))
            await device.close()

    run(scenario)
