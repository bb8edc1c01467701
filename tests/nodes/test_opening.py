# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Opening nodes: what is inherited, what is refused in which words, and that nothing stays."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Self, cast

import pytest

from nbdjobs.errors import CommandError
from nbdjobs.nodes.blkdebug import BlkdebugOptions, PermissionName
from nbdjobs.nodes.config import CacheMode, DetectZeroes, NodeConfig
from nbdjobs.nodes.driver import AnyDriver
from nbdjobs.nodes.drivers import DRIVERS
from nbdjobs.nodes.file import AioBackend, FileOptions
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.null import NullOptions
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import BlockdevOptions, CacheOptions, Discard
from nbdjobs.nodes.raw import RawNode, RawOptions

NULL = NullOptions(driver="null-co", size=1024 * 1024)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1024 * 1024))
    return path


def refusal(options: BlockdevOptions, *, existing: BlockdevOptions | None = None) -> str:
    """Open, expect a refusal, and see that nothing is left."""

    async def run() -> str:
        graph = Graph()
        if existing is not None:
            await open_node(graph, existing)
        before = dict(graph.nodes)
        with pytest.raises(CommandError) as caught:
            await open_node(graph, options)
        assert graph.nodes == before
        assert not any(node.parents for node in graph.nodes.values())
        return caught.value.description

    return asyncio.run(run())


def file(path: object, name: str | None = "f") -> FileOptions:
    return FileOptions(driver="file", node_name=name, filename=str(path))


def raw(child: str | BlockdevOptions, name: str | None = "r") -> RawOptions:
    return RawOptions(driver="raw", node_name=name, file=child)


def test_a_root_needs_a_name() -> None:
    assert refusal(NULL) == "'node-name' must be specified for the root node"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("1f", "Invalid node-name: '1f'"),
        ("", "Invalid node-name: ''"),
        ("f" * 32, "Node name too long"),
        ("taken", "Duplicate nodes with node-name='taken'"),
    ],
)
def test_names_are_checked(name: str, words: str) -> None:
    existing = NullOptions(driver="null-co", node_name="taken")
    assert refusal(NullOptions(driver="null-co", node_name=name), existing=existing) == words


class SlowToOpen(RawNode):
    """A driver that has to wait for something while it opens."""

    @classmethod
    async def open(
        cls, name: str, config: NodeConfig, options: RawOptions, children: Mapping[str, Node]
    ) -> Self:
        await asyncio.sleep(0)
        return await super().open(name, config, options, children)


def test_a_child_that_is_deleted_meanwhile_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cast(dict[str, AnyDriver], DRIVERS), "raw", SlowToOpen)

    async def run() -> None:
        graph = Graph()
        child = await open_node(graph, replace(NULL, node_name="n"))
        opening = asyncio.create_task(open_node(graph, raw("n")))
        await asyncio.sleep(0)
        await graph.drop(child)
        with pytest.raises(CommandError, match="Cannot find device='' nor node-name='n'"):
            await opening
        assert not graph.nodes

    asyncio.run(run())


def test_a_child_cannot_have_its_parents_name(image: Path) -> None:
    assert refusal(raw(file(image, "r"), "r")) == "Duplicate nodes with node-name='r'"


@pytest.mark.parametrize("name", ["x", ""])
def test_an_unknown_child_is_named(name: str) -> None:
    assert refusal(raw(name)) == f"Cannot find device='{name}' nor node-name='{name}'"


def test_a_missing_file_and_a_directory_are_told_apart(tmp_path: Path) -> None:
    missing = tmp_path / "nope"
    assert refusal(raw(file(missing, None))) == (
        f"Could not open '{missing}': No such file or directory"
    )
    assert refusal(file(tmp_path)) == f"Could not open '{tmp_path}': Is a directory"


def test_only_regular_files_are_files(tmp_path: Path) -> None:
    read_only = FileOptions(driver="file", node_name="f", filename=str(tmp_path), read_only=True)
    words = f"'file' driver requires '{tmp_path}' to be a regular file"
    assert refusal(read_only) == words
    assert refusal(file("/dev/null")) == "'file' driver requires '/dev/null' to be a regular file"


def test_only_devices_are_host_devices(image: Path) -> None:
    options = FileOptions(driver="host_device", node_name="d", filename=str(image))
    words = f"'host_device' driver requires '{image}' to be either a character or block device"
    assert refusal(options) == words


def test_a_file_needs_a_name() -> None:
    assert refusal(file("")) == "The 'file' block driver requires a file name"


def test_a_name_with_a_zero_byte_is_refused() -> None:
    assert "Could not open" in refusal(file("a\0b"))


def test_native_aio_needs_direct_access(image: Path) -> None:
    options = FileOptions(driver="file", node_name="f", filename=str(image), aio=AioBackend.NATIVE)
    assert refusal(options) == (
        "aio=native was specified, but it requires cache.direct=on, which was not specified."
    )


def test_there_are_no_persistent_reservation_managers(image: Path) -> None:
    options = FileOptions(driver="file", node_name="f", filename=str(image), pr_manager="x")
    assert refusal(options) == "No persistent reservation manager with id 'x'"


def test_unmapping_zeroes_needs_discard(image: Path) -> None:
    options = FileOptions(
        driver="file", node_name="f", filename=str(image), detect_zeroes=DetectZeroes.UNMAP
    )
    assert refusal(options) == (
        "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
    )


def test_force_share_needs_read_only(image: Path) -> None:
    options = FileOptions(driver="file", node_name="f", filename=str(image), force_share=True)
    assert refusal(options) == "force-share=on can only be used with read-only images"


