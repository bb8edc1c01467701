# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Other servers in front of us: each is a client of ours, and passes on what it learnt.

libnbd starts the other server with a listening socket and ends it with the handle, so nothing
waits for a socket to appear and nothing is left running.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.interop.conftest import DISK_SIZE, MIB, PART
from tests.interop.daemon import Daemon, Disk
from tests.interop.tools import require, run

Front = Callable[[str], list[str]]


def qemu_nbd(uri: str) -> list[str]:
    options = ["--persistent", "--shared=4", "--discard=unmap", "--format=raw"]
    return [require("qemu-nbd"), *options, uri]


def nbdkit(uri: str) -> list[str]:
    return [require("nbdkit"), "--foreground", "--exit-with-parent", "nbd", f"uri={uri}"]


def nbdkit_with_connections(uri: str) -> list[str]:
    """A connection to us for each of its clients, where the others share one."""
    return [*nbdkit(uri), "shared=false"]


FRONTS = pytest.mark.parametrize("front", [qemu_nbd, nbdkit, nbdkit_with_connections])


@pytest.fixture
def through(nbd: Any) -> Callable[[list[str]], Any]:
    """A function that starts a server and gives a libnbd handle connected to it."""

    def connect(server: list[str]) -> Any:
        handle = nbd.NBD()
        handle.add_meta_context("base:allocation")
        handle.connect_systemd_socket_activation(server)
        return handle

    return connect


@FRONTS
def test_every_command_passes(
    front: Front, through: Callable[[list[str]], Any], daemon: Daemon, disk: Disk, nbd: Any
) -> None:
    handle = through(front(daemon.uri("disk0")))
    assert handle.get_size() == DISK_SIZE
    expected = bytearray(disk.content())
    assert bytes(handle.pread(DISK_SIZE, 0)) == expected

    handle.pwrite(b"w" * 65536, 512)
    expected[512 : 512 + 65536] = b"w" * 65536
    handle.pwrite(b"f" * 4096, MIB, nbd.CMD_FLAG_FUA)
    expected[MIB : MIB + 4096] = b"f" * 4096
    handle.zero(65536, 2 * PART)
    expected[2 * PART : 2 * PART + 65536] = bytes(65536)
    handle.zero(65536, 2 * PART + MIB, nbd.CMD_FLAG_NO_HOLE)
    expected[2 * PART + MIB : 2 * PART + MIB + 65536] = bytes(65536)
    handle.trim(65536, 0)
    handle.cache(65536, 0)
    handle.flush()

    # A trimmed range may hold anything, so it is left out.
    assert disk.content(65536) == expected[65536:]
    assert bytes(handle.pread(DISK_SIZE, 0)) == disk.content()
    handle.shutdown()


@FRONTS
def test_extents_pass(
    front: Front, through: Callable[[list[str]], Any], daemon: Daemon, nbd: Any
) -> None:
    handle = through(front(daemon.uri("disk0")))
    found: list[tuple[int, int]] = []

    def keep(_context: str, _offset: int, entries: list[int], _error: object) -> int:
        found.extend(zip(entries[::2], entries[1::2], strict=True))
        return 0

    handle.block_status(DISK_SIZE, 0, keep)
    hole = nbd.STATE_HOLE | nbd.STATE_ZERO
    assert found[:2] == [(PART, 0), (PART, hole)]
    handle.shutdown()


@FRONTS
def test_a_read_only_export_stays_read_only(
    front: Front, through: Callable[[list[str]], Any], read_only_daemon: Daemon
) -> None:
    command = front(read_only_daemon.uri("disk0"))
    if front is qemu_nbd:  # it does not ask its source, it is told
        command.insert(1, "--read-only")
    handle = through(command)
    assert handle.is_read_only()
    assert len(handle.pread(4096, 0)) == 4096
    handle.shutdown()


@FRONTS
def test_a_disk_is_copied_in(front: Front, daemon: Daemon, disk: Disk, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB) + b"q" * (DISK_SIZE - MIB))
    run("nbdcopy", "--flush", "--", image, "[", *front(daemon.uri("disk0")), "]")
    assert disk.content() == image.read_bytes()
