# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Long reads, which the kernel sends straight from the page cache of the image."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests.interop.conftest import DISK_SIZE, MIB, Connect, StartDaemon
from tests.interop.daemon import Daemon, Disk, unix_server

LENGTHS = (64 * 1024, 128 * 1024, 256 * 1024 + 512, MIB, 2 * MIB, 4 * MIB)


@pytest.mark.parametrize("is_structured", [True, False])
def test_every_length_at_every_place(
    daemon: Daemon, connect: Connect, disk: Disk, is_structured: bool
) -> None:
    def prepare(handle: Any) -> None:
        handle.set_request_structured_replies(is_structured)
        if is_structured:
            handle.add_meta_context("base:allocation")

    handle = connect(daemon, prepare=prepare)
    content = disk.content()
    places = random.Random(1)
    for length in LENGTHS * 10:
        offset = places.randrange((DISK_SIZE - length) // 512 + 1) * 512
        assert handle.pread(length, offset) == content[offset : offset + length]


def test_reads_queued_by_a_client_that_takes_its_time(
    daemon: Daemon, connect: Connect, disk: Disk, nbd: Any
) -> None:
    """More than the socket takes: the rest is read and waits in memory."""
    handle = connect(daemon)
    content = disk.content()
    wanted = [(number * MIB, nbd.Buffer(MIB)) for number in range(DISK_SIZE // MIB)] * 4
    wanted = [(offset, nbd.Buffer(MIB)) for offset, _ in wanted]
    cookies = [handle.aio_pread(buffer, offset) for offset, buffer in wanted]
    while handle.aio_in_flight():
        handle.poll(-1)
    assert all(handle.aio_command_completed(cookie) for cookie in cookies)
    for offset, buffer in wanted:
        assert buffer.to_bytearray() == content[offset : offset + MIB]


def test_what_was_written_is_what_is_sent(daemon: Daemon, connect: Connect, disk: Disk) -> None:
    writer = connect(daemon)
    reader = connect(daemon)
    content = bytearray(disk.content())
    places = random.Random(2)
    for _ in range(60):
        length = places.randrange(1, 600) * 512
        offset = places.randrange((DISK_SIZE - length) // 512 + 1) * 512
        kind = places.choice(["write", "zero", "trim"])
        if kind == "write":
            data = places.randbytes(length)
            writer.pwrite(data, offset)
            content[offset : offset + length] = data
        elif kind == "zero":
            writer.zero(length, offset)
            content[offset : offset + length] = bytes(length)
        else:
            writer.trim(length, offset)
            writer.zero(length, offset)
            content[offset : offset + length] = bytes(length)
        at = places.randrange((DISK_SIZE - MIB) // 512 + 1) * 512
        assert reader.pread(MIB, at) == content[at : at + MIB]


def test_a_truncated_image_never_gives_wrong_data(
    start_daemon: StartDaemon, connect: Connect, tmp_path: Path, nbd: Any
) -> None:
    """What is gone is an error, as soon as the file is shorter than when it was opened."""
    path = tmp_path / "shrinking.img"
    path.write_bytes(os.urandom(4 * MIB))
    disk = Disk(path)
    daemon = start_daemon(*disk.blockdev(), *unix_server(), *disk.export())
    handle = connect(daemon)
    assert handle.pread(MIB, 3 * MIB) == path.read_bytes()[3 * MIB :]
    os.truncate(path, 2 * MIB)
    with pytest.raises(nbd.Error):
        handle.pread(MIB, 2 * MIB)
    other = connect(daemon)
    assert other.pread(MIB, 0) == path.read_bytes()[:MIB]