@pytest.mark.parametrize(
    ("offset", "size", "words"),
    [
        (512, 513, "Specified size is not multiple of 512"),
        (
            512,
            1048576,
            "The sum of offset (512) and size (1048576) has to be smaller or equal to the "
            " actual size of the containing file (1048576)",
        ),
        (
            2097152,
            None,
            "Offset (2097152) cannot be greater than size of the containing file (1048576)",
        ),
    ],
)
def test_a_window_must_lie_inside_its_child(offset: int, size: int | None, words: str) -> None:
    options = RawOptions(driver="raw", node_name="r", file=NULL, offset=offset, size=size)
    assert refusal(options) == words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (NullOptions(driver="null-co", node_name="n", latency_ns=-1), "latency-ns is invalid"),
        (
            NullOptions(driver="null-co", node_name="n", size=-1),
            "Parameter 'size' expects a non-negative number below 2^64",
        ),
    ],
)
def test_null_disks_need_sensible_numbers(options: NullOptions, words: str) -> None:
    assert refusal(options) == words


def test_a_failing_parent_closes_its_inline_child_but_not_one_by_name(image: Path) -> None:
    window = RawOptions(driver="raw", node_name="r", offset=1 << 40, file=file(image, "inner"))
    assert refusal(window).startswith("Offset (1099511627776)")
    by_name = RawOptions(driver="raw", node_name="r", offset=1 << 40, file="f")
    assert refusal(by_name, existing=file(image)).startswith("Offset (1099511627776)")


def test_a_conflict_of_permissions_undoes_the_opening() -> None:
    async def run() -> None:
        graph = Graph()
        await open_node(graph, NullOptions(driver="null-co", node_name="n"))
        selfish = BlkdebugOptions(
            driver="blkdebug",
            node_name="a",
            image="n",
            take_child_perms=(PermissionName.WRITE,),
            unshare_child_perms=(PermissionName.WRITE,),
        )
        await open_node(graph, selfish)
        again = BlkdebugOptions(
            driver="blkdebug",
            node_name="b",
            image=raw("n", "between"),
            take_child_perms=(PermissionName.WRITE,),
        )
        with pytest.raises(CommandError, match="Permission conflict on node 'n'"):
            await open_node(graph, again)
        assert set(graph.nodes) == {"n", "a"}
        assert len(graph.nodes["n"].parents) == 1

    asyncio.run(run())


def test_an_inline_child_takes_over_what_it_does_not_say() -> None:
    async def run() -> Node:
        graph = Graph()
        node = await open_node(
            graph,
            RawOptions(
                driver="raw",
                node_name="r",
                read_only=True,
                force_share=True,
                auto_read_only=True,
                cache=CacheOptions(direct=True, no_flush=True),
                file=NULL,
            ),
        )
        return node.edges["file"].node

    child = asyncio.run(run())
    assert child.name.startswith("#block")
    assert not child.is_owned_by_user
    assert child.config.is_read_only
    assert child.config.is_auto_read_only
    assert child.config.is_share_forced
    assert child.config.cache == CacheMode(is_direct=True, is_no_flush=True)
    assert child.config.can_unmap


def test_what_a_child_says_itself_counts() -> None:
    async def run() -> Node:
        child = NullOptions(
            driver="null-co",
            read_only=False,
            cache=CacheOptions(direct=False),
            discard=Discard.IGNORE,
        )
        options = RawOptions(
            driver="raw",
            node_name="r",
            read_only=True,
            cache=CacheOptions(direct=True),
            file=child,
        )
        return (await open_node(Graph(), options)).edges["file"].node

    config = asyncio.run(run()).config
    assert not config.is_read_only
    assert not config.cache.is_direct
    assert not config.can_unmap


def test_dropping_the_parent_drops_inline_children_only() -> None:
    async def run() -> set[str]:
        graph = Graph()
        await open_node(graph, NullOptions(driver="null-co", node_name="kept"))
        over_named = await open_node(graph, raw("kept", "a"))
        over_inline = await open_node(graph, raw(NULL, "b"))
        await graph.drop(over_named)
        await graph.drop(over_inline)
        return set(graph.nodes)

    assert asyncio.run(run()) == {"kept"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (raw(NULL), 'json:{"driver": "raw", "file": {"driver": "null-co", "size": 1048576}}'),
        (
            BlkdebugOptions(driver="blkdebug", node_name="b", image=NullOptions(driver="null-co")),
            "blkdebug::null-co://",
        ),
        (raw(NullOptions(driver="null-aio", latency_ns=5)), "null-aio://"),
        (
            RawOptions(driver="raw", node_name="r", offset=512, file=NullOptions(driver="null-co")),
            'json:{"driver": "raw", "file": {"driver": "null-co"}, "offset": 512}',
        ),
        (
            BlkdebugOptions(driver="blkdebug", node_name="b", align=4096, image=NULL),
            'json:{"driver": "blkdebug", "image": {"driver": "null-co", "size": 1048576},'
            ' "align": 4096}',
        ),
    ],
)
def test_what_no_path_names_is_named_by_its_options(
    options: BlockdevOptions, expected: str
) -> None:
    assert asyncio.run(open_node(Graph(), options)).filename == expected


def test_a_raw_node_that_shows_all_of_a_file_has_its_name(image: Path) -> None:
    async def scenario() -> None:
        graph = Graph()
        node = await open_node(graph, raw(file(image, None)))
        assert node.filename == str(image)
        await graph.drop(node)

    asyncio.run(scenario())
