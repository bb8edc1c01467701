# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The file driver: where its calls are made, holes, flushes, and opening for writing late."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes import file as file_module
from nbdjobs.nodes import permissions
from nbdjobs.nodes import storage as storage_module
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.file import DiscardStats, FileNode, FileOptions
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.null import NullOptions
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import CacheOptions, Discard
from nbdjobs.nodes.pace import FIRST_PAUSE_NS, SLOW_NS, TRIAL, Pace
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.raw import RawOptions
from nbdjobs.nodes.status import DATA, HOLE, BlockStatus

SIZE = 1024 * 1024
READ = Permission.CONSISTENT_READ
WRITER = READ | Permission.WRITE
SHARED = permissions.ALL & ~Permission.RESIZE

Scenario = Callable[[FileNode, Device], Awaitable[None]]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"\x11" * SIZE)
    return path


def options(image: Path, *, name: str = "f", direct: bool = False, **more: object) -> FileOptions:
    return FileOptions(
        driver="file",
        node_name=name,
        filename=str(image),
        cache=CacheOptions(direct=direct),
        discard=Discard.UNMAP,
        **more,  # type: ignore[arg-type]  # members of the options, by name
    )


def with_file(chosen: FileOptions, scenario: Scenario, *, needed: Permission = WRITER) -> None:
    """Open a file and use it as a device."""

    async def run() -> None:
        graph = Graph()
        node = await open_node(graph, chosen)
        assert isinstance(node, FileNode)
        device = Device(graph, node, needed=needed, shared=SHARED)
        await scenario(node, device)
        await device.close()
        await graph.drop(node)

    asyncio.run(run())


def at_once(request: Awaitable[None]) -> bool:
    """Start a request; whether it ended without waiting for anything."""
    iterator = request.__await__()
    try:
        next(iterator)
    except StopIteration:
        return True
    return False


