# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The driver `luks`: what it does beside encrypting, and what it refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from nbdjobs.errors import CommandError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.file import FileOptions
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.luks import LuksNode, LuksOptions
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.reopening import reopen
from nbdjobs.nodes.status import DATA
from tests.nodes.encrypted import SPEC, new_volume, volume_of_zeroes
from tests.nodes.faults import MemoryNode

SIZE: Final = 3 << 20
PASSWORD: Final = b"open sesame"
START: Final = new_volume(PASSWORD)[0].header.payload_offset
WRITER: Final = Permission.CONSISTENT_READ | Permission.WRITE


@pytest.fixture
def path(tmp_path: Path) -> Path:
    volume = tmp_path / "volume"
    volume.write_bytes(volume_of_zeroes(SIZE, PASSWORD))
    return volume


def options(path: Path, secret: str | None = "right") -> LuksOptions:
    file = FileOptions(driver="file", node_name="file", filename=str(path))
    return LuksOptions(driver="luks", node_name="disk", file=file, key_secret=secret)


def make_graph() -> Graph:
    graph = Graph()
    graph.secrets.add("right", PASSWORD)
    graph.secrets.add("wrong", b"open barley")
    graph.secrets.add("noise", b"\xff")
    graph.secrets.add("thread", None)
    return graph


def with_node(path: Path, scenario: Callable[[Graph, LuksNode], Awaitable[None]]) -> None:
    async def run() -> None:
        graph = make_graph()
        node = await open_node(graph, options(path))
        assert isinstance(node, LuksNode)
        try:
            await scenario(graph, node)
        finally:
            node.is_owned_by_user = False
            await graph.drop_if_unused(node)
        assert not graph.nodes

    asyncio.run(run())


def test_the_file_has_nothing_of_what_is_written(path: Path) -> None:
    secret = b"attack at dawn! " * 32

    async def scenario(graph: Graph, node: LuksNode) -> None:
        await node.pwrite(5120, memoryview(secret))
        buffer = bytearray(len(secret))
        await node.pread(5120, memoryview(buffer))
        assert buffer == secret

    before = path.read_bytes()
    with_node(path, scenario)
    after = path.read_bytes()
    changed = slice(START + 5120, START + 5120 + len(secret))
    assert secret[:16] not in after
    assert after[changed] != before[changed]
    assert before[: changed.start] == after[: changed.start]
    assert before[changed.stop :] == after[changed.stop :]


def test_what_the_writer_gave_is_not_touched(path: Path) -> None:
    data = bytearray(b"x" * 4096)

    async def scenario(graph: Graph, node: LuksNode) -> None:
        await node.pwrite(0, memoryview(data))

    with_node(path, scenario)
    assert data == b"x" * 4096


def test_the_same_content_looks_different_everywhere(path: Path) -> None:
    async def scenario(graph: Graph, node: LuksNode) -> None:
        await node.pwrite(0, memoryview(b"\x55" * SIZE))

    with_node(path, scenario)
    payload = path.read_bytes()[START:]
    blocks = {payload[place : place + 16] for place in range(0, SIZE, 16)}
    assert len(blocks) == SIZE // 16


class ReadyNode(MemoryNode):
    """Reads on the spot, while it is asked to."""

    is_ready = True

    def pread_now(self, offset: int, buffer: memoryview, data_only: bool) -> bool:
        if self.is_ready:
            buffer[:] = self.content[offset : offset + len(buffer)]
        return self.is_ready


def test_whole_sectors_are_read_on_the_spot_where_the_file_can() -> None:
    file = ReadyNode(volume_of_zeroes(8192, PASSWORD), name="file")
    file.is_owned_by_user = True

    async def run() -> None:
        graph = make_graph()
        graph.add(file)
        wanted = LuksOptions(driver="luks", node_name="disk", file="file", key_secret="right")
        node = await open_node(graph, wanted)
        await node.pwrite(1024, memoryview(b"x" * 512))
        buffer = memoryview(bytearray(1024))
        assert node.pread_now(512, buffer, True)
        assert buffer == bytes(512) + b"x" * 512
        assert not node.pread_now(700, buffer, False)
        assert not node.pread_now(0, buffer[:700], False)
        file.is_ready = False
        assert not node.pread_now(512, buffer, False)
        buffer[:] = bytes(1024)
        await node.pread(512, buffer)
        assert buffer == bytes(512) + b"x" * 512

    asyncio.run(run())


def test_long_requests_let_others_have_a_turn(path: Path) -> None:
    async def scenario(graph: Graph, node: LuksNode) -> None:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.ensure_future(count())
        await node.pread(0, memoryview(bytearray(SIZE)))
        counting.cancel()
        assert turns >= 3

    with_node(path, scenario)


def test_it_is_as_large_as_the_payload_and_all_of_it_is_data(path: Path) -> None:
    async def scenario(graph: Graph, node: LuksNode) -> None:
        assert node.size == SIZE
        assert await node.block_status(0, SIZE) == (SIZE, DATA)
        assert node.limits.request_alignment == 512
        assert node.is_encrypted
        assert node.luks_header.spec == SPEC

    with_node(path, scenario)


