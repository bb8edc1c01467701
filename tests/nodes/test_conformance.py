# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Every driver passes these tests; they run over `DRIVERS`, so that none can be left out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdjobs.errors import NodeError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.blkdebug import BlkdebugOptions
from nbdjobs.nodes.copy_before_write import CopyBeforeWriteOptions
from nbdjobs.nodes.copy_on_read import CopyOnReadOptions
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.drivers import DRIVERS
from nbdjobs.nodes.file import FileOptions
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.leaky_bucket import BucketConfig, BucketName, ThrottleConfig
from nbdjobs.nodes.luks import LuksOptions
from nbdjobs.nodes.null import NullOptions
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import BlockdevOptions, CacheOptions, Discard
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.qcow2.create import CreateOptions, empty_image
from nbdjobs.nodes.qcow2.options import Qcow2Options
from nbdjobs.nodes.raw import RawOptions
from nbdjobs.nodes.status import Status
from nbdjobs.nodes.throttle import ThrottleOptions
from nbdjobs.nodes.throttle_group import ThrottleGroup
from tests.nodes.encrypted import volume_of_zeroes
from tests.nodes.loop_device import has_loop_devices, loop_device

SIZE: Final = 256 * 1024
WRITER: Final = Permission.CONSISTENT_READ | Permission.WRITE
SHARED: Final = permissions.ALL & ~Permission.RESIZE
LIMITS: Final = "limits"
PASSWORD: Final = "password"

QCOW2: Final = {
    "qcow2": CreateOptions(size=SIZE),
    "qcow2 with small clusters": CreateOptions(size=SIZE, cluster_size=512, refcount_bits=1),
    "qcow2 with subclusters": CreateOptions(size=SIZE, cluster_size=16384, is_extended=True),
    "qcow2 of version 2": CreateOptions(size=SIZE, version=2, cluster_size=4096),
    "qcow2 with late refcounts": CreateOptions(size=SIZE, is_lazy=True),
}

Factory = Callable[[Path], BlockdevOptions]


def _file(image: Path, *, direct: bool = False) -> FileOptions:
    return FileOptions(
        driver="file",
        node_name="disk",
        filename=str(image),
        discard=Discard.UNMAP,
        cache=CacheOptions(direct=direct),
    )


def _device(image: Path, *, direct: bool = False) -> FileOptions:
    return FileOptions(
        driver="host_device",
        node_name="disk",
        filename=str(image),
        discard=Discard.UNMAP,
        cache=CacheOptions(direct=direct),
    )


def _raw(image: Path) -> RawOptions:
    return RawOptions(
        driver="raw",
        node_name="disk",
        discard=Discard.UNMAP,
        file=FileOptions(driver="file", filename=str(image)),
    )


def _window(image: Path) -> RawOptions:
    return RawOptions(
        driver="raw",
        node_name="disk",
        discard=Discard.UNMAP,
        offset=4608,
        size=128 * 1024,
        file=FileOptions(driver="file", filename=str(image)),
    )


def _blkdebug(image: Path) -> BlkdebugOptions:
    return BlkdebugOptions(
        driver="blkdebug",
        node_name="disk",
        discard=Discard.UNMAP,
        align=4096,
        max_transfer=16384,
        opt_write_zero=8192,
        max_write_zero=32768,
        opt_discard=8192,
        max_discard=16384,
        image=FileOptions(driver="file", filename=str(image)),
    )


def _qcow2(image: Path) -> Qcow2Options:
    return Qcow2Options(
        driver="qcow2",
        node_name="disk",
        discard=Discard.UNMAP,
        file=FileOptions(driver="file", filename=str(image)),
    )


def _throttle(image: Path) -> ThrottleOptions:
    return ThrottleOptions(
        driver="throttle",
        node_name="disk",
        discard=Discard.UNMAP,
        throttle_group=LIMITS,
        file=FileOptions(driver="file", filename=str(image)),
    )


def _luks(image: Path) -> LuksOptions:
    return LuksOptions(
        driver="luks",
        node_name="disk",
        key_secret=PASSWORD,
        file=FileOptions(driver="file", filename=str(image)),
    )


def _copy_before_write(image: Path) -> CopyBeforeWriteOptions:
    return CopyBeforeWriteOptions(
        driver="copy-before-write",
        node_name="disk",
        discard=Discard.UNMAP,
        file=FileOptions(driver="file", filename=str(image)),
        target=NullOptions(driver="null-co", size=SIZE),
    )


