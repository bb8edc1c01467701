# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Encrypted qcow2 images go back and forth between nbdjobs and QEMU."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Final

import pytest

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.nodes import permissions
from nbdjobs.nodes.crypto import luks
from nbdjobs.nodes.crypto.algorithms import QCryptoHashAlgorithm
from nbdjobs.nodes.crypto.luks import FilledSlot
from nbdjobs.nodes.crypto.spec import CipherSpec
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.file import FileOptions
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.qcow2.constants import Encryption
from nbdjobs.nodes.qcow2.create import CreateOptions, empty_image
from nbdjobs.nodes.qcow2.options import Qcow2Options, QCryptoBlockOptions
from nbdjobs.qmp.commands import REGISTRY
from tests.interop import encrypted_images
from tests.interop.encrypted_images import PASSWORD, SECRET
from tests.interop.oracle import Oracle
from tests.interop.same_answers import Ask, ours, theirs
from tests.interop.tools import run

pytestmark = pytest.mark.interop

SIZE: Final = 1 << 20


def keys(mode: str, length: int) -> FilledSlot:
    spec = CipherSpec.parse("aes", mode, length)
    return luks.new_volume(spec, QCryptoHashAlgorithm.SHA256, PASSWORD.encode(), 0)


AES: Final = CreateOptions(size=SIZE, encryption=Encryption.AES)
LUKS: Final = CreateOptions(size=SIZE, encryption=Encryption.LUKS, keys=keys("xts-plain64", 64))

VARIANTS: Final = {
    "aes": AES,
    "aes, version 2, small clusters": replace(AES, version=2, cluster_size=512),
    "aes, subclusters": replace(AES, is_extended=True),
    "luks": LUKS,
    "luks, version 2": replace(LUKS, version=2),
    "luks, small clusters": replace(LUKS, cluster_size=512),
    "luks, large clusters": replace(LUKS, cluster_size=2 << 20),
    "luks, subclusters": replace(LUKS, is_extended=True, cluster_size=16384),
    "luks, late refcounts of one bit": replace(LUKS, is_lazy=True, refcount_bits=1),
    "luks, cbc": replace(LUKS, keys=keys("cbc-essiv:sha256", 16)),
}


def method(variant: str) -> str:
    return variant.split(",")[0]


def image_options(variant: str, path: Path) -> str:
    return (
        f"driver=qcow2,encrypt.format={method(variant)},encrypt.key-secret=right"
        f",file.driver=file,file.filename={path}"
    )


async def use(variant: str, path: Path) -> Device:
    graph = Graph()
    graph.secrets.add("right", PASSWORD.encode())
    options = Qcow2Options(
        driver="qcow2",
        node_name="disk",
        file=FileOptions(driver="file", filename=str(path)),
        encrypt=QCryptoBlockOptions(format=method(variant), key_secret="right"),
    )
    node = await open_node(graph, options)
    node.is_owned_by_user = False
    needed = Permission.CONSISTENT_READ | Permission.WRITE
    return Device(graph, node, needed=needed, shared=permissions.NONE)


def read(variant: str, path: Path) -> bytes:
    async def go() -> bytes:
        device = await use(variant, path)
        buffer = bytearray(device.size)
        await device.pread(0, memoryview(buffer))
        await device.close()
        return bytes(buffer)

    return asyncio.run(go())


def change(variant: str, path: Path, content: bytearray) -> None:
    """Write here and there on the disk, and in `content` as well."""
    random = Random(variant)

    async def go() -> None:
        device = await use(variant, path)
        for _ in range(30):
            offset = random.randrange(SIZE)
            length = min(random.choice([1, 512, 4096, 150_000]), SIZE - offset)
            data = random.randbytes(length) if random.random() < 0.8 else bytes(length)
            content[offset : offset + length] = data
            if any(data):
                await device.pwrite(offset, memoryview(data))
            else:
                await device.pwrite_zeroes(offset, length)
        await device.flush()
        await device.close()

    asyncio.run(go())