def test_zeroes_are_written_encrypted(path: Path) -> None:
    async def scenario(graph: Graph, node: LuksNode) -> None:
        await node.pwrite(0, memoryview(b"x" * 8192))
        await node.pwrite_zeroes(1000, 5000)
        buffer = bytearray(8192)
        await node.pread(0, memoryview(buffer))
        assert buffer == b"x" * 1000 + bytes(5000) + b"x" * 2192

    with_node(path, scenario)
    assert bytes(512) not in path.read_bytes()[START:]


def test_its_name_tells_which_secret_it_needs_but_not_what_it_is(path: Path) -> None:
    async def scenario(graph: Graph, node: LuksNode) -> None:
        named = json.loads(node.filename.removeprefix("json:"))
        assert named == {
            "driver": "luks",
            "file": {"driver": "file", "filename": str(path)},
            "key-secret": "right",
        }

    with_node(path, scenario)


def test_it_always_reads_its_file_and_needs_else_what_its_users_do(path: Path) -> None:
    async def scenario(graph: Graph, node: LuksNode) -> None:
        edge = node.edges["file"]
        assert (edge.needed, edge.shared) == (Permission.CONSISTENT_READ, permissions.ALL)
        shared = permissions.ALL & ~Permission.RESIZE
        device = Device(graph, node, needed=WRITER, shared=shared)
        assert (edge.needed, edge.shared) == (WRITER, shared)
        await device.close()

    with_node(path, scenario)


def test_its_file_grows_and_shrinks_with_it(path: Path) -> None:
    async def scenario(graph: Graph, node: LuksNode) -> None:
        device = Device(graph, node, needed=WRITER | Permission.RESIZE, shared=permissions.ALL)
        await node.truncate(2 * SIZE)
        assert (node.size, node.edges["file"].node.size) == (2 * SIZE, START + 2 * SIZE)
        await node.pwrite(2 * SIZE - 512, memoryview(b"e" * 512))
        await node.truncate(512)
        assert (node.size, node.edges["file"].node.size) == (512, START + 512)
        with pytest.raises(CommandError, match="exceeds maximum"):
            await node.truncate((1 << 63) - (1 << 30))
        await device.close()

    with_node(path, scenario)


@pytest.mark.parametrize(
    ("secret", "refusal"),
    [
        (None, "Parameter 'key-secret' is required for cipher"),
        ("nothing", "No secret with id 'nothing'"),
        ("thread", "Object with id 'thread' is not a secret"),
        ("noise", "Data from secret noise is not valid UTF-8"),
        ("wrong", "Invalid password, cannot unlock any keyslot"),
    ],
)
def test_without_the_right_password_nothing_is_opened(
    path: Path, secret: str | None, refusal: str
) -> None:
    graph = make_graph()
    with pytest.raises(CommandError) as caught:
        asyncio.run(open_node(graph, options(path, secret)))
    assert caught.value.description == refusal
    assert not graph.nodes


@pytest.mark.parametrize(
    ("size", "refusal"),
    [
        (0, "Volume is not in LUKS format"),
        (591, "Keyslot 7 is corrupted"),
        (4096, "Invalid password, cannot unlock any keyslot"),
        (START - 512, "Could not refresh total sector count: Input/output error"),
    ],
)
def test_a_file_that_was_cut_off_is_refused(path: Path, size: int, refusal: str) -> None:
    with path.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(CommandError, match=refusal):
        asyncio.run(open_node(make_graph(), options(path)))


def test_a_payload_may_be_empty_or_end_inside_a_sector(path: Path) -> None:
    async def is_empty(graph: Graph, node: LuksNode) -> None:
        assert node.size == 0

    async def has_one_sector(graph: Graph, node: LuksNode) -> None:
        assert node.size == 512

    for size, scenario in ((START, is_empty), (START + 100, has_one_sector)):
        with path.open("r+b") as file:
            file.truncate(size)
        with_node(path, scenario)


# While it is open


def test_common_options_change_and_the_password_does_not(path: Path) -> None:
    async def scenario(graph: Graph, node: LuksNode) -> None:
        given = replace(options(path), file="file")
        await reopen(graph, [replace(given, read_only=True)])
        assert node.is_read_only
        with pytest.raises(CommandError, match="Cannot change the option 'key-secret'"):
            await reopen(graph, [replace(given, key_secret="wrong")])

    with_node(path, scenario)


def test_another_volume_needs_another_node(path: Path, tmp_path: Path) -> None:
    async def scenario(graph: Graph, node: LuksNode) -> None:
        await open_node(
            graph, FileOptions(driver="file", node_name="other", filename=str(tmp_path / "other"))
        )
        with pytest.raises(CommandError, match="'file' of an encrypted node"):
            await reopen(graph, [replace(options(path), file="other")])
        assert node.edges["file"].node.name == "file"
        other = graph.nodes["other"]
        other.is_owned_by_user = False
        await graph.drop_if_unused(other)

    (tmp_path / "other").write_bytes(bytes(SIZE))
    with_node(path, scenario)
