# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Chains: what is below what, where content comes from, names, and snapshots by overlays."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.backing_chain import (
    allocated_above,
    backing_of,
    chain_from,
    edges_between,
    find_image,
    find_overlay,
    freeze,
    last_image,
    name_for_header,
    set_backing,
    thaw,
)
from nbdjobs.nodes.copy_on_read import CopyOnReadOptions
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.overlays import snapshot_to_file, take_snapshot
from nbdjobs.nodes.qcow2.create import CreateOptions, empty_image
from tests.jobs.chains import CLUSTER, GUEST, Chain, chain

SIZES = dict.fromkeys(("base", "mid", "top"), 8 * CLUSTER)


async def opened(directory: Path, sizes: dict[str, int] | None = None) -> Chain:
    made = Chain(directory, sizes or SIZES)
    made.make_images()
    await made.open()
    return made


async def put(made: Chain, name: str, offset: int, data: bytes) -> None:
    device = Device(made.graph, made.node(name), needed=GUEST)
    await device.pwrite(offset, memoryview(data))
    await device.close()


def test_steps_down_a_chain(tmp_path: Path) -> None:
    async def main() -> None:
        made = await opened(tmp_path)
        await made.guest.close()
        options = CopyOnReadOptions(driver="copy-on-read", node_name="flt", file="top")
        top, mid, base = (made.node(name) for name in ("top", "mid", "base"))
        flt = await open_node(made.graph, options)
        made.guest = Device(made.graph, flt)
        assert list(chain_from(flt)) == [flt, top, mid, base]
        assert find_overlay(flt, base) is mid
        assert find_overlay(flt, None) is base
        assert find_overlay(mid, top) is None
        assert last_image(flt) is base
        assert find_image(flt, "nothing") is None
        assert find_image(flt, str(made.path("base"))) is base
        assert find_image(flt, f"file:{made.path('mid')}") is mid
        assert find_image(flt, str(made.path("top"))) is None
        assert [edge.node for edge in edges_between(flt, mid)] == [top, mid]
        await made.close()

    asyncio.run(main())


