# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A disk is read as it was at one instant, while libnbd's clients write to it all the time."""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.interop.conftest import DISK_SIZE, PART, Connect, StartDaemon
from tests.interop.daemon import Daemon, Disk, unix_server
from tests.interop.tools import run

BLOCK = 32 * 1024
ENOUGH = 50
"""Writes by each writer that a test waits for, before and after the instant."""


class Writer(threading.Thread, ABC):
    """A client that writes to its part of the disk until it is told to stop."""

    def __init__(self, handle: Any, number: int):
        super().__init__()
        self.handle = handle
        self.number = number
        self._is_to_stop = False
        self._written = 0
        self._progress = threading.Condition()

    @abstractmethod
    def write_once(self, turn: int) -> None:
        """Write something that this turn can be told by."""

    def run(self) -> None:
        turn = 0
        while not self._is_to_stop:
            self.write_once(turn)
            turn += 1
            with self._progress:
                self._written += 1
                self._progress.notify()

    def wait_for_writes(self, count: int = ENOUGH) -> None:
        """Wait for so many writes from now on."""
        with self._progress:
            goal = self._written + count
            assert self._progress.wait_for(lambda: self._written >= goal, timeout=60)

    def stop(self) -> None:
        self._is_to_stop = True
        self.join()


class RandomWriter(Writer):
    """Writes, zeroes and trims anywhere, together with the others."""

    def write_once(self, turn: int) -> None:
        chance = random.Random(f"{self.number} {turn}")
        length = chance.randint(1, 200_000)
        offset = chance.randrange(DISK_SIZE - length)
        match chance.randrange(4):
            case 0:
                self.handle.zero(length, offset)
            case 1:
                self.handle.trim(length, offset)
            case _:
                self.handle.pwrite(chance.randbytes(length), offset)


