# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots and what queries tell of images: the same as of qemu-storage-daemon."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from tests.interop.oracle import Oracle, Reply
from tests.interop.same_answers import Ask, ours, theirs
from tests.interop.tools import run

pytestmark = pytest.mark.interop

QUERY: Final[Ask] = ("query-named-block-nodes", {})
FLAT: Final[Ask] = ("query-named-block-nodes", {"flat": True})


def add(name: str, filename: str, **options: Any) -> Ask:
    named = {option.replace("_", "-"): value for option, value in options.items()}
    file = {"driver": "file", "filename": f"@/{filename}"}
    return "blockdev-add", {"driver": "qcow2", "node-name": name, "file": file, **named}


def take(device: str, name: str) -> Ask:
    return "blockdev-snapshot-internal-sync", {"device": device, "name": name}


def delete(device: str, **which: str) -> Ask:
    return "blockdev-snapshot-delete-internal-sync", {"device": device, **which}


SESSIONS: Final[dict[str, Sequence[Ask]]] = {
    "good and bad names": [
        add("q", "a.qcow2"),
        take("q", "s1"),
        take("q", "s1"),
        take("q", ""),
        take("missing", "s"),
        take("q", "x" * 300),
        take("q", "x" * 300),
        take("q", "1"),
        QUERY,
        delete("q"),
        delete("q", id="9"),
        delete("q", name="missing"),
        delete("q", id="1", name="missing"),
        delete("q", id="2", name="1"),
        delete("q", id=""),
        delete("missing", name="s"),
        delete("q", name="1"),
        delete("q", id="1", name="s1"),
        take("q", "again"),
        QUERY,
    ],
    "other nodes": [
        ("blockdev-add", {"driver": "file", "node-name": "f", "filename": "@/base.raw"}),
        take("f", "s"),
        delete("f", name="s"),
        add("q", "a.qcow2"),
        ("blockdev-add", {"driver": "raw", "node-name": "r", "file": "q"}),
        take("q", "s"),
        delete("q", name="s"),
        take("r", "s"),
        QUERY,
        delete("r", name="s"),
        ("blockdev-add", {"driver": "raw", "node-name": "w", "file": "f", "offset": 512}),
        take("w", "s"),
        add("d", "data.qcow2"),
        take("d", "s"),
        delete("d", name="s"),
        add("ro", "v2.qcow2", read_only=True),
        take("ro", "s"),
        delete("ro", name="s"),
    ],
    "kinds of images": [
        add("v2", "v2.qcow2"),
        take("v2", "s"),
        add("narrow", "narrow.qcow2"),
        take("narrow", "s"),
        add("full", "full.qcow2"),
        take("full", "s"),
        QUERY,
        delete("v2", name="s"),
        delete("narrow", name="s"),
    ],
    "chains": [add("top", "top.qcow2"), take("top", "s"), QUERY, FLAT],
    "busy nodes": [
        add("q", "used.qcow2"),
        ("blockdev-add", {"driver": "null-co", "node-name": "n", "size": 4 << 20}),
        (
            "blockdev-backup",
            {"job-id": "j", "device": "q", "target": "n", "sync": "full", "speed": 1},
        ),
        take("q", "s"),
        delete("q", name="s"),
    ],
}


def make_images(folder: Path) -> None:
    folder.mkdir()
    (folder / "base.raw").write_bytes(bytes(1 << 20))
    for name, options in {
        "a": "compat=1.1",
        "used": "compat=1.1",
        "v2": "compat=0.10",
        "data": f"data_file={folder}/d.raw",
        "narrow": "refcount_bits=1",
        "full": "refcount_bits=1,preallocation=metadata",
        "mid": "backing_file=base.raw,backing_fmt=raw,lazy_refcounts=on",
        "top": "backing_file=mid.qcow2,backing_fmt=qcow2,extended_l2=on",
    }.items():
        run(
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            options,
            folder / f"{name}.qcow2",
            *([] if "backing" in options else ["4M" if name == "used" else "1M"]),
        )
    run("qemu-io", "-c", "write 0 4M", folder / "used.qcow2")


def comparable(replies: list[Reply]) -> list[Reply]:
    """Without times, and without space that depends on the order of allocations."""
    text = json.dumps(replies, sort_keys=True)
    text = re.sub(r'"(date|vm-clock)-n?sec": \d+', r'"\1": 0', text)
    stripped: list[Reply] = json.loads(re.sub(r'"actual-size": \d+', '"actual-size": 0', text))
    for reply in stripped:
        if isinstance(reply.get("return"), list):
            for node in reply["return"]:
                if node["drv"] == "file":
                    node["image"]["virtual-size"] = 0
            if reply["return"]:
                reply["return"].sort(key=lambda node: (node["file"], node["drv"]))
    return stripped


@pytest.mark.parametrize("name", SESSIONS)
def test_the_same_is_answered(tmp_path: Path, name: str) -> None:
    session = SESSIONS[name]
    make_images(tmp_path / "ours")
    make_images(tmp_path / "theirs")
    answers = comparable(ours(session, tmp_path / "ours"))
    with Oracle(tmp_path / "theirs", capabilities=[]) as oracle:
        expected = comparable(theirs(session, tmp_path / "theirs", oracle))
    for step, answer, wanted in zip(session, answers, expected, strict=True):
        assert (step, answer) == (step, wanted)
    for image in (tmp_path / "ours").glob("*.qcow2"):
        run("qemu-img", "check", image)


def test_the_human_monitor_lists_snapshots_as_qemu_img_does(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    for name in ("first", "a name that is longer than its column"):
        run("qemu-img", "snapshot", "-c", name, path)
    [_, *listed] = run("qemu-img", "snapshot", "-l", path).splitlines()
    session = [
        add("q", "disk.qcow2"),
        ("human-monitor-command", {"command-line": "info block -v q"}),
    ]
    text = ours(session, tmp_path)[1]["return"].replace("\r", "")
    assert "\n".join(["Snapshot list:", *listed, ""]) in text