def fail_with(number: int) -> Callable[..., int]:
    def call(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    return call


def test_what_the_page_cache_has_is_read_at_once(image: Path) -> None:
    async def scenario(node: FileNode, device: Device) -> None:
        await device.pread(0, memoryview(bytearray(4096)))
        buffer = bytearray(4096)
        assert at_once(device.pread(0, memoryview(buffer)))
        assert buffer == b"\x11" * 4096

    with_file(options(image), scenario)


def test_what_it_does_not_have_is_read_in_a_thread(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def half(fd: int, buffers: tuple[memoryview], offset: int, flags: int) -> int:
        if offset:
            raise BlockingIOError
        return real(fd, (buffers[0][:1000],), offset)

    monkeypatch.setattr(file_module, "preadv", half)

    async def scenario(node: FileNode, device: Device) -> None:
        for offset in (0, 4096):
            buffer = bytearray(4096)
            await device.pread(offset, memoryview(buffer))
            assert buffer == b"\x11" * 4096

    with_file(options(image), scenario)


def test_a_file_system_without_the_flag_is_asked_once(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags_seen = []

    def refuse(fd: int, buffers: tuple[memoryview], offset: int, flags: int) -> int:
        flags_seen.append(flags)
        raise OSError(errno.EOPNOTSUPP, "unknown flag")

    monkeypatch.setattr(file_module, "preadv", refuse)

    async def scenario(node: FileNode, device: Device) -> None:
        for _ in range(3):
            buffer = bytearray(4096)
            await device.pread(0, memoryview(buffer))
            assert buffer == b"\x11" * 4096
        assert flags_seen == [os.RWF_NOWAIT]
        assert at_once(device.pread(0, memoryview(buffer)))

    with_file(options(image), scenario)


class SlowDisk:
    """Makes writes take long, or not, by the clock that the node's pace goes by."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.is_slow = True
        self.writers: list[threading.Thread] = []
        self.now = 0
        self.sleeps = 0
        self._real = os.pwritev
        monkeypatch.setattr(os, "pwritev", self._pwritev)
        monkeypatch.setattr(file_module, "pwritev", self._pwritev)
        monkeypatch.setattr(file_module, "perf_counter_ns", lambda: self.now)
        pace = partial(Pace, lambda: self.now, lambda: self.sleeps)
        monkeypatch.setattr(file_module, "Pace", pace)

    def _pwritev(self, *arguments: object) -> int:
        self.writers.append(threading.current_thread())
        if self.is_slow:
            self.now += SLOW_NS + 1
            self.sleeps += 1
        return self._real(*arguments)  # type: ignore[arg-type]  # passed on as they came


def test_writes_of_a_slow_disk_leave_the_event_loop_until_it_is_fast_again(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)

    async def scenario(node: FileNode, device: Device) -> None:
        block = memoryview(bytes(512))
        for _ in range(2):  # inline: one slow call may be chance
            await device.pwrite(0, block)
        assert set(disk.writers) == {threading.main_thread()}
        disk.writers.clear()
        disk.is_slow = False
        for _ in range(5):
            await device.pwrite(0, block)
        assert threading.main_thread() not in disk.writers
        disk.now += FIRST_PAUSE_NS * 2
        for _ in range(TRIAL):
            assert at_once(device.pwrite(0, block))

    with_file(options(image), scenario)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_failed_writes_keep_their_errno(
    number: int, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(node: FileNode, device: Device) -> None:
        monkeypatch.setattr(file_module, "pwritev", fail_with(number))
        with pytest.raises(NodeError) as caught:
            await device.pwrite(512, memoryview(bytes(512)))
        assert (caught.value.errno, caught.value.offset) == (number, 512)

    with_file(options(image), scenario)


def test_a_failed_flush_is_not_forgotten(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(node: FileNode, device: Device) -> None:
        await device.pwrite(0, memoryview(bytes(512)))
        with monkeypatch.context() as broken:
            broken.setattr(os, "fdatasync", fail_with(errno.EIO))
            with pytest.raises(NodeError):
                await device.flush()
        with pytest.raises(NodeError) as caught:
            await device.flush()
        assert caught.value.errno == errno.EIO

    with_file(options(image), scenario)


def test_closing_flushes_what_nobody_has_flushed(
    image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def fail(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def scenario() -> None:
        graph = Graph()
        node = await open_node(graph, options(image))
        device = Device(graph, node, needed=WRITER)
        await device.pwrite(0, memoryview(b"x" * 512))
        await device.close()
        assert not calls
        await graph.drop(node)
        assert len(calls) == 1

    monkeypatch.setattr(os, "fdatasync", fail)
    asyncio.run(scenario())
    assert "flushing failed" in caplog.text


@pytest.mark.parametrize(("no_flush", "calls"), [(False, 1), (True, 0)])
def test_a_fua_write_is_flushed_unless_flushes_are_off(
    no_flush: bool, calls: int, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    chosen = FileOptions(
        driver="file", node_name="f", filename=str(image), cache=CacheOptions(no_flush=no_flush)
    )

    async def scenario(node: FileNode, device: Device) -> None:
        await device.pwrite(0, memoryview(bytes(512)), fua=True)
        assert len(synced) == calls

    with_file(chosen, scenario)


def test_holes_are_punched_found_and_counted(image: Path) -> None:
    async def scenario(node: FileNode, device: Device) -> None:
        assert await device.block_status(0, SIZE) == BlockStatus(SIZE, DATA)
        assert device.is_known_data(0, SIZE)
        await device.pdiscard(131072, 65536)
        assert not device.is_known_data(0, SIZE)
        assert device.is_known_data(0, 131072)
        assert not device.is_known_data(131072, 4096)
        assert await device.block_status(131072, SIZE - 131072) == BlockStatus(65536, HOLE)
        assert node.discard_stats == DiscardStats(1, 0, 65536)
        await device.pwrite(131072, memoryview(b"x" * 65536))
        assert device.is_known_data(0, SIZE)
        assert os.stat(node.filename).st_size == SIZE

    with_file(options(image), scenario)


def test_a_short_look_teaches_about_the_whole_neighbourhood(image: Path) -> None:
    async def scenario(node: FileNode, device: Device) -> None:
        await device.block_status(300 * 1024 + 512, 512)
        assert device.is_known_data(256 * 1024, SIZE - 256 * 1024)
        assert not device.is_known_data(192 * 1024, 512)

    with_file(options(image), scenario)


def test_a_file_system_that_cannot_zero_says_so_once(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []

    def refuse(fd: int, mode: int, offset: int, length: int) -> None:
        modes.append(mode)
        raise OSError(errno.EOPNOTSUPP, "cannot")

    monkeypatch.setattr(storage_module, "fallocate", refuse)

    async def scenario(node: FileNode, device: Device) -> None:
        for _ in range(2):
            with pytest.raises(NodeError) as caught:
                await device.pwrite_zeroes(0, 4096, fast_only=True)
            assert caught.value.errno == errno.ENOTSUP
        assert len(modes) == len(set(modes)) == 2
        await device.pwrite_zeroes(0, 4096)  # by writing
        await device.pdiscard(0, 4096)  # in vain, which is no error
        assert node.discard_stats.discard_nb_failed == 1

    with_file(options(image), scenario)
    assert image.read_bytes()[:4097] == bytes(4096) + b"\x11"


def test_zeroes_that_must_keep_their_space_keep_it(image: Path) -> None:
    async def scenario(node: FileNode, device: Device) -> None:
        before = node.allocated_size
        await device.pwrite_zeroes(0, SIZE, may_unmap=False)
        assert node.allocated_size == before
        await device.pwrite_zeroes(0, SIZE, may_unmap=True)
        assert node.allocated_size == 0

    with_file(options(image), scenario)
    assert image.read_bytes() == bytes(SIZE)


def test_direct_access_takes_memory_of_any_alignment(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_read, real_write = os.preadv, os.pwritev

    def strict(real: Callable[..., int]) -> Callable[..., int]:
        def call(fd: int, buffers: tuple[memoryview], offset: int) -> int:
            # Memory from mmap is the only kind that this device takes.
            if type(buffers[0].obj).__name__ != "mmap":
                raise OSError(errno.EINVAL, "alignment")
            return real(fd, buffers, offset)

        return call

    async def scenario(node: FileNode, device: Device) -> None:
        monkeypatch.setattr(os, "preadv", strict(real_read))
        monkeypatch.setattr(os, "pwritev", strict(real_write))
        data = bytes(range(256)) * 6144  # more than one bounce buffer
        await device.pwrite(0, memoryview(data))
        buffer = bytearray(len(data))
        await device.pread(0, memoryview(buffer))
        assert buffer == data

    image.write_bytes(bytes(2 * SIZE))
    with_file(options(image, direct=True), scenario)


def test_copies_between_files_are_left_to_the_kernel(image: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.img"
    target.write_bytes(bytes(SIZE))

    async def scenario(node: FileNode, device: Device) -> None:
        graph = Graph()
        inner = await open_node(graph, options(target, name="t"))
        window = RawOptions(driver="raw", node_name="r", offset=4096, file="t")
        outer = await open_node(graph, window)
        writer = Device(graph, outer, needed=WRITER, shared=SHARED)
        await node.copy_range(0, outer, 512, 8192)
        buffer = bytearray(16384)
        await inner.pread(0, memoryview(buffer))
        assert buffer == bytes(4608) + b"\x11" * 8192 + bytes(16384 - 4608 - 8192)
        await writer.close()
        await graph.drop(outer)
        await graph.drop(inner)

    with_file(options(image), scenario)


def test_copies_that_the_kernel_refuses_are_not_tried_again(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target.img"
    target.write_bytes(bytes(SIZE))
    attempts: list[object] = []

    def refuse(*arguments: object) -> int:
        attempts.append(arguments)
        raise OSError(errno.EXDEV, "other file system")

    monkeypatch.setattr(os, "copy_file_range", refuse)

    async def scenario(node: FileNode, device: Device) -> None:
        graph = Graph()
        other = await open_node(graph, options(target, name="t"))
        null = await open_node(graph, NullOptions(driver="null-co", node_name="n"))
        for candidate in (other, other, null):
            with pytest.raises(NodeError) as caught:
                await node.copy_range(0, candidate, 0, 4096)
            assert caught.value.errno == errno.ENOTSUP
        assert len(attempts) == 1
        await graph.drop(other)

    with_file(options(image), scenario)


@pytest.fixture
def read_only_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system that is mounted for reading only."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    bound = subprocess.run(["mount", "--bind", tmp_path, mounted], capture_output=True, check=False)
    if bound.returncode:
        pytest.skip("needs the right to mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", mounted], check=True)
        yield mounted
    finally:
        subprocess.run(["umount", mounted], check=True)


def test_auto_read_only_opens_for_writing_when_a_writer_comes(image: Path) -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await open_node(graph, options(image, auto_read_only=True))
        assert writable_descriptors(image) == 0
        reader = Device(graph, node, needed=READ, shared=SHARED)
        assert writable_descriptors(image) == 0
        writer = Device(graph, node, needed=WRITER, shared=SHARED)
        assert not node.is_read_only
        await writer.pwrite(0, memoryview(b"x" * 512), fua=True)
        await writer.close()
        assert writable_descriptors(image) == 0
        buffer = bytearray(512)
        await reader.pread(0, memoryview(buffer))
        assert buffer == b"x" * 512
        await reader.close()
        await graph.drop(node)

    asyncio.run(scenario())


def test_auto_read_only_takes_what_cannot_be_written_until_a_writer_comes(
    image: Path, read_only_folder: Path
) -> None:
    path = read_only_folder / image.name

    async def scenario() -> None:
        graph = Graph()
        with pytest.raises(CommandError) as caught:
            await open_node(graph, options(path))
        assert caught.value.description == f"Could not open '{path}': Read-only file system"
        node = await open_node(graph, options(path, auto_read_only=True))
        with pytest.raises(CommandError) as caught:
            Device(graph, node, needed=WRITER, shared=SHARED)
        assert caught.value.description == f"Could not open '{path}': Read-only file system"
        reader = Device(graph, node, needed=READ, shared=SHARED)
        await reader.close()
        await graph.drop(node)

    asyncio.run(scenario())


def test_read_only_refuses_writers(image: Path) -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await open_node(graph, options(image, read_only=True, auto_read_only=True))
        with pytest.raises(CommandError) as caught:
            Device(graph, node, needed=WRITER)
        assert caught.value.description == "Block node is read-only"
        await graph.drop(node)

    asyncio.run(scenario())


def writable_descriptors(image: Path) -> int:
    """How many descriptors of this process can write the file."""
    count = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
            info = Path(f"/proc/self/fdinfo/{entry}").read_text()
        except FileNotFoundError:
            continue
        flags = int(next(line.split()[1] for line in info.splitlines() if "flags" in line), 8)
        count += target == str(image) and flags & os.O_ACCMODE != os.O_RDONLY
    return count


@pytest.mark.parametrize("left", [0, 4096, 8192 + 100])
def test_a_file_that_somebody_cuts_off_fails_instead_of_reading_as_zeroes(
    left: int, image: Path
) -> None:
    size = image.stat().st_size

    async def scenario(node: FileNode, device: Device) -> None:
        os.truncate(image, left)
        with pytest.raises(NodeError, match="truncated") as caught:
            await device.pread(size - 4096, memoryview(bytearray(4096)))
        assert caught.value.errno == errno.EIO
        with pytest.raises(NodeError, match="truncated"):
            await device.block_status(size - 4096, 4096)
        os.truncate(image, size)
        await device.pread(size - 4096, memoryview(bytearray(4096)))

    with_file(options(image), scenario)


def test_a_read_from_the_page_cache_needs_no_coroutine(image: Path) -> None:
    async def scenario(node: FileNode, device: Device) -> None:
        buffer = memoryview(bytearray(512))
        await device.pread(512, buffer)  # now the page cache has it
        buffer[:] = bytes(512)
        assert device.pread_now(512, buffer, False)
        assert buffer == b"\x11" * 512
        assert device.accounting.read.operations == 2
        assert device.accounting.read.length == 1024

    with_file(options(image), scenario)


def test_a_read_is_left_to_the_coroutine_where_it_may_have_to_wait_or_fail(image: Path) -> None:
    async def scenario(node: FileNode, device: Device) -> None:
        buffer = memoryview(bytearray(512))
        await device.pread(0, buffer)
        assert not device.pread_now(0, buffer, True)  # nobody has looked for holes yet
        await device.block_status(0, 512)
        assert device.pread_now(0, buffer, True)
        assert not device.pread_now(device.size, buffer, False)
        device.hold()
        assert not device.pread_now(0, buffer, False)
        device.release()
        assert not device.pread_now(0, memoryview(bytearray(1024 * 1024)), False)
        assert device.accounting.read.failed == 0

    with_file(options(image), scenario)


def test_reads_past_the_page_cache_are_left_to_the_coroutine(image: Path) -> None:
    async def scenario(node: FileNode, device: Device) -> None:
        assert not device.pread_now(0, memoryview(bytearray(4096)), False)

    with_file(options(image, direct=True), scenario)
