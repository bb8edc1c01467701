# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Images of all kinds go from qemu's tools to us and from us to them, and stay what they are."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from random import Random

import pytest

from nbdjobs.nodes.qcow2.check import Fix
from tests.nodes.qcow2.logged_file import LoggedFile
from tests.nodes.qcow2.matrix import Variant, pairwise
from tests.nodes.qcow2.rig import (
    HAS_QEMU_IMG,
    checked,
    content_of,
    image_of,
    make,
    opened,
    qemu_img,
)

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not HAS_QEMU_IMG, reason="needs qemu-img"),
]

DISK = 3 * 1024 * 1024 + 512
OPERATIONS = 12
VARIANTS = pairwise()
BY_NAME = {str(variant): variant for variant in VARIANTS}

Operation = tuple[str, int, int, int]


def operations(variant: Variant, random: Random, count: int = OPERATIONS) -> list[Operation]:
    """Kind, offset, length and fill byte."""
    kinds = ["write", "write", "zero", "unmap", "discard"]
    if variant.compression != "none":
        kinds += ["compressed"] * 2
    found = []
    for _ in range(count):
        kind = random.choice(kinds)
        unit = variant.cluster_size if kind == "compressed" else 512
        offset = random.randrange(DISK // unit) * unit
        length = random.choice((1, 3, 8, 130, 700)) * unit
        if kind == "compressed":
            length = min(length, 8 * unit)
            # Less than a cluster only at the end of the disk.
            if offset + length > DISK:
                length = (DISK - offset) // unit * unit or DISK - offset
        found.append((kind, offset, min(length, DISK - offset), random.randrange(1, 256)))
    return found


def without_overwrites(wanted: list[Operation], cluster_size: int) -> list[Operation]:
    """The same without compressed writes to what may be allocated: qemu's tools refuse those."""
    found: list[Operation] = []
    taken: set[int] = set()
    for operation in sorted(wanted, key=lambda each: each[0] != "compressed"):
        kind, offset, length, _ = operation
        clusters = range(offset // cluster_size, (offset + length - 1) // cluster_size + 1)
        if kind != "compressed" or taken.isdisjoint(clusters):
            found.append(operation)
            taken.update(clusters)
    return found


def qemu_io(path: Path, wanted: list[Operation]) -> None:
    """Let qemu-io do them."""
    words = {
        "write": "write -P {2} {0} {1}",
        "compressed": "write -c -P {2} {0} {1}",
        "zero": "write -z {0} {1}",
        "unmap": "write -z -u {0} {1}",
        "discard": "discard {0} {1}",
    }
    arguments = [
        part
        for kind, offset, length, fill in wanted
        for part in ("-c", words[kind].format(offset, length, fill))
    ]
    done = subprocess.run(
        ["qemu-io", "-d", "unmap", "-f", "qcow2", *arguments, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def files_of(variant: Variant, folder: Path, number: int) -> tuple[Path, Path | None, Path | None]:
    """The image number `number` of a chain, what is below it, and its data file."""
    backing = folder / f"{number - 1}.qcow2" if number else None
    data_file = folder / f"{number}.data" if variant.data_file != "none" else None
    return folder / f"{number}.qcow2", backing, data_file


def raw_content(path: Path) -> bytes:
    """What qemu-img says that the disk holds."""
    raw = path.with_suffix(".raw")
    qemu_img("convert", "-O", "raw", path, raw)
    return raw.read_bytes()


@pytest.mark.parametrize("name", BY_NAME)
def test_images_made_by_qemu_img_read_the_same(name: str, tmp_path: Path) -> None:
    variant, random = BY_NAME[name], Random(name)
    for number in range(variant.chain):
        path, backing, data_file = files_of(variant, tmp_path, number)
        options = variant.qemu_options(backing, data_file)
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", *options, path.name, str(DISK)],
            cwd=tmp_path,
            check=True,
        )
        wanted = operations(variant, random)
        if variant.preallocation != "off":
            wanted = [each for each in wanted if each[0] != "compressed"]
        qemu_io(path, without_overwrites(wanted, variant.cluster_size))

    async def run() -> None:
        async with opened(path, read_only=True) as device:
            assert await content_of(device) == raw_content(path)
        found = await checked(LoggedFile(path.read_bytes()))
        assert (found.corruptions, found.leaks) == (0, 0), found.messages

    asyncio.run(run())


@pytest.mark.parametrize("name", BY_NAME)
def test_images_made_and_written_here_are_clean_and_read_the_same_there(
    name: str, tmp_path: Path
) -> None:
    variant, random = BY_NAME[name], Random(name)
    model = bytearray(DISK)

    async def run() -> None:
        for number in range(variant.chain):
            path, backing, data_file = files_of(variant, tmp_path, number)
            await make(path, variant.create_options(DISK, backing, data_file), data_file)
            qemu_img("check", "-f", "qcow2", path)
            async with opened(path) as device:
                for operation in operations(variant, random):
                    await do(device, operation, model)
                assert await content_of(device) == model
            qemu_img("check", "-f", "qcow2", path)
        assert raw_content(path) == model
        # And on from there.
        more = operations(variant, random)
        qemu_io(path, [each for each in more if each[0] != "compressed"])
        expected = raw_content(path)
        async with opened(path, read_only=True) as device:
            assert await content_of(device) == expected
        found = await checked(LoggedFile(path.read_bytes()), Fix.NOTHING)
        assert (found.corruptions, found.leaks) == (0, 0), found.messages

    asyncio.run(run())


async def do(device: object, operation: Operation, model: bytearray) -> None:
    """Do an operation on a disk, and on the model of it."""
    from nbdjobs.nodes.device import Device

    assert isinstance(device, Device)
    kind, offset, length, fill = operation
    content = bytes([fill]) * length
    match kind:
        case "write":
            await device.pwrite(offset, memoryview(content))
        case "compressed":
            await image_of(device).pwrite_compressed(offset, memoryview(content))
        case "zero" | "unmap":
            content = bytes(length)
            await device.pwrite_zeroes(offset, length, may_unmap=kind == "unmap")
        case "discard":
            await device.pdiscard(offset, length)
            found = bytearray(length)
            await device.pread(offset, memoryview(found))
            before = model[offset : offset + length]
            assert all(now in (0, old) for now, old in zip(found, before, strict=True))
            content = bytes(found)
    model[offset : offset + length] = content