class CountingWriter(Writer):
    """Writes a number to block after block of its part, then the next number, over and over.

    At any instant, its part is a run of one number and then a run of the number before.
    """

    def write_once(self, turn: int) -> None:
        lap, block = divmod(turn, PART // BLOCK)
        self.handle.pwrite(
            struct.pack(">I", lap + 1) * (BLOCK // 4), self.number * PART + block * BLOCK
        )


@contextmanager
def writing(writers: list[Writer]) -> Iterator[None]:
    for writer in writers:
        writer.start()
    try:
        for writer in writers:
            writer.wait_for_writes()
        yield
    finally:
        for writer in writers:
            writer.stop()


@pytest.fixture
def scratch(tmp_path: Path) -> Disk:
    """Where old content goes: a sparse file of the disk's size."""
    path = tmp_path / "scratch.img"
    path.touch()
    os.truncate(path, DISK_SIZE)
    return Disk(path, "scratch")


def filter_options(**more: object) -> dict[str, object]:
    return {
        "driver": "copy-before-write",
        "node-name": "cbw",
        "file": "disk0-file",
        "target": "scratch",
        "discard": "unmap",
        **more,
    }


def disk_options(file: str) -> dict[str, object]:
    return {"driver": "raw", "node-name": "disk0", "file": file, "discard": "unmap"}


def insert_filter(daemon: Daemon, **options: object) -> None:
    """Take the point in time, under an export in use."""
    daemon.qmp.execute("blockdev-add", filter_options(**options))
    daemon.qmp.execute("blockdev-reopen", {"options": [disk_options("cbw")]})


def export_snapshot(daemon: Daemon) -> None:
    daemon.qmp.execute(
        "blockdev-add",
        {"driver": "snapshot-access", "node-name": "snap", "file": "cbw", "discard": "unmap"},
    )
    daemon.qmp.execute(
        "block-export-add", {"type": "nbd", "id": "snap", "node-name": "snap", "writable": True}
    )


def remove_all(daemon: Daemon) -> None:
    """What a user does when the backup is done."""
    daemon.qmp.execute("block-export-del", {"id": "snap", "mode": "hard"})
    daemon.qmp.wait_event("BLOCK_EXPORT_DELETED")
    daemon.qmp.execute("blockdev-del", {"node-name": "snap"})
    daemon.qmp.execute("blockdev-reopen", {"options": [disk_options("disk0-file")]})
    daemon.qmp.execute("blockdev-del", {"node-name": "cbw"})


@pytest.fixture
def daemon(start_daemon: StartDaemon, disk: Disk, scratch: Disk) -> Daemon:
    return start_daemon(
        *(*disk.blockdev(discard="unmap"), *scratch.blockdev(discard="unmap")),
        *(*unix_server(), *disk.export()),
    )


def test_nbdcopy_reads_the_content_of_the_start(
    daemon: Daemon, disk: Disk, connect: Connect, tmp_path: Path
) -> None:
    before = disk.content()
    insert_filter(daemon)
    export_snapshot(daemon)
    writers: list[Writer] = [RandomWriter(connect(daemon), n) for n in range(3)]
    with writing(writers):
        for connections in ("1", "4"):
            copy = tmp_path / f"copy{connections}"
            run("nbdcopy", "-C", connections, daemon.uri("snap"), copy)
            assert copy.read_bytes() == before
        remove_all(daemon)
        writers[0].wait_for_writes()  # clients noticed nothing
    assert disk.content() != before


def test_the_filter_under_a_busy_disk_takes_one_instant(
    daemon: Daemon, connect: Connect, tmp_path: Path
) -> None:
    writers: list[Writer] = [CountingWriter(connect(daemon), n) for n in range(4)]
    with writing(writers):
        for turn in range(3):
            insert_filter(daemon)
            for writer in writers:
                writer.wait_for_writes()
            export_snapshot(daemon)
            copy = tmp_path / f"copy{turn}"
            run("nbdcopy", "--synchronous", daemon.uri("snap"), copy)
            assert_one_instant(copy.read_bytes())
            remove_all(daemon)


def assert_one_instant(content: bytes) -> None:
    for number in range(4):
        part = content[number * PART : (number + 1) * PART]
        numbers = [part[at : at + 4] for at in range(0, PART, BLOCK)]
        newest = struct.unpack(">I", numbers[0])[0]
        assert newest > 0
        done = numbers.count(numbers[0])
        if newest > 1:
            assert numbers == [struct.pack(">I", newest)] * done + [
                struct.pack(">I", newest - 1)
            ] * (len(numbers) - done)
        for block in range(done):
            assert part[block * BLOCK : (block + 1) * BLOCK] == numbers[0] * (BLOCK // 4)


def test_what_was_read_may_be_discarded(
    daemon: Daemon, disk: Disk, scratch: Disk, connect: Connect, nbd: Any
) -> None:
    insert_filter(daemon)
    export_snapshot(daemon)
    guest, reader = connect(daemon), connect(daemon, "snap")
    before = disk.content(0, PART)
    guest.pwrite(b"w" * PART, 0)
    assert scratch.path.stat().st_blocks * 512 >= PART
    assert bytes(reader.pread(PART, 0)) == before
    reader.trim(PART, 0)
    assert scratch.path.stat().st_blocks * 512 < PART
    with pytest.raises(nbd.Error) as caught:
        reader.pread(512, 0)
    assert caught.value.errno == "EINVAL"  # NBD has no word for EACCES
    assert bytes(reader.pread(512, PART)) == bytes(512)


def test_a_snapshot_that_broke_is_never_read_again(
    start_daemon: StartDaemon, disk: Disk, scratch: Disk, connect: Connect, nbd: Any
) -> None:
    rule = f"inject-error.0.event=pwritev,inject-error.0.errno={errno.ENOSPC}"
    faulty = f"driver=blkdebug,node-name=faulty,image=scratch,{rule}"
    daemon = start_daemon(
        *(*disk.blockdev(), *scratch.blockdev(), "--blockdev", faulty),
        *(*unix_server(), *disk.export()),
    )
    insert_filter(daemon, target="faulty", **{"on-cbw-error": "break-snapshot"})
    export_snapshot(daemon)
    guest, reader = connect(daemon), connect(daemon, "snap")
    before = disk.content()
    assert bytes(reader.pread(512, 0)) == before[:512]
    guest.pwrite(b"new" * 100, 0)
    assert disk.content(0, 300) == b"new" * 100
    for offset in (0, PART):
        with pytest.raises(nbd.Error) as caught:
            reader.pread(512, offset)
        assert caught.value.errno == "EINVAL"
