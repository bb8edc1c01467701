# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Encrypted images: what is on the disk is never in the file, whatever becomes of clusters."""

from __future__ import annotations

import asyncio
import errno
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random
from typing import Any, Final

import pytest

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.activity import activate, inactivate
from nbdjobs.nodes.crypto.amend import LuksAmendOptions, QCryptoBlockLUKSKeyslotState
from nbdjobs.nodes.crypto.qcow import qcow_cipher
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import Discard
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.qcow2.check import CheckResult
from nbdjobs.nodes.qcow2.constants import Encryption, ExtensionType
from nbdjobs.nodes.qcow2.create import CreateOptions, empty_image
from nbdjobs.nodes.qcow2.header import Header
from nbdjobs.nodes.qcow2.node import Qcow2Node
from nbdjobs.nodes.qcow2.options import Qcow2Options, QCryptoBlockOptions
from tests.nodes.encrypted import new_volume
from tests.nodes.qcow2.logged_file import LoggedFile
from tests.nodes.qcow2.rig import checked, image_of

PASSWORD: Final = b"open sesame"
CLUSTER: Final = 16384
DISK: Final = 40 * CLUSTER

AES: Final = CreateOptions(size=DISK, cluster_size=CLUSTER, encryption=Encryption.AES)
LUKS: Final = replace(AES, encryption=Encryption.LUKS, keys=new_volume(PASSWORD)[0])

KINDS: Final = {
    "aes": AES,
    "aes of version 2": replace(AES, version=2),
    "aes with subclusters": replace(AES, is_extended=True),
    "luks": LUKS,
    "luks of version 2": replace(LUKS, version=2),
    "luks with subclusters": replace(LUKS, is_extended=True),
    "luks in sectors": replace(LUKS, cluster_size=512),
    "luks with late refcounts": replace(LUKS, is_lazy=True),
}


def encryption(kind: str, secret: str | None = "right") -> QCryptoBlockOptions:
    return QCryptoBlockOptions(format=kind.split()[0], key_secret=secret)


def make_graph() -> Graph:
    graph = Graph()
    graph.secrets.add("right", PASSWORD)
    graph.secrets.add("wrong", b"open barley")
    return graph


async def open_image(
    graph: Graph, file: LoggedFile, encrypt: QCryptoBlockOptions | None, **options: Any
) -> Qcow2Node:
    if file.name not in graph.nodes:
        file.is_owned_by_user = True
        graph.add(file)
    wanted = Qcow2Options(
        driver="qcow2",
        node_name="disk",
        file=file.name,
        discard=Discard.UNMAP,
        encrypt=encrypt,
        **options,
    )
    node = await open_node(graph, wanted)
    assert isinstance(node, Qcow2Node)
    return node


@asynccontextmanager
async def opened(kind: str, file: LoggedFile) -> AsyncIterator[Device]:
    graph = make_graph()
    node = await open_image(graph, file, encryption(kind))
    needed = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE
    device = Device(graph, node, needed=needed, shared=permissions.NONE)
    node.is_owned_by_user = False
    try:
        yield device
    finally:
        await device.close()


async def content(device: Device) -> bytes:
    buffer = bytearray(device.size)
    await device.pread(0, memoryview(buffer))
    return bytes(buffer)


def check(file: LoggedFile) -> CheckResult:
    return asyncio.run(checked(file))


