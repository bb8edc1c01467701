# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Commands about sizes, thresholds and the graph: answered as by the real program."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import pytest

from tests.interop.oracle import Oracle
from tests.interop.same_answers import Ask, ours, theirs

GRAPH: Final[Ask] = ("x-debug-query-block-graph", {})


def add(driver: str, name: str, **options: object) -> Ask:
    named = {key.replace("_", "-"): value for key, value in options.items()}
    return "blockdev-add", {"driver": driver, "node-name": name, **named}


def file(name: str, filename: str, **options: object) -> Ask:
    return add("file", name, filename=f"@/{filename}", **options)


def resize(node: str | None, size: int, device: str | None = None) -> Ask:
    named = {"node-name": node, "device": device, "size": size}
    return "block_resize", {key: value for key, value in named.items() if value is not None}


def threshold(node: str, value: object) -> Ask:
    return "block-set-write-threshold", {"node-name": node, "write-threshold": value}


def server() -> Ask:
    return "nbd-server-start", {"addr": {"type": "unix", "data": {"path": "@/nbd.sock"}}}


def export(node: str, name: str, **options: object) -> Ask:
    return "block-export-add", {"type": "nbd", "id": name, "node-name": node, **options}


def backup(device: str, target: str, **options: Any) -> Ask:
    return "blockdev-backup", {
        "job-id": "j",
        "device": device,
        "target": target,
        "sync": "none",
        **options,
    }


SESSIONS: Final[dict[str, list[Ask]]] = {
    "sizes": [
        file("f", "disk.img"),
        add("null-co", "n"),
        add("null-co", "ro", read_only=True),
        resize("f", 2 << 20),
        resize("f", 1 << 20),
        resize("f", 1000),
        resize("f", -1),
        resize("f", 1 << 62),
        resize("f", (1 << 63) - 1),
        resize("ro", (1 << 63) - 1),
        resize("ro", 512),
        resize("n", 512),
        resize("nothing", 512),
        resize(None, 512),
        resize("", 512),
        resize(None, 512, "f"),
        resize("f", 512, "f"),
        resize("f", 512, ""),
        ("block_resize", {"node-name": "f"}),
        ("block_resize", {"node-name": "f", "size": "1M"}),
        resize("f", 1 << 20),
        add("raw", "plain", file="f"),
        resize("plain", 8192),
        ("blockdev-del", {"node-name": "plain"}),
        add("raw", "window", file="f", offset=512),
        resize("window", 8192),
        resize("window", (1 << 63) - (1 << 30)),
        resize("f", 512),
        add("raw", "fixed", file="f", offset=512, size=1024),
        resize("fixed", 8192),
        ("blockdev-del", {"node-name": "window"}),
        resize("fixed", 8192),
        ("blockdev-del", {"node-name": "fixed"}),
        add("blkdebug", "debug", image="f"),
        resize("debug", 16384),
        ("object-add", {"qom-type": "throttle-group", "id": "tg"}),
        add("throttle", "slow", file="f", throttle_group="tg"),
        resize("slow", 32768),
        GRAPH,
    ],
    "sizes of what is exported": [
        file("f", "disk.img"),
        add("raw", "top", file="f"),
        server(),
        export("top", "e"),
        resize("top", 512),
        resize("f", 512),
        GRAPH,
    ],
    "sizes during a backup": [
        file("f", "disk.img"),
        file("t", "target.img"),
        add("raw", "top", file="f"),
        backup("top", "t"),
        resize("t", 512),
        resize("t", 512, "t"),
        resize("top", 512),
        resize("f", 512),
    ],
    "sizes of what is opened for reading at first": [
        file("f", "disk.img", auto_read_only=True),
        resize("f", 512),
        file("r", "target.img", read_only=True),
        resize("r", 512),
    ],
    "thresholds": [
        file("f", "disk.img"),
        threshold("f", 4096),
        ("query-named-block-nodes", {"flat": True}),
        threshold("f", -1),
        ("query-named-block-nodes", {"flat": True}),
        threshold("f", 0),
        threshold("f", "1"),
        threshold("nothing", 1),
        ("block-set-write-threshold", {"node-name": "f"}),
    ],
    "the graph": [
        GRAPH,
        file("f", "disk.img"),
        file("t", "target.img"),
        add("raw", "top", file="f"),
        add("raw", "inline", file={"driver": "null-co"}),
        server(),
        export("top", "e", writable=True),
        export("inline", "i"),
        GRAPH,
        backup("top", "t"),
        GRAPH,
        file("t2", "target.img", locking="off", read_only=True),
        add("null-co", "n", size=1 << 20),
        backup("t2", "n", **{"job-id": "j2"}),
        GRAPH,
    ],
}


def folder(path: Path) -> Path:
    path.mkdir()
    for name in ("disk.img", "target.img"):
        (path / name).touch()
        os.truncate(path / name, 1 << 20)
    return path


@pytest.mark.parametrize("name", SESSIONS)
def test_answers(name: str, tmp_path: Path) -> None:
    session = SESSIONS[name]
    with Oracle(tmp_path, capabilities=[]) as oracle:
        expected = theirs(session, folder(tmp_path / "theirs"), oracle)
    found = ours(session, folder(tmp_path / "ours"))
    for ask, mine, other in zip(session, found, expected, strict=True):
        assert mine == other, ask


def test_a_resized_file_is_as_long_as_said(tmp_path: Path) -> None:
    session = [file("f", "disk.img"), resize("f", 1000), resize("f", 5000)]
    with Oracle(tmp_path, capabilities=[]) as oracle:
        theirs(session, folder(tmp_path / "theirs"), oracle)
    ours(session, folder(tmp_path / "ours"))
    sizes = [(tmp_path / who / "disk.img").stat().st_size for who in ("ours", "theirs")]
    assert sizes == [5000, 5000]