def _copy_on_read(image: Path) -> CopyOnReadOptions:
    below = image.with_suffix(".base")
    below.write_bytes(bytes(SIZE))
    image.write_bytes(empty_image(CreateOptions(size=SIZE)))
    overlay = Qcow2Options(
        driver="qcow2",
        file=FileOptions(driver="file", filename=str(image)),
        backing=FileOptions(driver="file", filename=str(below)),
    )
    return CopyOnReadOptions(
        driver="copy-on-read", node_name="disk", discard=Discard.UNMAP, file=overlay
    )


def _null(driver: str) -> Factory:
    def factory(image: Path) -> NullOptions:
        return NullOptions(driver=driver, node_name="disk", size=SIZE, read_zeroes=True)

    return factory


FACTORIES: Final[dict[str, tuple[str, Factory]]] = {
    "file": ("file", _file),
    "file, past the cache": ("file", lambda image: _file(image, direct=True)),
    "raw": ("raw", _raw),
    "raw with offset and size": ("raw", _window),
    "blkdebug with limits": ("blkdebug", _blkdebug),
    "luks": ("luks", _luks),
    **dict.fromkeys(QCOW2, ("qcow2", _qcow2)),
    "throttle": ("throttle", _throttle),
    "copy-before-write": ("copy-before-write", _copy_before_write),
    "copy-on-read": ("copy-on-read", _copy_on_read),
    "null-co": ("null-co", _null("null-co")),
    "null-aio": ("null-aio", _null("null-aio")),
    "host_device": ("host_device", _device),
    "host_device, past the cache": ("host_device", lambda image: _device(image, direct=True)),
}
READ_ONLY: Final = frozenset({"snapshot-access", "http", "https"})
"""Drivers that nothing can be written to; their own tests say what they read."""

STORING: Final = [name for name in FACTORIES if not name.startswith("null")]

Operation = tuple[str, int, int, int]
operations = st.lists(
    st.tuples(
        st.sampled_from(["write", "write-fua", "read", "zero", "zero-keep", "discard", "flush"]),
        st.integers(0, SIZE) | st.sampled_from([0, 512, 4096, 65536, SIZE - 512]),
        st.integers(1, 80 * 1024) | st.sampled_from([1, 512, 4096, 65536, SIZE]),
        st.integers(1, 255),
    ),
    max_size=12,
)


@contextmanager
def storage_for(name: str, folder: Path, *, size: int = SIZE) -> Iterator[Path]:
    """A file or device with no content but zeroes, as the driver needs it."""
    image = folder / "disk.img"
    if name in QCOW2:
        image.write_bytes(empty_image(replace(QCOW2[name], size=size)))
    elif name == "luks":
        image.write_bytes(volume_of_zeroes(size, PASSWORD.encode()))
    else:
        image.write_bytes(b"")
        os.truncate(image, size)
    if FACTORIES[name][0] != "host_device":
        yield image
        return
    if not has_loop_devices():
        pytest.skip("needs a loop device")
    with loop_device(image) as device:
        yield device


def with_disk(name: str, image: Path, scenario: Callable[[Device], Awaitable[None]]) -> None:
    """Open the disk, run the scenario as its only writer, and close it."""

    async def run() -> None:
        graph = Graph()
        # So high that requests go through its buckets, and nothing waits.
        limits = ThrottleConfig({BucketName.BPS_TOTAL: BucketConfig(10**12)})
        graph.throttle_groups[LIMITS] = ThrottleGroup(limits)
        graph.secrets.add(PASSWORD, PASSWORD.encode())
        node = await open_node(graph, FACTORIES[name][1](image))
        device = Device(graph, node, needed=WRITER, shared=SHARED)
        try:
            await scenario(device)
        finally:
            node.is_owned_by_user = False
            await device.close()
        assert not graph.nodes

    asyncio.run(run())


async def apply(device: Device, model: bytearray, operation: Operation) -> None:
    """Do one operation on the disk and on the model."""
    kind, offset, length, fill = operation
    offset = min(offset, device.size - 1)
    length = min(length, device.size - offset)
    match kind:
        case "read":
            await check(device, model, offset, length)
        case "write" | "write-fua":
            data = bytes((fill + n) & 255 for n in range(length))
            await device.pwrite(offset, memoryview(data), fua=kind == "write-fua")
            model[offset : offset + length] = data
        case "zero" | "zero-keep":
            await device.pwrite_zeroes(offset, length, may_unmap=kind == "zero")
            model[offset : offset + length] = bytes(length)
        case "discard":
            await device.pdiscard(offset, length)
            await follow_discard(device, model, offset, length)
        case "flush":
            await device.flush()


async def follow_discard(device: Device, model: bytearray, offset: int, length: int) -> None:
    """Every discarded byte is zero or as before, and the model follows."""
    buffer = bytearray(length)
    await device.pread(offset, memoryview(buffer))
    assert all(
        now in (0, before)
        for now, before in zip(buffer, model[offset : offset + length], strict=True)
    )
    model[offset : offset + length] = buffer


