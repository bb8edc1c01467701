# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Image locks against the real tools, in both directions, and between two of our own nodes."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdjobs.errors import CommandError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.file import FileOptions, OnOffAuto
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.raw import RawOptions
from tests.interop.tools import require

READ = Permission.CONSISTENT_READ
WRITE = Permission.WRITE
SIZE = 1024 * 1024

needs_qemu = pytest.mark.usefixtures("qemu")


@pytest.fixture
def qemu() -> None:
    """Skip by name where the tools are missing, or fail where they are required."""
    require("qemu-img")
    require("qemu-io")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def with_device(
    options: FileOptions,
    scenario: Callable[[Device], Awaitable[None]],
    *,
    needed: Permission = READ | WRITE,
    shared: Permission = permissions.ALL & ~Permission.RESIZE,
) -> None:
    """Use the file as a device that needs and shares these permissions."""

    async def run() -> None:
        graph = Graph()
        node = await open_node(graph, options)
        try:
            device = Device(graph, node, needed=needed, shared=shared)
            await scenario(device)
            await device.close()
        finally:
            await graph.drop(node)

    asyncio.run(run())


def file(image: Path, *, locking: OnOffAuto = OnOffAuto.AUTO) -> FileOptions:
    return FileOptions(driver="file", node_name="f", filename=str(image), locking=locking)


async def nothing(device: Device) -> None:
    """Only open and close."""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def locked_bytes(image: Path) -> set[int]:
    """Every byte of the file that someone has locked."""
    found: set[int] = set()
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[5].endswith(f":{image.stat().st_ino}") and words[7].isdecimal():
            found.update(range(int(words[6]), int(words[7]) + 1))
    return found


def test_a_node_without_users_locks_nothing(image: Path) -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await open_node(graph, file(image))
        assert not locked_bytes(image)
        await graph.drop(node)

    asyncio.run(scenario())


def test_the_bytes_are_those_that_other_programs_lock(image: Path) -> None:
    async def scenario(device: Device) -> None:
        assert locked_bytes(image) == {100, 101, 203}

    with_device(file(image), scenario)
    assert not locked_bytes(image)


def test_giving_up_a_permission_unlocks_its_byte(image: Path) -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await open_node(graph, file(image))
        reader = Device(graph, node, needed=READ, shared=permissions.ALL)
        writer = Device(graph, node, needed=WRITE, shared=permissions.ALL & ~Permission.RESIZE)
        assert locked_bytes(image) == {100, 101, 203}
        await writer.close()
        assert locked_bytes(image) == {100}
        await reader.close()
        await graph.drop(node)

    asyncio.run(scenario())


def test_two_nodes_of_one_process_exclude_each_other(image: Path) -> None:
    async def scenario(device: Device) -> None:
        graph = Graph()
        other = await open_node(graph, file(image))
        with pytest.raises(CommandError) as caught:
            Device(graph, other, needed=WRITE)
        assert caught.value.description == 'Failed to get "write" lock'
        with pytest.raises(CommandError) as caught:
            Device(graph, other, needed=READ, shared=permissions.ALL & ~WRITE)
        assert caught.value.description == 'Failed to get shared "write" lock'
        assert not other.parents
        reader = Device(graph, other, needed=READ)
        await reader.close()
        await graph.drop(other)
        # What the refused attempts locked is unlocked again.
        assert locked_bytes(image) == {100, 101, 201}

    with_device(file(image), scenario, shared=permissions.ALL & ~WRITE)


def test_one_who_is_just_trying_takes_nothing_away(image: Path) -> None:
    """Others lock first and look then: until they give way, their bytes are there to be seen."""

    async def scenario() -> None:
        graph = Graph()
        node = await open_node(graph, file(image))
        writer = Device(graph, node, needed=READ | WRITE)
        with image.open("rb") as other:
            byte = struct.pack("@hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 201, 1, 0)
            fcntl.fcntl(other, fcntl.F_OFD_SETLK, byte)
            reader = Device(graph, node, needed=READ)
            await reader.close()
        assert locked_bytes(image) == {100, 101, 203}
        await writer.close()
        await graph.drop(node)

    asyncio.run(scenario())


def test_locking_off_neither_locks_nor_looks(image: Path) -> None:
    async def scenario(device: Device) -> None:
        before = locked_bytes(image)
        with_other = file(image, locking=OnOffAuto.OFF)
        graph = Graph()
        other = await open_node(graph, with_other)
        writer = Device(graph, other, needed=WRITE)
        assert locked_bytes(image) == before
        await writer.close()
        await graph.drop(other)

    with_device(file(image), scenario, shared=permissions.ALL & ~WRITE)


@needs_qemu
def test_qemu_io_is_refused_an_image_that_we_alone_write(image: Path) -> None:
    async def scenario(device: Device) -> None:
        command = ("qemu-io", "-f", "raw", "-c", "write 0 512", str(image))
        refused = await asyncio.to_thread(run, *command)
        assert refused.returncode != 0
        assert 'Failed to get "write" lock' in refused.stderr

    with_device(file(image), scenario, shared=permissions.ALL & ~WRITE)


@needs_qemu
def test_qemu_img_may_read_beside_us_but_not_resize(image: Path) -> None:
    async def scenario(device: Device) -> None:
        assert (await asyncio.to_thread(run, "qemu-img", "info", str(image))).returncode == 0
        command = ("qemu-img", "resize", "-f", "raw", str(image), "2M")
        refused = await asyncio.to_thread(run, *command)
        assert refused.returncode != 0
        assert 'Failed to get "resize" lock' in refused.stderr

    with_device(file(image), scenario)


@contextmanager
def qemu_io_open(image: Path) -> Iterator[None]:
    """qemu-io has the image open as qcow2, which shares neither writing nor resizing."""
    done = run("qemu-img", "create", "-f", "qcow2", str(image), "1M")
    assert done.returncode == 0, done.stderr
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=0,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        while "MiB" not in process.stdout.readline():
            pass
        yield
        process.stdin.write("quit\n")


@needs_qemu
def test_we_are_refused_an_image_that_qemu_io_has_open(image: Path) -> None:
    with qemu_io_open(image):
        with pytest.raises(CommandError) as caught:
            with_device(file(image), nothing)
        assert caught.value.description == 'Failed to get "write" lock'
        with pytest.raises(CommandError) as caught:
            with_device(file(image), nothing, needed=READ)
        assert caught.value.description == 'Failed to get shared "resize" lock'
        with_device(file(image), nothing, needed=READ, shared=permissions.ALL)
    with_device(file(image), nothing)


@needs_qemu
def test_force_share_lets_us_read_beside_qemu_io_through_a_raw_node(image: Path) -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await open_node(
            graph,
            RawOptions(
                driver="raw",
                node_name="r",
                read_only=True,
                force_share=True,
                file=FileOptions(driver="file", filename=str(image)),
            ),
        )
        only_reads = permissions.ALL & ~(WRITE | Permission.RESIZE)
        device = Device(graph, node, needed=READ, shared=only_reads)
        header = bytearray(3)
        await device.pread(0, memoryview(header))
        assert header == b"QFI"
        await device.close()
        await graph.drop(node)

    with qemu_io_open(image):
        asyncio.run(scenario())
