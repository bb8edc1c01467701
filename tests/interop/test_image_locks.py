# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Image locks: qemu's tools and the daemon keep out of each other's way.

A lock on byte 100 + n says "I use permission n", one on byte 200 + n "nobody else may"; the
permissions are consistent read (0), write (1), unchanged write (2) and resize (3).
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.interop.conftest import StartDaemon
from tests.interop.daemon import Daemon, Disk, unix_server
from tests.interop.tools import require

WRITE = 1
IN_USE = 100
NOT_SHARED = 200

#: struct flock: type, whence, start, length, process.
FLOCK = struct.Struct("hhqqi4x")


@contextmanager
def lock(path: Path, byte: int) -> Iterator[None]:
    """Hold a shared lock on one byte, as another qemu process would."""
    with path.open("rb") as file:
        request = FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, request)
        yield


def locked_bytes(path: Path) -> set[tuple[str, int, int]]:
    """Return the locks that the kernel holds for a file as (kind, first byte, last byte)."""
    inode = str(path.stat().st_ino)
    found = set()
    for line in Path("/proc/locks").read_text().splitlines():
        _, _, _, kind, _, file, first, last = line.replace("-> ", "").split()
        if file.rpartition(":")[2] == inode:
            found.add((kind, int(first), int(last)))
    return found


@pytest.mark.parametrize("writable", [True, False])
def test_the_same_bytes_are_locked_as_by_the_real_one(
    writable: bool,
    start_daemon: StartDaemon,
    disk: Disk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require("qemu-storage-daemon")
    other = Disk(tmp_path / "other.img")
    other.path.write_bytes(disk.content())
    switch = "off" if writable else "on"
    tail = (*unix_server(), *disk.export(writable=writable))

    start_daemon(*disk.blockdev(read_only=switch), *tail)
    directory = tmp_path / "real"
    directory.mkdir()
    with monkeypatch.context() as patch:
        patch.setenv("NBDJOBS_PROGRAM", "qemu-storage-daemon")
        real = Daemon(directory, *other.blockdev(read_only=switch), *tail)
        with real:
            expected = locked_bytes(other.path)
            assert expected
            assert locked_bytes(disk.path) == expected
            real.stop()


def test_an_image_that_another_process_keeps_for_itself_is_not_exported(
    start_daemon: StartDaemon, disk: Disk
) -> None:
    daemon = start_daemon(*disk.blockdev(), *unix_server())
    export = {"type": "nbd", "id": "e", "node-name": "disk0", "writable": True}
    with lock(disk.path, NOT_SHARED + WRITE):
        refusal = daemon.qmp.ask("block-export-add", export)
        assert 'Failed to get "write" lock' in refusal["error"]["desc"]
    daemon.qmp.execute("block-export-add", export)
