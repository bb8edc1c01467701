# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Backing files named in the header: how they are found, and chains that cannot be."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from nbdjobs.errors import CommandError
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.opening import MAX_CHAIN, open_node
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.nodes.qcow2.chain import backing_options, combine
from nbdjobs.nodes.qcow2.create import CreateOptions, empty_image
from nbdjobs.qapi.types import NULL
from nbdjobs.qapi.visitor import to_qapi, visit
from tests.nodes.qcow2.rig import content_of, image_of, opened

DISK = 65536
BASE = bytes(range(256)) * (DISK // 256)


def image(path: Path, backing: str | None = None, driver: str | None = None) -> Path:
    options = CreateOptions(size=DISK, backing_file=backing, backing_format=driver)
    path.write_bytes(empty_image(options))
    return path


def raw(path: Path) -> Path:
    path.write_bytes(BASE)
    return path


def content(path: Path, **options: Any) -> bytes:
    async def run() -> bytes:
        async with opened(path, **options) as device:
            return await content_of(device)

    return asyncio.run(run())


@pytest.mark.parametrize("driver", ["raw", "file", None])
def test_a_relative_name_is_seen_from_the_folder_of_the_image(
    driver: str | None, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    raw(tmp_path / "base.raw")
    top = image(tmp_path / "folder" / "top.qcow2", "../base.raw", driver)
    assert content(top) == BASE


def test_the_format_is_found_out_where_the_image_does_not_say_it(tmp_path: Path) -> None:
    raw(tmp_path / "base.raw")
    image(tmp_path / "middle", "base.raw", "raw")
    assert content(image(tmp_path / "top", "middle")) == BASE


def test_names_may_be_absolute_or_have_a_protocol(tmp_path: Path) -> None:
    base = raw(tmp_path / "base.raw")
    assert content(image(tmp_path / "a", str(base), "raw")) == BASE
    assert content(image(tmp_path / "b", f"file:{base}", "raw")) == BASE


@pytest.mark.parametrize("is_flat", [False, True])
def test_names_may_be_options(is_flat: bool, tmp_path: Path) -> None:
    base = raw(tmp_path / "base.raw")
    nested = {"driver": "raw", "file": {"driver": "file", "filename": str(base)}}
    flat = {"driver": "raw", "file.driver": "file", "file.filename": str(base)}
    name = "json:" + json.dumps(flat if is_flat else nested)
    assert content(image(tmp_path / "top", name)) == BASE


def test_the_option_wins_over_the_image(tmp_path: Path) -> None:
    other = raw(tmp_path / "other")
    top = image(tmp_path / "top", "missing")
    assert content(top, backing=NULL) == bytes(DISK)
    wanted = {"driver": "raw", "file": {"driver": "file", "filename": str(other)}}
    assert content(top, backing=visit(BlockdevOptions, wanted)) == BASE


def test_what_is_below_is_opened_for_reads_only(tmp_path: Path) -> None:
    raw(tmp_path / "base")
    top = image(tmp_path / "top", "base", "raw")

    async def run() -> None:
        async with opened(top) as device:
            below = image_of(device).edges["backing"].node
            assert below.is_read_only
            assert below.edges["file"].node.is_read_only

    asyncio.run(run())


def refused(path: Path) -> str:
    async def run() -> str:
        graph = Graph()
        options = {
            "driver": "qcow2",
            "node-name": "disk",
            "file": {"driver": "file", "filename": str(path)},
        }
        with pytest.raises(CommandError) as caught:
            await open_node(graph, visit(BlockdevOptions, options))
        assert not graph.nodes
        return caught.value.description

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "driver", "message"),
    [
        ("nowhere", "raw", "Could not open '{folder}/nowhere': No such file or directory"),
        ("base", "vmdk", "Unknown driver 'vmdk'"),
        ("gopher://x/y", None, "Unknown protocol 'gopher'"),
        ("json:{", None, "JSON"),
        ('json:{"driver":"nothing"}', None, "Unknown driver 'nothing'"),
        ('json:{"driver":"raw","file.a":"x","file":"y"}', None, "Cannot mix"),
        ('json:{"driver":"raw"}', None, "Parameter 'file' is missing"),
    ],
)
def test_names_that_lead_nowhere_are_told(
    name: str, driver: str | None, message: str, tmp_path: Path
) -> None:
    raw(tmp_path / "base")
    told = refused(image(tmp_path / "top", name, driver))
    assert told.startswith("Could not open backing file: ")
    assert message.format(folder=tmp_path) in told


def test_a_chain_that_leads_back_is_refused(tmp_path: Path) -> None:
    image(tmp_path / "a", "b", "qcow2")
    image(tmp_path / "b", "c", "qcow2")
    os.symlink("a", tmp_path / "c")
    assert "is in its own chain of backing files" in refused(tmp_path / "a")


def test_an_endless_chain_is_refused(tmp_path: Path) -> None:
    for number in range(MAX_CHAIN + 2):
        image(tmp_path / f"{number}", f"{number + 1}", "qcow2")
    assert f"more than {MAX_CHAIN} images" in refused(tmp_path / "0")


def test_a_relative_name_needs_a_folder() -> None:
    assert combine("a.qcow2", "b") == "b"
    assert combine("/x/a.qcow2", "b") == "/x/b"
    assert combine("/x/a.qcow2", "/b") == "/b"
    assert combine("/x/a.qcow2", "nbd:b") == "nbd:b"
    assert combine("/x/a.qcow2", "./nbd:b") == "/x/./nbd:b"
    with pytest.raises(CommandError, match="relative"):
        combine('json:{"driver": "null-co"}', "b")


def test_devices_are_opened_as_such() -> None:
    options = asyncio.run(backing_options("/dev/null", "raw"))
    assert to_qapi(options)["file"]["driver"] == "host_device"


def test_a_node_that_does_not_come_up_leaves_nothing_behind(tmp_path: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    path = tmp_path / "junk"
    path.write_bytes(b"QFI\xfb" + bytes(1000))
    assert "Unsupported qcow2 version 0" in refused(path)
    assert len(os.listdir("/proc/self/fd")) == descriptors
