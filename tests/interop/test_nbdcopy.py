# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""nbdcopy: whole disks in both directions, many requests in flight on several connections."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.interop.conftest import DISK_SIZE, StartDaemon
from tests.interop.daemon import Daemon, Disk, unix_server
from tests.interop.tools import run

CONNECTIONS = ["1", "4"]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file of the disk's size with other content, a quarter of it zeroes."""
    content = random.Random(1).randbytes(DISK_SIZE // 2)
    path = tmp_path / "image"
    quarter = DISK_SIZE // 4
    path.write_bytes(content[:quarter] + bytes(quarter) + content)
    return path


@pytest.mark.parametrize("connections", CONNECTIONS)
def test_out(connections: str, daemon: Daemon, disk: Disk, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    run("nbdcopy", "-C", connections, daemon.uri("disk0"), copy)
    assert copy.read_bytes() == disk.content()


@pytest.mark.parametrize("connections", CONNECTIONS)
def test_in(connections: str, daemon: Daemon, disk: Disk, image: Path) -> None:
    run("nbdcopy", "--flush", "-C", connections, image, daemon.uri("disk0"))
    assert disk.content() == image.read_bytes()


def test_in_synchronously(daemon: Daemon, disk: Disk, image: Path) -> None:
    run("nbdcopy", "--synchronous", "--flush", image, daemon.uri("disk0"))
    assert disk.content() == image.read_bytes()


def test_out_without_asking_for_extents(daemon: Daemon, disk: Disk, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    run("nbdcopy", "--no-extents", daemon.uri("disk0"), copy)
    assert copy.read_bytes() == disk.content()


def test_with_large_requests(daemon: Daemon, disk: Disk, image: Path) -> None:
    large = ("--request-size", str(4 << 20), "--requests", "8")
    run("nbdcopy", *large, "--flush", image, daemon.uri("disk0"))
    assert disk.content() == image.read_bytes()


def test_from_one_export_to_another(start_daemon: StartDaemon, disk: Disk, tmp_path: Path) -> None:
    target = Disk(tmp_path / "target.img", "disk1")
    target.path.write_bytes(b"t" * DISK_SIZE)
    daemon = start_daemon(
        *(*disk.blockdev(), *target.blockdev(discard="unmap"), *unix_server()),
        *(*disk.export(writable=False), *target.export()),
    )
    run("nbdcopy", "-C", "4", "--flush", daemon.uri("disk0"), daemon.uri("disk1"))
    assert target.content() == disk.content()
    assert target.path.stat().st_blocks < DISK_SIZE // 512, "holes arrive as holes"
