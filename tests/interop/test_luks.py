# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""LUKS volumes go back and forth between nbdjobs and QEMU, and commands get the same answers."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest

from nbdjobs.nodes import permissions
from nbdjobs.nodes.crypto.amend import LuksAmendOptions, QCryptoBlockLUKSKeyslotState, amend
from nbdjobs.nodes.crypto.creation import LuksCreateOptions, create_luks
from nbdjobs.nodes.crypto.volume import LuksVolume
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.file import FileOptions
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.luks import LuksOptions
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.nodes.permissions import Permission
from nbdjobs.qapi.visitor import visit
from tests.interop import encrypted_images
from tests.interop.encrypted_images import PASSWORD, SECRET
from tests.interop.oracle import Oracle, Reply
from tests.interop.same_answers import Ask, ours, theirs
from tests.interop.tools import run

pytestmark = pytest.mark.interop

SIZE: Final = 640 * 1024

VARIANTS: Final = [
    "",
    "cipher-alg=aes-128",
    "cipher-alg=aes-192",
    "cipher-mode=cbc",
    "cipher-mode=cbc,cipher-alg=aes-128,ivgen-alg=essiv",
    "cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=md5",
    "cipher-mode=ecb",
    "ivgen-alg=plain",
    "ivgen-alg=plain64,ivgen-hash-alg=sha256",
    "ivgen-alg=essiv",
    "hash-alg=md5",
    "hash-alg=sha1",
    "hash-alg=sha224",
    "hash-alg=sha384",
    "hash-alg=sha512",
]


def volume_options(path: Path) -> str:
    return f"driver=luks,key-secret=right,file.driver=file,file.filename={path}"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain"
    path.write_bytes(Random(7).randbytes(SIZE))
    return path


def make_graph() -> Graph:
    graph = Graph()
    graph.secrets.add("right", PASSWORD.encode())
    graph.secrets.add("new", b"another one")
    return graph


async def use(graph: Graph, options: BlockdevOptions) -> Device:
    """Open a node as its only user."""
    node = await open_node(graph, options)
    node.is_owned_by_user = False
    needed = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE
    return Device(graph, node, needed=needed, shared=permissions.NONE)


def read(path: Path) -> bytes:
    """All of a volume, as nbdjobs reads it."""

    async def go() -> bytes:
        device = await use(make_graph(), luks(path))
        buffer = bytearray(device.size)
        await device.pread(0, memoryview(buffer))
        await device.close()
        return bytes(buffer)

    return asyncio.run(go())


def write(path: Path, content: bytes) -> None:
    """Write all of a volume in pieces that do not keep to sectors."""

    async def go() -> None:
        device = await use(make_graph(), luks(path))
        for begin in range(0, len(content), 70001):
            await device.pwrite(begin, memoryview(content)[begin : begin + 70001])
        await device.flush()
        await device.close()

    asyncio.run(go())


def luks(path: Path) -> LuksOptions:
    file = FileOptions(driver="file", filename=str(path))
    return LuksOptions(driver="luks", node_name="disk", key_secret="right", file=file)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_reads_what_the_other_wrote(variant: str, plain: Path, tmp_path: Path) -> None:
    """In a volume that was made here: qemu-img takes seconds for each that it makes."""
    path = tmp_path / "volume"
    path.touch()
    given = dict(option.split("=") for option in variant.split(",") if option)
    create(path, **given)
    encrypted_images.write(volume_options(path), plain)
    assert read(path) == plain.read_bytes()
    plain.write_bytes(Random(8).randbytes(SIZE))
    write(path, plain.read_bytes())
    encrypted_images.assert_same(volume_options(path), plain)
    info = run("qemu-img", "info", "--output=json", *SECRET, str(path))
    assert f'"cipher-alg": "{given.get("cipher-alg", "aes-256")}"' in info
    assert f'"hash-alg": "{given.get("hash-alg", "sha256")}"' in info


@pytest.mark.parametrize(
    "variant", ["", "cipher-mode=cbc,cipher-alg=aes-128,ivgen-alg=essiv,hash-alg=sha512"]
)
def test_volumes_that_qemu_made_are_read_and_written(
    variant: str, plain: Path, tmp_path: Path
) -> None:
    path = tmp_path / "volume"
    encrypted_images.create_luks(path, variant, SIZE)
    encrypted_images.write(volume_options(path), plain)
    assert read(path) == plain.read_bytes()
    plain.write_bytes(Random(8).randbytes(SIZE))
    write(path, plain.read_bytes())
    encrypted_images.assert_same(volume_options(path), plain)


def create(path: Path, **given: Any) -> None:
    options = visit(LuksCreateOptions, {"key-secret": "right", "iter-time": 0, **given})

    async def go() -> None:
        graph = make_graph()
        file = FileOptions(driver="file", node_name="file", filename=str(path))
        device = await use(graph, file)
        await create_luks(device.node, options, SIZE, graph.secrets)
        await device.close()

    asyncio.run(go())


