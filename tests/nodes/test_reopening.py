# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Reopening: other options and other children, all at once or not at all, under clients' feet."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdjobs.errors import CommandError
from nbdjobs.nodes.config import DetectZeroes
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.driver import DriverNode
from nbdjobs.nodes.file import FileNode, FileOptions
from nbdjobs.nodes.graph import Graph, Role
from nbdjobs.nodes.leaky_bucket import ThrottleConfig
from nbdjobs.nodes.null import NullOptions
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import BlockdevOptions, CacheOptions, Discard
from nbdjobs.nodes.permissions import ALL, Permission
from nbdjobs.nodes.raw import RawOptions
from nbdjobs.nodes.reopening import reopen
from nbdjobs.nodes.throttle import ThrottleNode, ThrottleOptions
from nbdjobs.nodes.throttle_group import ThrottleGroup
from tests.nodes.faults import MemoryNode, Op
from tests.nodes.graphs import PassiveRoot

SIZE = 1024 * 1024
READER = Permission.CONSISTENT_READ
WRITER = READER | Permission.WRITE
SHARED = ALL & ~Permission.RESIZE

Scenario = Callable[[Graph], Awaitable[None]]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def play(scenario: Scenario) -> None:
    """Run a scenario on a new graph, and see that all of it can be closed afterwards."""

    async def run() -> None:
        graph = Graph()
        before = descriptors()
        await scenario(graph)
        for node in list(graph.nodes.values()):
            node.is_owned_by_user = False
            await graph.drop_if_unused(node)
        assert not graph.nodes
        assert descriptors() == before

    def descriptors() -> set[str]:
        """What this process has open, but for the descriptor that lists it."""
        found = {fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}
        return {os.readlink(f"/proc/self/fd/{fd}") for fd in found}

    asyncio.run(run())


def file(path: Path, name: str | None = "f", **more: Any) -> FileOptions:
    return FileOptions(driver="file", node_name=name, filename=str(path), **more)


def null(name: str, size: int = SIZE, **more: Any) -> NullOptions:
    return NullOptions(driver="null-co", node_name=name, size=size, **more)


def raw(name: str, child: str | BlockdevOptions, **more: Any) -> RawOptions:
    return RawOptions(driver="raw", node_name=name, file=child, **more)


async def refusal(graph: Graph, *options: BlockdevOptions) -> str:
    """Reopen, expect a refusal, and see that nothing has changed."""
    before = picture(graph)
    with pytest.raises(CommandError) as caught:
        await reopen(graph, options)
    assert picture(graph) == before
    return caught.value.description


def picture(graph: Graph) -> object:
    """All that a reopening could change."""
    return [
        (
            name,
            node.config,
            node.size,
            node.limits,
            node.given if isinstance(node, DriverNode) else None,
            node.inline_parent,
            node.was_writable,
            {key: (edge.node.name, edge.role) for key, edge in node.edges.items()},
            [(edge.parent, edge.name, edge.needed, edge.shared) for edge in node.parents],
            node._storage if isinstance(node, FileNode) else None,
            node.group if isinstance(node, ThrottleNode) else None,
        )
        for name, node in graph.nodes.items()
    ]


def throttle_groups(graph: Graph, *names: str) -> None:
    for name in names:
        graph.throttle_groups[name] = ThrottleGroup(ThrottleConfig())


def throttle(name: str, child: str, group: str) -> ThrottleOptions:
    return ThrottleOptions(driver="throttle", node_name=name, throttle_group=group, file=child)


# What changes


def test_options_that_are_not_given_again_have_their_defaults(image: Path) -> None:
    async def scenario(graph: Graph) -> None:
        node = await open_node(
            graph,
            file(
                image,
                read_only=True,
                discard=Discard.UNMAP,
                detect_zeroes=DetectZeroes.ON,
                cache=CacheOptions(direct=True, no_flush=True),
            ),
        )
        await reopen(graph, [file(image)])
        assert not node.is_read_only
        assert not node.config.can_unmap
        assert node.config.detect_zeroes is DetectZeroes.OFF
        assert (node.config.cache.is_direct, node.config.cache.is_no_flush) == (False, False)

    play(scenario)