def test_where_content_comes_from(tmp_path: Path) -> None:
    async def main() -> None:
        made = await opened(tmp_path, {"base": 8 * CLUSTER, "mid": 4 * CLUSTER, "top": 8 * CLUSTER})
        await made.guest.close()
        await put(made, "base", 0, b"b" * 8 * CLUSTER)
        await put(made, "mid", 2 * CLUSTER, b"m" * CLUSTER)
        await put(made, "top", CLUSTER, b"t" * CLUSTER)
        made.guest = Device(made.graph, made.node("top"))
        top, mid, base = (made.node(name) for name in ("top", "mid", "base"))
        runs, position = [], 0
        while position < top.size:
            answer, length = await allocated_above(top, base, position, top.size - position)
            runs.append((answer, length // CLUSTER))
            position += length
        # The end of `mid` hides what the base has there.
        assert runs == [(False, 1), (True, 1), (True, 1), (False, 1), (True, 4)]
        assert await allocated_above(top, mid, 2 * CLUSTER, CLUSTER) == (False, CLUSTER)
        assert await allocated_above(top, None, 0, CLUSTER) == (True, CLUSTER)
        assert await allocated_above(None, None, 0, CLUSTER) == (False, CLUSTER)
        await made.close()

    asyncio.run(main())


def test_frozen_edges_stay(tmp_path: Path) -> None:
    async def main() -> None:
        made = await opened(tmp_path)
        edges = edges_between(made.node("top"), made.node("mid"))
        freeze(edges)
        expected = "Cannot change frozen 'backing' link from 'top' to 'mid'"
        with pytest.raises(CommandError, match=expected):
            freeze(edges)
        with pytest.raises(CommandError, match=expected):
            set_backing(made.graph, made.node("top"), made.node("base"))
        thaw(edges)
        assert set_backing(made.graph, made.node("top"), made.node("base")) is made.node("mid")
        assert backing_of(made.node("top")) is made.node("base")
        assert set_backing(made.graph, made.node("top"), made.node("base")) is None
        with pytest.raises(CommandError, match="would create a cycle"):
            set_backing(made.graph, made.node("base"), made.node("top"))
        assert set_backing(made.graph, made.node("top"), None) is made.node("base")
        await made.close()

    asyncio.run(main())


def test_a_name_says_what_opening_it_would_show(tmp_path: Path) -> None:
    async def main() -> None:
        made = await opened(tmp_path)
        assert name_for_header(made.node("top")) == str(made.path("top"))
        set_backing(made.graph, made.node("top"), made.node("base"))
        name = name_for_header(made.node("top"))
        options = json.loads(name.removeprefix("json:"))
        assert options["backing"]["file"]["filename"] == str(made.path("base"))
        await made.node("top").change_backing_file(str(made.path("base")), "qcow2")
        assert name_for_header(made.node("top")) == str(made.path("top"))
        await made.close()

    asyncio.run(main())


def test_names_of_backing_files_are_written_and_other_parts_of_headers_stay(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        made = await opened(tmp_path)
        top = made.node("top")
        before = top.header  # type: ignore[attr-defined]  # a qcow2 node
        await top.change_backing_file("x" * 1000, None)
        with pytest.raises(NodeError):
            await top.change_backing_file("x" * 1024, None)
        after = top.header  # type: ignore[attr-defined]
        assert after.backing_file == b"x" * 1000
        assert after.backing_format is None
        await top.change_backing_file("mid.qcow2", "qcow2")
        after = top.header  # type: ignore[attr-defined]
        assert set(after.extensions) == set(before.extensions)
        with pytest.raises(NodeError):
            await top.edges["file"].node.change_backing_file(None, None)
        await made.close()
        assert made.backing_chain("top") in ([], ["top", "mid", "base"])
        made.check_images("top")

    asyncio.run(main())


def test_a_snapshot_holds_what_clients_had_written(tmp_path: Path) -> None:
    async def main() -> None:
        async with chain(tmp_path) as made:
            path = tmp_path / "new.qcow2"
            await snapshot_to_file(made.graph, made.node("top"), str(path), name="new")
            assert made.guest.node is made.node("new")
            assert backing_of(made.node("new")) is made.node("top")
            assert made.node("top").is_read_only
            before = made.path("top").read_bytes()
            await made.guest.pwrite(5, memoryview(b"after"))
            made.model[5:10] = b"after"
            await made.check_seen()
            assert made.path("top").read_bytes() == before
        assert made.backing_chain("new") in ([], ["new", "top", "mid", "base"])
        made.check_images("new")

    asyncio.run(main())


def test_a_snapshot_that_cannot_be_taken_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with chain(tmp_path) as made:
            path = tmp_path / "new.qcow2"
            with pytest.raises(CommandError, match="node is used as backing hd of 'top'"):
                await snapshot_to_file(made.graph, made.node("mid"), str(path))
            with pytest.raises(CommandError, match="Invalid node-name"):
                await snapshot_to_file(made.graph, made.node("top"), str(path), name="1")
            assert not path.exists()
            path.write_bytes(empty_image(CreateOptions(size=made.sizes["top"])))
            file = {"driver": "file", "filename": str(path)}
            overlay = await made.add(driver="qcow2", **{"node-name": "new"}, file=file)
            user = Device(made.graph, overlay)
            with pytest.raises(CommandError, match="The overlay is already in use"):
                await take_snapshot(made.graph, made.node("top"), overlay)
            await user.close()
            await take_snapshot(made.graph, made.node("top"), overlay)
            assert made.guest.node is overlay
            await made.check_seen()

    asyncio.run(main())


def test_what_was_read_is_kept(tmp_path: Path) -> None:
    async def main() -> None:
        made = await opened(tmp_path)
        await made.guest.close()
        await put(made, "base", 0, b"b" * 2 * CLUSTER)
        await put(made, "mid", 3 * CLUSTER, b"m" * CLUSTER)
        options = CopyOnReadOptions(
            driver="copy-on-read", node_name="flt", file="top", bottom="mid"
        )
        flt = await open_node(made.graph, options)
        made.guest = Device(made.graph, flt, needed=GUEST)
        made.model[:] = b"b" * 2 * CLUSTER + bytes(CLUSTER) + b"m" * CLUSTER + bytes(4 * CLUSTER)
        await made.check_seen()
        await made.check_seen()
        top = made.node("top")
        assert await top.allocation(0, 8 * CLUSTER) == (False, 3 * CLUSTER)
        assert await top.allocation(3 * CLUSTER, 5 * CLUSTER) == (True, CLUSTER)
        with pytest.raises(CommandError, match="Permission conflict on node 'top'"):
            Device(made.graph, top, needed=GUEST)
        await made.close()
        made.check_images("top")

    asyncio.run(main())
