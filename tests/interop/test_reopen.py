# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""blockdev-reopen: allowed, refused and worded as by the real program.

Where an option is given that has its default value anyway, the real program sees a change and
nbdjobs does not; such rows are left out, and so is the empty list, which ends the real program.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from nbdjobs.nodes.qcow2.create import CreateOptions, empty_image
from tests.interop.oracle import Oracle
from tests.interop.same_answers import Ask, ours, theirs
from tests.interop.side_by_side import MadeUpNames

NODES: Final[Ask] = ("query-named-block-nodes", {"flat": True})

Options = dict[str, Any]


def node(driver: str, name: str, **options: Any) -> Options:
    named = {key.replace("_", "-"): value for key, value in options.items()}
    return {"driver": driver, "node-name": name, **named}


def add(options: Options) -> Ask:
    return "blockdev-add", options


def reopen(*options: object) -> Ask:
    return "blockdev-reopen", {"options": list(options)}


def export(name: str, **options: Any) -> list[Ask]:
    server = {"type": "unix", "data": {"path": "@/nbd.sock"}}
    arguments = {"type": "nbd", "id": "e", "node-name": name, **options}
    return [("nbd-server-start", {"addr": server}), ("block-export-add", arguments)]


A: Final = node("file", "a", filename="@/disk.img")
B: Final = node("file", "b", filename="@/target.img")
NULL: Final = node("null-co", "n", size=65536)
RAW: Final = node("raw", "r", file="a")
READ_ONLY: Final = {"read-only": True}
DIRECT: Final = {"cache": {"direct": True}}
INLINE: Final = {"driver": "file", "filename": "@/disk.img", "locking": "off"}
TOP: Final = {"driver": "raw", "node-name": "top"}
LIMIT: Final = node("throttle", "t", throttle_group="g0", file="a")
DEBUG: Final = node("blkdebug", "d", image="b", align=512)

IMAGE: Final = node("qcow2", "image", file="i")
OVERLAY: Final = {
    **node("qcow2", "top", file={"driver": "file", "filename": "@/overlay.qcow2"}),
    "backing": "image",
}
QCOW2_CHANGES: Final[tuple[Options, ...]] = (
    {},
    READ_ONLY,
    {"lazy-refcounts": True},
    {"overlap-check": "all"},
    {"overlap-check": {"template": "none"}},
    {"cache-size": 1 << 20},
    {"l2-cache-entry-size": 100},
    {"cache-clean-interval": -1},
    {"pass-discard-request": True},
    {"backing": None},
    {"backing": "base"},
    {},
    {"backing": None},
    {"data-file": "base"},
)