def test_a_file_that_becomes_writable_is_written_and_locked(image: Path) -> None:
    async def scenario(graph: Graph) -> None:
        node = await open_node(graph, file(image, read_only=True))
        with pytest.raises(CommandError, match="Block node is read-only"):
            Device(graph, node, needed=WRITER)
        await reopen(graph, [file(image)])
        device = Device(graph, node, needed=WRITER, shared=SHARED & ~Permission.WRITE)
        await device.pwrite(512, memoryview(b"x" * 512))
        other = Graph()
        rival = await open_node(other, file(image))
        with pytest.raises(CommandError, match='Failed to get "write" lock'):
            Device(other, rival, needed=WRITER)
        await device.close()
        await other.drop(rival)
        await reopen(graph, [file(image, read_only=True)])
        assert node.is_read_only

    play(scenario)
    assert image.read_bytes()[512:1024] == b"x" * 512


def test_a_child_that_is_exchanged_gives_its_locks_back(image: Path) -> None:
    async def scenario(graph: Graph) -> None:
        await open_node(graph, file(image))
        await open_node(graph, null("n"))
        top = await open_node(graph, raw("r", "f"))
        device = Device(graph, top, needed=WRITER, shared=SHARED & ~Permission.WRITE)
        await reopen(graph, [raw("r", "n")])
        other = Graph()
        rival = Device(other, await open_node(other, file(image)), needed=WRITER)
        assert await refusal(graph, raw("r", "f")) == 'Failed to get shared "write" lock'
        assert top.edges["file"].node.name == "n"
        node = rival.node
        await rival.close()
        await other.drop(node)
        await reopen(graph, [raw("r", "f")])
        await device.close()

    play(scenario)


def test_a_direct_file_has_the_limits_of_its_device_and_no_page_cache(image: Path) -> None:
    async def scenario(graph: Graph) -> None:
        node = await open_node(graph, file(image))
        device = Device(graph, node, needed=WRITER, shared=SHARED)
        for number, is_direct in enumerate((True, False, True)):
            await reopen(graph, [file(image, cache=CacheOptions(direct=is_direct))])
            assert (node.limits.request_alignment > 1) is is_direct
            await device.pwrite(number * 100, memoryview(bytes([number + 1]) * 100))
        found = bytearray(300)
        await device.pread(0, memoryview(found))
        assert found == b"\1" * 100 + b"\2" * 100 + b"\3" * 100
        await device.close()

    play(scenario)


def test_an_inline_child_takes_over_what_its_parent_has_now(image: Path) -> None:
    async def scenario(graph: Graph) -> None:
        inline = file(image, None)
        top = await open_node(graph, raw("r", inline))
        child = top.edges["file"].node
        await reopen(graph, [raw("r", inline, read_only=True)])
        assert (top.is_read_only, child.is_read_only) == (True, True)
        await reopen(graph, [raw("r", child.name, cache=CacheOptions(no_flush=True))])
        assert (child.is_read_only, child.config.cache.is_no_flush) == (False, True)
        assert await refusal(graph, raw("r", file(image, "other"))) == (
            "Cannot change the option 'node-name'"
        )
        assert await refusal(graph, raw("r", file(image.with_name("b"), None))) == (
            "Cannot change the option 'filename'"
        )
        assert await refusal(graph, raw("r", null("x"))) == (
            "Option 'filename' cannot be reset to its default value"
        )

    play(scenario)


def test_an_inline_child_that_is_exchanged_is_closed(image: Path) -> None:
    async def scenario(graph: Graph) -> None:
        await open_node(graph, raw("r", file(image, None)))
        await open_node(graph, null("n"))
        await reopen(graph, [raw("r", "n")])
        assert set(graph.nodes) == {"r", "n"}
        refused = await refusal(graph, raw("r", file(image, None)))
        assert refused == "Cannot change the option 'file.driver'"

    play(scenario)


