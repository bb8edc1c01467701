# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Character devices: commands and options are answered as by the real program."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from nbdjobs.cli.daemon import daemon_main
from tests.interop.oracle import Oracle, Reply, command_line_refusal
from tests.interop.same_answers import Ask, ours, theirs


def add(name: str, kind: str, **data: Any) -> Ask:
    return "chardev-add", {"id": name, "backend": {"type": kind, "data": data}}


def change(name: str, kind: str, **data: Any) -> Ask:
    return "chardev-change", {"id": name, "backend": {"type": kind, "data": data}}


def unix(path: str, **options: Any) -> dict[str, Any]:
    address = {"type": "unix", "data": {"path": f"@/{path}"}}
    return {"addr": address, **options}


def tcp(port: str) -> dict[str, Any]:
    return {"type": "inet", "data": {"host": "127.0.0.1", "port": port}}


def write(device: str, data: str, **more: str) -> Ask:
    return "ringbuf-write", {"device": device, "data": data, **more}


def read(device: str, size: int, **more: str) -> Ask:
    return "ringbuf-read", {"device": device, "size": size, **more}


def by_id(command: str, name: str) -> Ask:
    return command, {"id": name}


QUERY: Final[Ask] = ("query-chardev", {})

SESSIONS: Final[dict[str, list[Ask]]] = {
    "simple ones": [
        add("n", "null"),
        add("n", "null"),
        add("1n", "null"),
        add("f", "file", out="@/out.txt"),
        add("f2", "file", out="/nonexistent/x"),
        add("f3", "file", **{"in": "@/out.txt", "out": "@/other"}),
        add("f4", "file", out="@/other", append=True),
        add("f5", "file"),
        QUERY,
        add("x", "null", x=1),
        add("x", "socket"),
        add("x", "nonsense"),
        ("chardev-add", {"id": "x", "backend": {}}),
        ("chardev-add", {"id": "x", "backend": {"type": "null"}}),
        by_id("chardev-send-break", "n"),
        by_id("chardev-send-break", "none"),
        by_id("chardev-remove", "n"),
        by_id("chardev-remove", "n"),
        QUERY,
    ],
    "ring buffers": [
        add("r", "ringbuf"),
        add("odd", "ringbuf", size=100),
        add("negative", "ringbuf", size=-4),
        add("none", "ringbuf", size=0),
        add("small", "ringbuf", size=4),
        add("m", "memory", size=64),
        add("n", "null"),
        write("r", "hello"),
        read("r", 3),
        read("r", 100),
        read("r", 100),
        read("r", 0),
        read("r", -1),
        write("n", "x"),
        read("n", 1),
        write("nothing", "x"),
        read("nothing", 1),
        write("r", "aGVsbG8=", format="base64"),
        read("r", 3, format="base64"),
        read("r", 30),
        write("r", "!!", format="base64"),
        write("r", "é", format="utf8"),
        read("r", 1),
        read("r", 30),
        write("r", "/w==", format="base64"),
        read("r", 30),
        write("r", "a\0b"),
        read("r", 30),
        write("small", "abcdefg"),
        write("small", "h"),
        read("small", 100),
        write("m", "abc"),
        read("m", 5),
        QUERY,
    ],
    "sockets": [
        add("s", "socket", **unix("s.sock", server=True, wait=False)),
        QUERY,
        add("c", "socket", **unix("missing", server=False)),
        add("p", "socket", **unix("missing", server=False, wait=True)),
        add("p", "socket", **unix("p.sock", server=True, reconnect=3)),
        add("i", "socket", addr=tcp("1"), server=False),
        add("later", "socket", **unix("missing", server=False, reconnect=60)),
        QUERY,
        by_id("chardev-remove", "s"),
        QUERY,
    ],
    "changes": [
        add("a", "null"),
        change("a", "file", out="@/out.txt"),
        QUERY,
        change("none", "null"),
        add("s", "socket", **unix("s.sock", server=True, wait=False)),
        change("s", "null"),
        QUERY,
        change("s", "file", out="/nonexistent/z"),
    ],
}

LINES: Final = [
    "null,id=n",
    "null,id=n,path=x",
    "file,id=f",
    "file,id=f,path=/nonexistent/x",
    "file,id=f,path=/tmp/x,input-path=/dev/null",
    "ringbuf,id=r",
    "ringbuf,id=r,size=100",
    "ringbuf,id=r,size=1k",
    "memory,id=r,size=64",
    "socket,id=s,path=/nonexistent/x,server=off",
    "socket,id=s,path=/nonexistent/x,server=off,reconnect=0",
    "socket,id=s,path=/nonexistent/x,server=off,reconnect=-1",
    "socket,id=s,path=/nonexistent/x,server=off,reconnect=x",
    "socket,id=s,path=/nonexistent/x,server=on,wait=off,reconnect=1",
    "socket,id=s,path=/nonexistent/x,server=on,wait=off",
    "socket,id=s,path=x,host=x,port=1,server=on,wait=off",
    "socket,id=s,path=nbdjobs-test,abstract=on,server=on,wait=off,delay=off",
]


def comparable(reply: Reply) -> Reply:
    """Lists in one order, and without the session that only one side has."""
    found = reply.get("return")
    if not isinstance(found, list):
        return reply
    rows = [row for row in found if row["label"] != "oracle"]
    return {"return": sorted(rows, key=lambda row: str(row["label"]))}


@pytest.mark.parametrize("name", SESSIONS)
def test_commands(name: str, tmp_path: Path) -> None:
    folders = [tmp_path / "ours", tmp_path / "theirs"]
    for folder in folders:
        folder.mkdir()
    session = SESSIONS[name]
    found = ours(session, folders[0])
    with Oracle(tmp_path, capabilities=[]) as oracle:
        expected = theirs(session, folders[1], oracle)
    for ask, mine, other in zip(session, found, expected, strict=True):
        assert comparable(mine) == comparable(other), ask


def test_kinds(tmp_path: Path) -> None:
    ask: Ask = ("query-chardev-backends", {})
    with Oracle(tmp_path, capabilities=[]) as oracle:
        (expected,) = theirs([ask], tmp_path, oracle)
    (found,) = ours([ask], tmp_path)
    known = [row for row in expected["return"] if row in found["return"]]
    assert len(known) == len(found["return"])


@pytest.mark.parametrize("text", LINES)
def test_options(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = command_line_refusal("--chardev", text)
    code = daemon_main(["--chardev", text, "--blockdev", "stop-here"])
    assert code == 1
    said = capsys.readouterr().err.removeprefix("nbdjobs: ").rstrip("\n")
    if expected is None:
        assert said.startswith("--blockdev stop-here: ")
    else:
        assert said == f"--chardev {text}: {expected}"