async def check(device: Device, model: bytearray, offset: int, length: int) -> None:
    """The disk holds what the model holds, in its bytes and in its block status."""
    buffer = bytearray(b"\xaa" * length)
    await device.pread(offset, memoryview(buffer))
    assert buffer == model[offset : offset + length]
    end = offset + length
    while offset < end:
        run = await device.block_status(offset, end - offset)
        assert 1 <= run.length <= end - offset
        if Status.ZERO in run.status:
            assert not any(model[offset : offset + run.length])
            # What is known to be data has no hole; null disks know nothing.
            assert not device.is_known_data(offset, run.length)
        offset += run.length


def test_every_driver_has_a_factory() -> None:
    assert {driver for driver, _ in FACTORIES.values()} == set(DRIVERS) - READ_ONLY


def test_drivers_are_found_by_their_own_names() -> None:
    assert all(name == driver.driver for name, driver in DRIVERS.items())


@pytest.mark.parametrize("name", STORING)
def test_a_disk_behaves_like_an_array_of_bytes(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(operations)
    def property_holds(sequence: list[Operation]) -> None:
        with storage_for(name, tmp_path_factory.mktemp("disk")) as image:

            async def scenario(device: Device) -> None:
                model = bytearray(device.size)
                for operation in sequence:
                    await apply(device, model, operation)
                await check(device, model, 0, device.size)

            with_disk(name, image, scenario)

    property_holds()


@pytest.mark.parametrize("name", STORING)
def test_concurrent_writes_next_to_each_other_keep_their_neighbours(
    name: str, tmp_path: Path
) -> None:
    async def scenario(device: Device) -> None:
        pieces = [(n * 700, bytes([n % 255 + 1]) * 700) for n in range(150)]
        await asyncio.gather(*(device.pwrite(at, memoryview(data)) for at, data in pieces))
        model = bytearray(device.size)
        for at, data in pieces:
            model[at : at + len(data)] = data
        await check(device, model, 0, device.size)

    with storage_for(name, tmp_path) as image:
        with_disk(name, image, scenario)


@pytest.mark.parametrize("name", FACTORIES)
def test_requests_beyond_the_end_are_refused(name: str, tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        block = memoryview(bytearray(512))
        for offset in (device.size, device.size - 511, -1):
            with pytest.raises(NodeError):
                await device.pread(offset, block)
            with pytest.raises(NodeError):
                await device.pwrite(offset, block)
            with pytest.raises(NodeError):
                await device.pwrite_zeroes(offset, 512)

    with storage_for(name, tmp_path) as image:
        with_disk(name, image, scenario)


@pytest.mark.parametrize("name", ["file", "file, past the cache", "raw"])
def test_a_file_that_ends_inside_a_sector_reads_as_zeroes_and_grows(
    name: str, tmp_path: Path
) -> None:
    async def scenario(device: Device) -> None:
        assert device.size == 1024
        model = bytearray(b"x" * 1000 + bytes(24))
        await check(device, model, 0, 1024)
        await apply(device, model, ("write", 900, 124, 7))
        await check(device, model, 0, 1024)

    image = tmp_path / "disk.img"
    image.write_bytes(b"x" * 1000)
    with_disk(name, image, scenario)
    assert image.stat().st_size == 1024


@pytest.mark.parametrize("name", FACTORIES)
def test_cancelled_requests_leave_the_disk_usable(name: str, tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        block = memoryview(bytearray(65536))
        requests: list[Callable[[], Awaitable[object]]] = [
            lambda: device.pread(0, block),
            lambda: device.pwrite(0, block, fua=True),
            lambda: device.pwrite(100, block[:1000]),
            lambda: device.pwrite_zeroes(0, 65536),
            lambda: device.pdiscard(0, 65536),
            lambda: device.flush(),
            lambda: device.block_status(0, 65536),
        ]
        for turns in range(4):
            tasks = [asyncio.ensure_future(request()) for request in requests]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert device.in_flight == 0
            assert len(device.node.tracked) == 0
        await device.pwrite(0, memoryview(b"still here"))
        await device.flush()

    with storage_for(name, tmp_path) as image:
        with_disk(name, image, scenario)


@pytest.mark.parametrize("name", FACTORIES)
def test_closing_leaves_no_descriptor_behind(name: str, tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.pwrite(0, memoryview(b"x" * 512), fua=True)

    with storage_for(name, tmp_path) as image:
        with_disk(name, image, scenario)
        assert str(image) not in open_files()


def open_files() -> set[str]:
    """What this process has open."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.add(str(entry.readlink()))
    return found