def test_a_window_moves_and_becomes_a_filter(image: Path) -> None:
    image.write_bytes(b"a" * 512 + b"b" * (SIZE - 512))

    async def scenario(graph: Graph) -> None:
        await open_node(graph, file(image))
        top = await open_node(graph, raw("r", "f", size=512))
        device = Device(graph, top)
        found = bytearray(512)
        await reopen(graph, [raw("r", "f", offset=512, size=1024)])
        await device.pread(0, memoryview(found))
        assert (bytes(found), top.size, top.edges["file"].role) == (b"b" * 512, 1024, Role.DATA)
        await reopen(graph, [raw("r", "f")])
        await device.pread(0, memoryview(found))
        assert (bytes(found), top.size, top.edges["file"].role) == (b"a" * 512, SIZE, Role.FILTERED)
        await device.close()

    play(scenario)


def test_a_filter_is_put_under_a_disk_and_taken_away_by_one_command_each(image: Path) -> None:
    async def scenario(graph: Graph) -> None:
        throttle_groups(graph, "slow", "fast")
        await open_node(graph, file(image))
        top = await open_node(graph, raw("r", "f"))
        limit = await open_node(graph, throttle("t", "f", "slow"))
        assert isinstance(limit, ThrottleNode)
        device = Device(graph, top, needed=WRITER, shared=SHARED)
        await reopen(graph, [raw("r", "t"), throttle("t", "f", "fast")])
        assert top.edges["file"].node is limit
        assert limit.group is graph.throttle_groups["fast"]
        assert not graph.throttle_groups["slow"].is_used
        await device.pwrite(0, memoryview(b"x" * 512))
        # The other way round it would have been a circle on the way.
        await reopen(graph, [raw("r", "f"), throttle("t", "r", "slow")])
        assert limit.edges["file"].node is top
        assert await refusal(graph, raw("r", "t")) == (
            "Making 't' a file child of 'r' would create a cycle"
        )
        refused = await refusal(graph, raw("r", "f", read_only=True), throttle("t", "f", "none"))
        assert refused == "Throttle group 'none' does not exist"
        await device.close()

    play(scenario)


def test_a_throttle_node_throttles_again_after_it_has_moved() -> None:
    async def scenario(graph: Graph) -> None:
        throttle_groups(graph, "a", "b")
        await open_node(graph, null("n"))
        limit = await open_node(graph, throttle("t", "n", "a"))
        assert isinstance(limit, ThrottleNode)
        device = Device(graph, limit)
        await reopen(graph, [throttle("t", "n", "b")])
        assert limit._turns._drains == 0
        await device.close()

    play(scenario)


def test_a_later_entry_completes_an_earlier_one_of_the_same_node(image: Path) -> None:
    async def scenario(graph: Graph) -> None:
        node = await open_node(graph, file(image))
        await reopen(graph, [file(image, read_only=True), file(image, discard=Discard.UNMAP)])
        assert (node.is_read_only, node.config.can_unmap) == (True, True)

    play(scenario)


def test_nothing_to_reopen_is_nothing_to_do() -> None:
    async def scenario(graph: Graph) -> None:
        await reopen(graph, [])

    play(scenario)


# What is refused


def test_what_identifies_a_node_must_not_change(image: Path) -> None:
    async def scenario(graph: Graph) -> None:
        await open_node(graph, file(image))
        await open_node(graph, null("n"))
        await open_node(graph, raw("r", "n"))
        sentences = [
            (file(image, None), "node-name not specified"),
            (file(image, "x"), "Failed to find node with node-name='x'"),
            (file(image.with_name("x")), "Cannot change the option 'filename'"),
            (null("n", 512), "Cannot change the option 'size'"),
            (
                NullOptions(driver="null-co", node_name="n"),
                "Option 'size' cannot be reset to its default value",
            ),
            (replace(null("n"), driver="null-aio"), "Cannot change the option 'driver'"),
            (raw("r", "x"), "Cannot find device='' nor node-name='x'"),
            (raw("r", "r"), "Making 'r' a file child of 'r' would create a cycle"),
            (raw("r", "n", size=1), "Specified size is not multiple of 512"),
            (
                raw("r", "n", offset=2 * SIZE),
                f"Offset ({2 * SIZE}) cannot be greater than size of the containing file ({SIZE})",
            ),
        ]
        for options, sentence in sentences:
            assert await refusal(graph, file(image, read_only=True), options) == sentence

    play(scenario)