def blank(kind: str) -> LoggedFile:
    return LoggedFile(empty_image(KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_has_nothing_of_the_disk(kind: str) -> None:
    file = blank(kind)
    text = b"attack at dawn! "

    async def run() -> None:
        async with opened(kind, file) as device:
            await device.pwrite(100, memoryview(text * 2000))
            await device.pwrite(600, memoryview(text * 200))
            await device.flush()
            model = bytearray(device.size)
            model[100 : 100 + 32000] = text * 2000
            model[600 : 600 + 3200] = text * 200
            assert await content(device) == model
        async with opened(kind, file) as device:
            assert await content(device) == model

    asyncio.run(run())
    assert text not in bytes(file.content)
    assert check(file).is_clean


@pytest.mark.parametrize("kind", KINDS)
def test_an_encrypted_disk_behaves_like_an_array_of_bytes(kind: str) -> None:
    file = blank(kind)
    random = Random(kind)

    async def run() -> None:
        model = bytearray(DISK)
        for _ in range(3):
            async with opened(kind, file) as device:
                for _ in range(40):
                    offset = random.randrange(DISK)
                    length = min(random.choice([1, 512, 5000, 3 * CLUSTER]), DISK - offset)
                    if random.random() < 0.3:
                        await device.pwrite_zeroes(offset, length)
                        model[offset : offset + length] = bytes(length)
                    else:
                        data = random.randbytes(length)
                        await device.pwrite(offset, memoryview(data))
                        model[offset : offset + length] = data
                assert await content(device) == model

    asyncio.run(run())
    assert check(file).is_clean


@pytest.mark.parametrize("kind", ["aes", "luks"])
def test_what_is_copied_up_from_a_backing_file_is_encrypted(kind: str) -> None:
    text = b"attack at dawn! "
    backing = LoggedFile(text * (DISK // 16), name="below")
    file = blank(kind)

    async def run() -> None:
        graph = make_graph()
        backing.is_owned_by_user = True
        graph.add(backing)
        node = await open_image(graph, file, encryption(kind), backing="below")
        needed = Permission.CONSISTENT_READ | Permission.WRITE
        device = Device(graph, node, needed=needed, shared=permissions.ALL)
        await device.pwrite(5 * CLUSTER + 700, memoryview(b"x" * 9))
        model = bytearray(backing.content)
        model[5 * CLUSTER + 700 : 5 * CLUSTER + 709] = b"x" * 9
        assert await content(device) == model
        node.is_owned_by_user = False
        await device.close()

    asyncio.run(run())
    assert text not in bytes(file.content)


def test_luks_numbers_sectors_by_the_file_and_aes_by_the_disk() -> None:
    """Seen at a cluster that is elsewhere in the file than on the disk."""

    async def run(kind: str) -> bytes:
        file = blank(kind)
        async with opened(kind, file) as device:
            await device.pwrite(7 * CLUSTER, memoryview(b"x" * CLUSTER))
            await device.pdiscard(7 * CLUSTER, CLUSTER)
            await device.flush()
            await device.pwrite(9 * CLUSTER, memoryview(b"y" * CLUSTER))
            await device.pwrite(7 * CLUSTER, memoryview(b"x" * CLUSTER))
        return bytes(file.content)

    for kind in ("aes", "luks"):
        image = asyncio.run(run(kind))
        header = Header.parse(image)
        table = struct.unpack_from(">Q", image, header.l1_offset)[0] & ~(1 << 63)
        entry = struct.unpack_from(">Q", image, table + 7 * 8)[0] & ~(1 << 63)
        sector = bytearray(b"x" * 512)
        if kind == "luks":
            new_volume(PASSWORD)[1].encrypt(entry, memoryview(sector))
        else:
            qcow_cipher(PASSWORD).encrypt(7 * CLUSTER, memoryview(sector))
        assert image[entry : entry + 512] == sector


def test_nothing_is_sent_or_read_past_the_cipher() -> None:
    async def run() -> None:
        async with opened("luks", file) as device:
            await device.pwrite(0, memoryview(b"x" * CLUSTER))
            node = device.node
            buffer = memoryview(bytearray(512))
            assert not node.pread_now(0, buffer, False)
            assert node.stored_at(0, CLUSTER, False) is None
            assert node.limits.request_alignment == 512
            assert node.is_encrypted

    file = blank("luks")
    asyncio.run(run())


def test_compressed_writes_are_refused_as_nobody_would_encrypt_them() -> None:
    file = blank("luks")

    async def run() -> None:
        async with opened("luks", file) as device:
            with pytest.raises(NodeError) as caught:
                await device.node.pwrite_compressed(0, memoryview(bytes(CLUSTER)))
            assert caught.value.errno == errno.ENOTSUP

    asyncio.run(run())


def test_its_name_tells_which_secret_it_needs() -> None:
    file = blank("luks")

    async def run() -> None:
        async with opened("luks", file) as device:
            named = json.loads(device.node.filename.removeprefix("json:"))
            assert named["encrypt.key-secret"] == "right"

    asyncio.run(run())


def test_an_image_that_is_taken_back_needs_no_password_again() -> None:
    file = blank("luks")

    async def run() -> None:
        graph = make_graph()
        node = await open_image(graph, file, encryption("luks"))
        graph.secrets.remove("right")
        await inactivate(graph, [node])
        await activate(graph, [node])
        device = Device(
            graph,
            node,
            needed=Permission.CONSISTENT_READ | Permission.WRITE,
            shared=permissions.ALL,
        )
        await device.pwrite(0, memoryview(b"x" * 512))
        assert (await content(device))[:513] == b"x" * 512 + b"\0"
        node.is_owned_by_user = False
        await device.close()

    asyncio.run(run())


def test_the_disk_grows_with_zeroes() -> None:
    file = blank("luks")

    async def run() -> None:
        async with opened("luks", file) as device:
            await device.pwrite(DISK - 512, memoryview(b"x" * 512))
            await device.node.truncate(DISK + 3 * 512)
            assert (await content(device))[DISK - 512 :] == b"x" * 512 + bytes(3 * 512)

    asyncio.run(run())


def test_passwords_of_an_image_change_while_it_is_open() -> None:
    file = blank("luks")
    state = QCryptoBlockLUKSKeyslotState
    add = LuksAmendOptions(state=state.ACTIVE, new_secret="wrong", iter_time=0)
    erase = LuksAmendOptions(state=state.INACTIVE, old_secret="right")

    async def run() -> None:
        graph = make_graph()
        async with opened("luks", file) as device:
            node = image_of(device)
            for change in (add, erase):
                await node.amend_keys(change, graph.secrets, is_forced=False)
            await device.pwrite(0, memoryview(b"x" * 512))
            assert node.luks_header is not None
            assert [slot.is_active for slot in node.luks_header.slots] == [
                False,
                True,
                *[False] * 6,
            ]
        node = await open_image(graph, file, encryption("luks", "wrong"), read_only=True)
        buffer = bytearray(512)
        await node.pread(0, memoryview(buffer))
        assert buffer == b"x" * 512
        with pytest.raises(CommandError, match="Block node is read-only"):
            await node.amend_keys(add, graph.secrets, is_forced=False)
        node.is_owned_by_user = False
        await graph.drop_if_unused(node)

    asyncio.run(run())
    assert refusal(file, encryption("luks")) == "Invalid password, cannot unlock any keyslot"
    assert check(file).is_clean


# What does not fit


def refusal(file: LoggedFile, encrypt: QCryptoBlockOptions | None) -> str:
    with pytest.raises(CommandError) as caught:
        asyncio.run(open_image(make_graph(), file, encrypt))
    return caught.value.description


@pytest.mark.parametrize("kind", ["aes", "luks"])
def test_without_the_right_password_nothing_is_opened(kind: str) -> None:
    missing = "Parameter 'encrypt.key-secret' is required for cipher"
    other = "luks" if kind == "aes" else "aes"
    assert refusal(blank(kind), None) == missing
    assert refusal(blank(kind), encryption(kind, None)) == missing
    assert refusal(blank(kind), encryption(kind, "nothing")) == "No secret with id 'nothing'"
    assert refusal(blank(kind), encryption(other)) == (
        f"Header reported '{kind}' encryption format but options specify '{other}'"
    )


def test_a_wrong_password_is_noticed_with_luks() -> None:
    wrong = "Invalid password, cannot unlock any keyslot"
    assert refusal(blank("luks"), encryption("luks", "wrong")) == wrong


def test_an_image_that_is_not_encrypted_takes_no_password() -> None:
    plain = LoggedFile(empty_image(CreateOptions(size=DISK, cluster_size=CLUSTER)))
    assert refusal(plain, encryption("luks")) == (
        "No encryption in image header, but options specified format 'luks'"
    )


@pytest.mark.parametrize(
    ("place", "data", "words"),
    [
        (0, b"\x12", "Missing CRYPTO header for crypt method 2"),
        (4, struct.pack(">I", 8), "CRYPTO header extension size 8, but expected size 16"),
        (
            8,
            struct.pack(">Q", 512),
            f"Encryption header offset '512' is not a multiple of cluster size '{CLUSTER}'",
        ),
        (8, struct.pack(">Q", 1 << 62), "Volume is not in LUKS format"),
        (8, struct.pack(">Q", (1 << 64) - CLUSTER), "Volume is not in LUKS format"),
        (16, struct.pack(">Q", 0), "Request for data outside of extension header"),
        (16, struct.pack(">Q", 600), "Request for data outside of extension header"),
    ],
)
def test_a_damaged_pointer_to_the_header_is_refused(place: int, data: bytes, words: str) -> None:
    file = blank("luks")
    kind = struct.pack(">I", ExtensionType.ENCRYPTION)
    begin = file.content.index(kind) + place
    file.content[begin : begin + len(data)] = data
    assert refusal(file, encryption("luks")) == words


def test_images_made_here_have_room_for_all_keys() -> None:
    image = empty_image(LUKS)
    assert LUKS.keys is not None
    header = Header.parse(image)
    pointer = header.extension(ExtensionType.ENCRYPTION)
    assert pointer is not None
    offset, length = struct.unpack(">QQ", pointer)
    assert length == LUKS.keys.header.payload_offset
    assert image[offset : offset + length] == LUKS.keys.area()