def goes_back_and_forth(variant: str, path: Path, plain: Path) -> None:
    content = bytearray(Random(3).randbytes(SIZE))
    content[SIZE // 2 : SIZE // 2 + 200_000] = bytes(200_000)
    plain.write_bytes(content)
    encrypted_images.write(image_options(variant, path), plain)
    assert read(variant, path) == content
    change(variant, path, content)
    plain.write_bytes(content)
    encrypted_images.assert_same(image_options(variant, path), plain)
    run("qemu-img", "check", "-q", *SECRET, "--image-opts", image_options(variant, path))


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_made_here(variant: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(empty_image(VARIANTS[variant]))
    goes_back_and_forth(variant, path, tmp_path / "plain")


@pytest.mark.parametrize(
    "options",
    [
        "encrypt.format=aes",
        "encrypt.format=aes,compat=0.10,cluster_size=4k",
        "encrypt.format=luks,encrypt.iter-time=0,extended_l2=on",
    ],
)
def test_images_made_by_qemu(options: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    given = f"encrypt.key-secret=right,{options}"
    encrypted_images.create("qcow2", path, given, SIZE)
    variant = "aes" if "aes" in options else "luks"
    goes_back_and_forth(variant, path, tmp_path / "plain")


@pytest.mark.parametrize("variant", ["aes", "luks"])
def test_a_backup_into_an_encrypted_image_is_what_qemu_reads(variant: str, tmp_path: Path) -> None:
    plain, image = tmp_path / "plain", tmp_path / "image"
    plain.write_bytes(bytes(200_000) + Random(5).randbytes(SIZE - 300_000) + bytes(100_000))
    image.write_bytes(empty_image(VARIANTS[variant]))
    encrypt = encryption(variant, "right")
    steps: list[Ask] = [
        secret("right", PASSWORD),
        ("blockdev-add", {"driver": "file", "node-name": "source", "filename": str(plain)}),
        (
            "blockdev-add",
            {
                "driver": "qcow2",
                "node-name": "target",
                "file": {"driver": "file", "filename": str(image)},
                "encrypt": encrypt,
            },
        ),
        (
            "blockdev-backup",
            {
                "job-id": "b",
                "device": "source",
                "target": "target",
                "sync": "full",
                "auto-dismiss": False,
            },
        ),
    ]

    async def go() -> None:
        daemon = Daemon()
        try:
            for command, arguments in steps:
                await REGISTRY.find(command).execute(daemon, arguments)
            job = daemon.jobs.get("b")
            await daemon.jobs.ended(job)
            assert job.error is None
        finally:
            await daemon.shutdown()

    asyncio.run(go())
    encrypted_images.assert_same(image_options(variant, image), plain)
    run("qemu-img", "check", "-q", *SECRET, "--image-opts", image_options(variant, image))


# Answers


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    with Oracle(tmp_path_factory.mktemp("oracle"), capabilities=[]) as running:
        yield running


def secret(name: str, data: str) -> Ask:
    return "object-add", {"qom-type": "secret", "id": name, "data": data}


def add(image: str, encrypt: dict[str, str] | None = None) -> Ask:
    file = {"driver": "file", "filename": f"@/{image}"}
    given = {} if encrypt is None else {"encrypt": encrypt}
    return "blockdev-add", {"driver": "qcow2", "node-name": "n", "file": file, **given}


def encryption(name: str, key_secret: str | None = None) -> dict[str, str]:
    return {"format": name} | ({} if key_secret is None else {"key-secret": key_secret})


REMOVE: Final[Ask] = ("blockdev-del", {"node-name": "n"})
LOOK: Final[Ask] = ("query-named-block-nodes", {})

SESSION: Final[list[Ask]] = [
    secret("right", PASSWORD),
    secret("wrong", "open barley"),
    *(
        ask
        for image, other in (("aes", "luks"), ("luks", "aes"))
        for ask in (
            add(image),
            add(image, encryption(image)),
            add(image, encryption(image, "nothing")),
            add(image, encryption(other, "right")),
            add(image, encryption("nothing", "right")),
            add(image, encryption(image, "right")),
            LOOK,
            REMOVE,
        )
    ),
    add("luks", encryption("luks", "wrong")),
    add("plain", encryption("luks", "right")),
    add("plain", encryption("aes")),
    *(("object-del", {"id": name}) for name in ("right", "wrong")),
]


def test_commands_get_the_same_answers(oracle: Oracle, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    images = {"aes": AES, "luks": LUKS, "plain": CreateOptions(size=SIZE)}
    for name, options in images.items():
        (tmp_path / "ours" / name).write_bytes(empty_image(options))
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    expected = theirs(SESSION, tmp_path / "theirs", oracle)
    for ask, mine, other in zip(SESSION, ours(SESSION, tmp_path / "ours"), expected, strict=True):
        assert mine == other, ask
