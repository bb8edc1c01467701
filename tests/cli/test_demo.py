# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The demo: its busy client, its proof, and that the proof can fail."""

from __future__ import annotations

import io
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from nbdjobs.cli import demo, demo_disk, demo_writer
from nbdjobs.cli.demo import Client, Settings
from nbdjobs.cli.exits import CliError
from tests.interop.daemon import Daemon, Disk, unix_server
from tests.interop.tools import require

MIB = 1 << 20
SIZE = 4 * MIB
GREETING = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)

PROGRAMS = ["nbdjobs", pytest.param("qemu-storage-daemon", marks=pytest.mark.interop)]


def reply(kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, 7, kind, len(data)) + data


def negotiated(*parts: bytes) -> tuple[int, bytes]:
    """Negotiate with a server that says this; return the size and what the client said."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"".join(parts))
        theirs.shutdown(socket.SHUT_WR)
        size = demo_writer.negotiate(ours, "disk")
        return size, theirs.recv(1000)


def test_the_client_opens_its_export() -> None:
    block_size = reply(3, struct.pack(">HIII", 3, 1, 4096, 1 << 25))
    size, said = negotiated(
        GREETING, reply(3, struct.pack(">HQH", 0, SIZE, 1)), block_size, reply(1)
    )
    assert size == SIZE
    assert said == (
        struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">III", 7, 10, 4) + b"disk" + b"\0\0"
    )


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([b"NBDMAGIC" + bytes(10)], "newstyle"),
        ([GREETING[:9]], "closed"),
        ([GREETING, reply(0x80000006, b"no such export")], "no export 'disk': no such export"),
        ([GREETING, bytes(20)], "makes no sense"),
        ([GREETING, struct.pack(">QIII", 0x3E889045565A9, 7, 3, 1 << 31)], "makes no sense"),
    ],
)
def test_the_client_names_what_is_wrong(parts: list[bytes], reason: str) -> None:
    with pytest.raises(demo_writer.WriterError, match=reason):
        negotiated(*parts)


@pytest.fixture(params=PROGRAMS)
def served(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Daemon, Disk]]:
    if request.param != "nbdjobs":
        monkeypatch.setenv("NBDJOBS_PROGRAM", require(request.param))
    disk = Disk(tmp_path / "disk.img")
    with disk.path.open("wb") as file:
        file.truncate(SIZE)
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    with Daemon(sockets, *disk.blockdev(), *unix_server(), *disk.export()) as daemon:
        yield daemon, disk


@contextmanager
def writing(daemon: Daemon, export: str) -> Iterator[tuple[Client, subprocess.Popen[str]]]:
    words = [sys.executable, "-m", "nbdjobs.cli.demo_writer", str(daemon.nbd_socket), export]
    with subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield Client(process), process
        process.communicate()


def newest(content: bytes) -> int:
    """The largest number on the disk, each block being filled with one."""
    blocks = [content[start : start + 4096] for start in range(0, len(content), 4096)]
    assert all(block == block[:8] * 512 for block in blocks)
    return max(int.from_bytes(block[:8], "big") for block in blocks)


def test_the_client_writes_holds_and_stops(served: tuple[Daemon, Disk]) -> None:
    daemon, disk = served
    with writing(daemon, disk.name) as (client, process):
        first = client.hold()
        held = disk.content()
        assert newest(held) == first.writes
        client.go()
        last = client.stop()
        assert process.wait() == 0
    assert last.writes >= first.writes
    assert last.length >= last.writes * 4096
    assert newest(disk.content()) == last.writes


def test_the_client_ends_with_its_input(served: tuple[Daemon, Disk]) -> None:
    daemon, disk = served
    with writing(daemon, disk.name) as (_, process):
        output, errors = process.communicate("")
    assert process.returncode == 0
    assert len(output.split()) == 2
    assert errors == ""


def test_the_client_reports_a_missing_export(served: tuple[Daemon, Disk]) -> None:
    daemon, _ = served
    with writing(daemon, "missing") as (_, process):
        _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.startswith("demo client: no export 'missing'")


SMALL = Settings(size=16 * MIB, speed=32 * MIB, warm_up=0.0)


def shown(settings: Settings) -> tuple[int, str]:
    stream = io.StringIO()
    return demo.show(
        settings, Console(file=stream, soft_wrap=True, highlight=False)
    ), stream.getvalue()


def test_the_demo_proves_its_backup() -> None:
    code, text = shown(SMALL)
    assert code == 0, text
    assert f"all {SMALL.size:,} bytes of the backup equal the disk at that instant" in text
    assert "meanwhile the disk has moved on" in text


def test_a_wrong_backup_fails_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_aside_wrongly(source: Path, copy: Path) -> None:
        demo_disk.set_aside(source, copy)
        with copy.open("r+b") as file:
            first = file.read(1)[0]
            file.seek(0)
            file.write(bytes([first ^ 1]))

    monkeypatch.setattr(demo, "set_aside", set_aside_wrongly)
    code, text = shown(SMALL)
    assert code == 1
    assert "WRONG: 1 of" in text


def test_a_server_that_does_not_start_is_named() -> None:
    with pytest.raises(CliError, match="server did not start"):
        shown(Settings(size=MIB, server=["false"]))


def test_too_little_room_is_named() -> None:
    with pytest.raises(CliError, match="the demo needs"):
        shown(Settings(size=1 << 60))