def test_qemu_opens_a_volume_with_a_password_added_here(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "volume"
    path.touch()
    create(path)
    encrypted_images.write(volume_options(path), plain)

    async def go() -> None:
        graph = make_graph()
        device = await use(graph, FileOptions(driver="file", node_name="f", filename=str(path)))
        volume = await LuksVolume.read(device.node)
        state = QCryptoBlockLUKSKeyslotState
        add = LuksAmendOptions(state=state.ACTIVE, new_secret="new", iter_time=0)
        await amend(volume, add, graph.secrets, key_secret="right")
        erase = LuksAmendOptions(state=state.INACTIVE, old_secret="right")
        await amend(volume, erase, graph.secrets, key_secret="right")
        await device.close()

    asyncio.run(go())
    secret = ("--object", "secret,id=right,data=another one")
    raw = f"driver=raw,file.driver=file,file.filename={plain}"
    run("qemu-img", "compare", *secret, "--image-opts", raw, volume_options(path))


# Answers


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    with Oracle(tmp_path_factory.mktemp("oracle"), capabilities=[]) as running:
        yield running


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("volume") / "disk"
    encrypted_images.create_luks(path, "", 1 << 20)
    return path


def secret(name: str, data: str, **more: str) -> Ask:
    return "object-add", {"qom-type": "secret", "id": name, "data": data, **more}


def add(path: str = "@/disk", **options: object) -> Ask:
    file = {"driver": "file", "filename": path}
    named = {name.replace("_", "-"): value for name, value in options.items()}
    return "blockdev-add", {"driver": "luks", "node-name": "n", "file": file, **named}


def reopen(**options: object) -> Ask:
    file = {"driver": "file", "filename": "@/disk"}
    named = {name.replace("_", "-"): value for name, value in options.items()}
    return "blockdev-reopen", {
        "options": [{"driver": "luks", "node-name": "n", "file": file, **named}]
    }


SESSION: Final[list[Ask]] = [
    add(),
    add(key_secret="nothing"),
    secret("wrong", "open barley"),
    add(key_secret="wrong"),
    ("object-add", {"qom-type": "iothread", "id": "io"}),
    add(key_secret="io"),
    secret("empty", ""),
    add(key_secret="empty"),
    secret("noise", "gIGC/w==", format="base64"),
    add(key_secret="noise"),
    secret("right", PASSWORD),
    add("@/nothing", key_secret="right"),
    add(key_secret="right"),
    ("query-named-block-nodes", {}),
    ("query-named-block-nodes", {"flat": True}),
    ("x-debug-query-block-graph", {}),
    ("object-del", {"id": "right"}),
    reopen(key_secret="wrong"),
    reopen(),
    ("block_resize", {"node-name": "n", "size": 2 << 20}),
    ("query-named-block-nodes", {"flat": True}),
    ("block_resize", {"node-name": "n", "size": 0}),
    ("blockdev-add", {"driver": "raw", "node-name": "r", "file": "n"}),
    ("query-named-block-nodes", {}),
    ("x-debug-query-block-graph", {}),
    ("blockdev-del", {"node-name": "n"}),
    ("blockdev-del", {"node-name": "r"}),
    ("blockdev-del", {"node-name": "n"}),
    ("object-del", {"id": "wrong"}),
    ("object-del", {"id": "io"}),
    ("object-del", {"id": "empty"}),
    ("object-del", {"id": "noise"}),
]


def answers(session: list[Ask], folder: Path, oracle: Oracle) -> Iterator[tuple[Ask, Reply, Reply]]:
    for name in ("theirs", "ours"):
        (folder / name).mkdir()
        for file in folder.iterdir():
            if file.is_file():
                shutil.copy(file, folder / name)
    expected = theirs(session, folder / "theirs", oracle)
    yield from zip(session, ours(session, folder / "ours"), expected, strict=True)


def test_commands_get_the_same_answers(volume: Path, oracle: Oracle, tmp_path: Path) -> None:
    shutil.copy(volume, tmp_path / "disk")
    for ask, mine, other in answers(SESSION, tmp_path, oracle):
        assert mine == other, ask


def number(value: int) -> bytes:
    return value.to_bytes(4)


def text(value: str) -> bytes:
    return value.encode().ljust(32, b"\0")


#: Damages to the header: where, and what stands there instead.
DAMAGES: Final[list[tuple[int, bytes]]] = [
    (0, b"X"),
    (6, b"\0\2"),
    *((field, b"a" * 32) for field in (8, 40, 72)),
    *((8, text(name)) for name in ("foo", "", "AES")),
    *((40, text(mode)) for mode in ("xts", "", "-", "xts-", "foo-plain64", "xts-foo")),
    *((40, text(mode)) for mode in ("cbc-essiv:", "xts-plain64:foo", "xts-plain64-x")),
    *((72, text(name)) for name in ("foo", "", "SHA256")),
    *((104, number(sector)) for sector in (0, 7, 8, 4039, 6089)),
    *((108, number(length)) for length in (0, 1, 24, 32, 63, 128, 0xFFFFFFFF)),
    (164, number(0)),
    (208, number(0)),
    (208, number(0xDEAD)),
    (212, number(0)),
    (256, number(1)),
    *((248, number(sector)) for sector in (0, 7, 9, 512, 5000)),
    *((252, number(stripes)) for stripes in (0, 3999)),
    *((296, number(sector)) for sector in (8, 4000)),
    (112, b"x"),
]


def test_damaged_headers_are_refused_in_the_same_words(
    volume: Path, oracle: Oracle, tmp_path: Path
) -> None:
    content = volume.read_bytes()
    session: list[Ask] = [secret("right", PASSWORD)]
    for index, (offset, data) in enumerate(DAMAGES):
        damaged = content[:offset] + data + content[offset + len(data) :]
        (tmp_path / f"damaged-{index}").write_bytes(damaged)
        session.append(add(f"@/damaged-{index}", key_secret="right"))
    session.append(("object-del", {"id": "right"}))
    for ask, mine, other in answers(session, tmp_path, oracle):
        assert mine == other, ask
        assert ask[0] != "blockdev-add" or "error" in mine