def test_a_node_of_a_driver_without_options_cannot_be_reopened() -> None:
    async def scenario(graph: Graph) -> None:
        graph.add(MemoryNode(SIZE, name="m"))
        assert await refusal(graph, null("m")) == (
            f"Block format '{MemoryNode.driver}' used by node 'm' does not support reopening files"
        )

    play(scenario)


def test_users_keep_what_they_need(image: Path) -> None:
    async def scenario(graph: Graph) -> None:
        await open_node(graph, file(image))
        top = await open_node(graph, raw("r", "f"))
        await open_node(graph, null("ro", read_only=True))
        device = Device(graph, top, needed=WRITER, shared=SHARED)
        refused = await refusal(graph, file(image, read_only=True))
        assert refused == "Read-only block node 'f' cannot support read-write users"
        refused = await refusal(graph, file(image), raw("r", "f", read_only=True))
        assert refused == "Read-only block node 'r' cannot support read-write users"
        assert await refusal(graph, raw("r", "ro")) == "Block node is read-only"
        await device.close()

    play(scenario)


def test_the_size_stays_for_those_who_rely_on_it_but_not_for_devices() -> None:
    async def scenario(graph: Graph) -> None:
        await open_node(graph, null("n"))
        below = await open_node(graph, raw("below", "n"))
        window = await open_node(graph, raw("window", "below", size=SIZE))
        device = Device(graph, window)
        refused = await refusal(graph, raw("below", "n", size=512))
        assert refused == (
            "Permission conflict on node 'below': its size would change, and permissions 'resize'"
            " are unshared by node 'window' (uses node 'below' as 'file' child)."
        )
        job = PassiveRoot()
        edge = graph.attach(job, "root", window, Role.ROOT, shared=SHARED)
        refused = await refusal(graph, raw("below", "n", size=512), raw("window", "below"))
        assert "permissions 'resize' are unshared by job 'j'" in refused
        graph.detach(edge)
        await reopen(graph, [raw("below", "n", size=512), raw("window", "below")])
        assert (below.size, window.size, device.size) == (512, 512, 512)
        await device.close()

    play(scenario)


# All or nothing


@pytest.mark.parametrize("obstacle", ["missing", "a directory", "another file"])
def test_a_file_that_cannot_be_opened_again_leaves_all_as_before(
    obstacle: str, image: Path
) -> None:
    other = image.with_name("other.img")
    other.write_bytes(bytes(SIZE))

    def put_in_place(obstacle: str) -> str:
        image.rename(image.with_name("away"))
        if obstacle == "a directory":
            image.mkdir()
            return "Is a directory"
        if obstacle == "another file":
            image.write_bytes(b"y" * SIZE)
            return "it is another file by now"
        return "No such file or directory"

    async def scenario(graph: Graph) -> None:
        await open_node(graph, file(other, "o"))
        node = await open_node(graph, file(image, read_only=True))
        device = Device(graph, node)
        reason = put_in_place(obstacle)
        refused = await refusal(graph, file(other, "o", read_only=True), file(image))
        assert refused == f"Could not open '{image}': {reason}"
        found = bytearray(b"?" * 512)
        await device.pread(0, memoryview(found))
        assert found == bytes(512)
        # What does not need the file to be opened again does not need its name either.
        await reopen(graph, [file(image, read_only=True, detect_zeroes=DetectZeroes.ON)])
        await device.close()

    play(scenario)


def test_lost_writes_are_told_before_anything_changes() -> None:
    async def scenario(graph: Graph) -> None:
        disk = MemoryNode(SIZE, name="m")
        disk.is_owned_by_user = True
        graph.add(disk)
        await open_node(graph, null("n"))
        await open_node(graph, raw("r", "m"))
        disk.fail(Op.FLUSH, errno=5)
        assert await refusal(graph, raw("r", "n")) == "Error flushing drive: Input/output error"

    play(scenario)