SESSIONS: Final[dict[str, list[Ask]]] = {
    "arguments": [
        ("blockdev-reopen", {}),
        reopen(1),
        reopen({}),
        reopen({"driver": "nonsense"}),
        add(A),
        reopen({"driver": "file", "filename": "@/disk.img"}),
        reopen({**A, "node-name": "zz"}),
        reopen({"driver": "file", "node-name": "a"}),
        reopen({**A, "bogus": 1}),
    ],
    "a file": [
        add(A),
        reopen(A),
        reopen({**A, **READ_ONLY}),
        NODES,
        reopen({**A, **DIRECT}),
        NODES,
        reopen({**A, "detect-zeroes": "unmap"}),
        reopen({**A, "cache": {"no-flush": True}, "discard": "unmap", "detect-zeroes": "unmap"}),
        NODES,
        reopen({**A, "filename": "@/target.img"}),
        reopen({**A, "locking": "off"}),
        reopen({**A, "aio": "native"}),
        reopen({**A, "aio": "native", **DIRECT}),
        reopen({**A, "aio-max-batch": 4}),
        reopen({**A, "pr-manager": "x"}),
        reopen({**A, "force-share": True, **READ_ONLY}),
        reopen({**A, "auto-read-only": True}),
        NODES,
        reopen({**A, "driver": "host_device"}),
        reopen(A, A),
        reopen({**A, **READ_ONLY}, {**A, "discard": "unmap"}),
        NODES,
        reopen(node("raw", "a", file="a")),
    ],
    "a file that others lock": [
        add({**A, "locking": "off"}),
        reopen(A),
        reopen({**A, "locking": "off", **READ_ONLY}),
        add({**B, "force-share": True, **READ_ONLY}),
        reopen(B),
        reopen({**B, **READ_ONLY}),
    ],
    "null": [
        add(NULL),
        reopen(NULL),
        reopen({**NULL, "size": 131072}),
        reopen({"driver": "null-co", "node-name": "n"}),
        reopen({**NULL, "latency-ns": 5}),
        reopen({**NULL, "read-zeroes": True}),
        reopen({**NULL, **READ_ONLY, **DIRECT}),
        NODES,
        reopen({**NULL, "driver": "null-aio"}),
    ],
    "raw": [
        add(A),
        add(B),
        add(NULL),
        add(RAW),
        reopen(RAW),
        reopen({**RAW, "offset": 512}),
        NODES,
        reopen({**RAW, "size": 512}),
        NODES,
        reopen({**RAW, "size": 513}),
        reopen({**RAW, "offset": 1 << 30}),
        reopen({**RAW, "offset": 512, "size": 1 << 20}),
        reopen({**RAW, "offset": -1}),
        reopen({**RAW, "size": -1}),
        reopen({**RAW, "file": "b"}),
        NODES,
        reopen({**RAW, "file": "zz"}),
        reopen({**RAW, "file": "r"}),
        reopen({**RAW, "file": "n"}),
        NODES,
        reopen(RAW),
        reopen({**RAW, "file": A}),
        reopen({**RAW, "file": B}),
        reopen({"driver": "raw", "node-name": "r"}),
        reopen({**A, **READ_ONLY}, {**RAW, **READ_ONLY}),
        reopen(RAW),
        reopen({**A, **READ_ONLY}, RAW),
        NODES,
    ],
    "inline children": [
        add(NULL),
        add({**TOP, "file": INLINE}),
        reopen({**TOP, "file": INLINE}),
        reopen({**TOP, "file": INLINE, **READ_ONLY}),
        NODES,
        reopen({**TOP, "file": {**INLINE, **READ_ONLY}}),
        NODES,
        reopen({**TOP, "file": {"driver": "file", "filename": "@/disk.img"}}),
        reopen({**TOP, "file": {**INLINE, "filename": "@/target.img"}}),
        reopen({**TOP, "file": {**INLINE, "node-name": "q"}}),
        reopen({**TOP, "file": "n"}),
        NODES,
        reopen({**TOP, "file": {"driver": "null-co", "size": 65536}}),
        NODES,
    ],
    "below an export": [
        add(A),
        add(B),
        add(RAW),
        *export("r", writable=True),
        reopen({**A, **READ_ONLY}),
        reopen({**RAW, **READ_ONLY}),
        reopen({**A, **READ_ONLY}, {**RAW, **READ_ONLY}),
        reopen({**RAW, "size": 512}),
        NODES,
        reopen(RAW),
        reopen({**RAW, "file": "b", "offset": 512}),
        reopen(RAW),
        reopen({**RAW, "file": "b"}, {**A, **READ_ONLY}),
        reopen(RAW),
        reopen(A, RAW),
        reopen({**RAW, "file": "b"}, {**B, **READ_ONLY}),
        reopen({**A, **READ_ONLY, "auto-read-only": True}),
        NODES,
    ],
    "throttle": [
        ("object-add", {"qom-type": "throttle-group", "id": "g0"}),
        ("object-add", {"qom-type": "throttle-group", "id": "g1"}),
        add(A),
        add(B),
        add(RAW),
        add(LIMIT),
        reopen(LIMIT),
        reopen({**LIMIT, "throttle-group": "g1"}),
        ("object-del", {"id": "g0"}),
        ("object-del", {"id": "g1"}),
        reopen(LIMIT),
        reopen({"driver": "throttle", "node-name": "t", "file": "a"}),
        reopen({**LIMIT, "throttle-group": "g1", "file": "b"}),
        reopen({**LIMIT, "throttle-group": "g1", "file": "t"}),
        reopen({**RAW, "file": "t"}),
        reopen({**LIMIT, "throttle-group": "g1", "file": "r"}),
        reopen(RAW, {**LIMIT, "throttle-group": "g1", "file": "r"}),
        reopen({**LIMIT, "throttle-group": "g1"}, {**RAW, "file": "t"}),
        NODES,
        reopen(RAW, {**LIMIT, "throttle-group": "g1", **READ_ONLY, "detect-zeroes": "on"}),
        NODES,
    ],
    "qcow2": [
        add(node("file", "i", filename="@/image.qcow2")),
        add(node("file", "base", filename="@/disk.img", read_only=True)),
        add(IMAGE),
        *(reopen({**IMAGE, **more}) for more in QCOW2_CHANGES),
        add(OVERLAY),
        reopen(OVERLAY),
        reopen({**OVERLAY, "backing": None}),
        reopen(OVERLAY),
        reopen({**OVERLAY, "backing": "base"}),
        reopen({**OVERLAY, "backing": "top"}),
        reopen({**OVERLAY, "backing": B}),
        reopen({**OVERLAY, "backing": "zz"}),
    ],
    "blkdebug": [
        add(A),
        add(B),
        add(DEBUG),
        reopen(DEBUG),
        reopen({**DEBUG, "image": "a"}),
        reopen({**DEBUG, "align": 1024}),
        reopen({"driver": "blkdebug", "node-name": "d", "image": "b"}),
        reopen({**DEBUG, "inject-error": [{"event": "read_aio"}]}),
        reopen({**DEBUG, "max-transfer": 1024}),
        reopen({**DEBUG, "take-child-perms": ["write"]}),
        reopen({**DEBUG, **READ_ONLY}),
        ("blockdev-del", {"node-name": "d"}),
        add({**DEBUG, "inject-error": [{"event": "read_aio"}]}),
        reopen({**DEBUG, "inject-error": [{"event": "read_aio"}]}),
        reopen({**DEBUG, "inject-error": [{"event": "write_aio"}]}),
    ],
}


@pytest.mark.parametrize("name", SESSIONS)
def test_the_answers_are_the_same(name: str, tmp_path: Path) -> None:
    for side in ("ours", "theirs"):
        (tmp_path / side).mkdir()
        for image in ("disk.img", "target.img"):
            with (tmp_path / side / image).open("wb") as file:
                file.truncate(1 << 20)
        for image in ("image.qcow2", "overlay.qcow2"):
            (tmp_path / side / image).write_bytes(empty_image(CreateOptions(size=1 << 20)))
    session = SESSIONS[name]
    found = ours(session, tmp_path / "ours")
    with Oracle(tmp_path / "theirs", capabilities=[]) as oracle:
        expected = theirs(session, tmp_path / "theirs", oracle)
    for asked, answer, right in zip(session, found, expected, strict=True):
        assert MadeUpNames().comparable(answer) == MadeUpNames().comparable(right), asked