def test_nobody_waits_for_what_was_given_up(image: Path) -> None:
    async def scenario(graph: Graph) -> None:
        disk = MemoryNode(SIZE, name="m")
        disk.is_owned_by_user = True
        graph.add(disk)
        top = await open_node(graph, raw("r", "m"))
        device = Device(graph, top, needed=WRITER, shared=SHARED)
        loop = asyncio.get_running_loop()
        async with disk.hold(Op.WRITE) as gate:
            write = loop.create_task(device.pwrite(0, memoryview(b"x" * 512)))
            await gate.reached()
            reopening = loop.create_task(reopen(graph, [raw("r", "m", read_only=True)]))
            await asyncio.sleep(0)
            late = loop.create_task(device.pwrite(512, memoryview(b"y" * 512)))
            await asyncio.sleep(0)
            assert not late.done()
            reopening.cancel()
            await asyncio.wait([reopening])
        await asyncio.gather(write, late)
        assert not top.is_read_only
        assert bytes(disk.content[:1024]) == b"x" * 512 + b"y" * 512
        await device.close()

    play(scenario)


def test_a_child_that_is_deleted_meanwhile_is_not_used() -> None:
    async def scenario(graph: Graph) -> None:
        disk = MemoryNode(SIZE, name="m")
        disk.is_owned_by_user = True
        graph.add(disk)
        await open_node(graph, raw("r", "m"))
        new = await open_node(graph, null("n"))
        loop = asyncio.get_running_loop()
        async with disk.hold(Op.FLUSH) as gate:
            reopening = loop.create_task(reopen(graph, [raw("r", "n")]))
            await gate.reached()
            await graph.drop(new)
        with pytest.raises(CommandError, match="Cannot find device='' nor node-name='n'"):
            await reopening

    play(scenario)


# Under clients' feet


async def _write_and_read(device: Device, part: int, length: int, model: bytearray) -> None:
    """A client with a part of the disk of its own, which always has what it wrote last."""
    rng = random.Random(part)
    begin = part * length
    for number in range(60):
        offset = rng.randrange(length - 1)
        data = bytes([number + 1]) * rng.randrange(1, min(9000, length - offset) + 1)
        if number % 5 == 4:
            await device.pwrite_zeroes(begin + offset, len(data))
            data = bytes(len(data))
        else:
            await device.pwrite(begin + offset, memoryview(data))
        model[begin + offset : begin + offset + len(data)] = data
        if number % 7 == 6:
            await device.flush()
        found = bytearray(length)
        await device.pread(begin, memoryview(found))
        assert found == model[begin : begin + length]


def test_no_request_is_lost_or_fails_while_a_disk_is_reopened_over_and_over(image: Path) -> None:
    parts = 4
    model = bytearray(SIZE)

    async def scenario(graph: Graph) -> None:
        throttle_groups(graph, "a", "b")
        await open_node(graph, file(image))
        await open_node(graph, throttle("t", "f", "a"))
        top = await open_node(graph, raw("r", "f"))
        device = Device(graph, top, needed=WRITER, shared=SHARED)
        rng = random.Random(1)

        def some_options() -> list[BlockdevOptions]:
            is_throttled = rng.random() < 0.5
            return [
                file(
                    image,
                    cache=CacheOptions(direct=rng.random() < 0.5, no_flush=rng.random() < 0.5),
                    discard=rng.choice(list(Discard)),
                    auto_read_only=rng.random() < 0.5,
                ),
                throttle("t", "f", rng.choice("ab")),
                raw(
                    "r",
                    "t" if is_throttled else "f",
                    size=SIZE if rng.random() < 0.5 else None,
                    detect_zeroes=rng.choice([DetectZeroes.ON, DetectZeroes.OFF]),
                ),
            ]

        clients = [
            asyncio.create_task(_write_and_read(device, part, SIZE // parts, model))
            for part in range(parts)
        ]
        times = 0
        while not all(client.done() for client in clients):
            if rng.random() < 0.3:
                await refusal_in_use(graph, file(image, read_only=True))
            await reopen(graph, some_options())
            times += 1
        await asyncio.gather(*clients)
        assert times > 5
        await device.close()

    async def refusal_in_use(graph: Graph, options: BlockdevOptions) -> None:
        with pytest.raises(CommandError, match="cannot support read-write users"):
            await reopen(graph, [options])

    play(scenario)
    assert image.read_bytes() == model
