# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""qemu-img and qemu-io as clients: qemu's own NBD client and its block layer's habits."""

from __future__ import annotations

import json
from pathlib import Path

from tests.interop.conftest import DISK_SIZE, MIB, PART
from tests.interop.daemon import Daemon, Disk
from tests.interop.tools import run, run_for_result


def io(uri: str, *commands: str) -> str:
    """Run qemu-io commands on an export; a pattern that does not match fails the test."""
    words = [word for command in commands for word in ("-c", command)]
    output = run("qemu-io", "-f", "raw", "--cache=none", *words, uri)
    assert "Pattern verification failed" not in output
    assert "failed" not in output
    return output


def test_img_info(daemon: Daemon) -> None:
    info = json.loads(run("qemu-img", "info", "--output=json", daemon.uri("disk0")))
    assert info["virtual-size"] == DISK_SIZE
    assert info["format"] == "raw"


def test_img_convert_out(daemon: Daemon, disk: Disk, tmp_path: Path) -> None:
    copy = tmp_path / "copy.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", daemon.uri("disk0"), copy)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", copy, disk.path, "--force-share")


def test_img_convert_in(daemon: Daemon, disk: Disk, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"i" * MIB + bytes(DISK_SIZE - 2 * MIB) + b"j" * MIB)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, daemon.uri("disk0"))
    assert disk.content() == image.read_bytes()


def test_img_compare(daemon: Daemon, disk: Disk, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(disk.content())
    assert "identical" in run("qemu-img", "compare", daemon.uri("disk0"), copy)
    copy.write_bytes(disk.content(0, DISK_SIZE - 1) + b"x")
    result = run_for_result("qemu-img", "compare", daemon.uri("disk0"), copy)
    assert result.returncode == 1
    assert "Content mismatch" in result.stdout


def test_img_map(daemon: Daemon) -> None:
    found = json.loads(run("qemu-img", "map", "--output=json", daemon.uri("disk0")))
    assert [(extent["start"], extent["length"], extent["zero"]) for extent in found] == [
        (0, PART, False),
        (PART, PART, True),
        (2 * PART, PART, False),
        (3 * PART, PART, True),
    ]


def test_io_write_then_read(daemon: Daemon, disk: Disk) -> None:
    io(
        daemon.uri("disk0"),
        *("write -P 0x11 0 64k", "write -P 0x22 100 1000", "flush"),
        *("read -P 0x11 0 100", "read -P 0x22 100 1000", "read -P 0x11 1100 60k"),
    )
    assert disk.content(100, 1000) == b"\x22" * 1000


def test_io_write_with_fua(daemon: Daemon, disk: Disk) -> None:
    io(daemon.uri("disk0"), "write -f -P 0x33 0 4k", "read -P 0x33 0 4k")
    assert disk.content(0, 4096) == b"\x33" * 4096


def test_io_zeroes(daemon: Daemon, disk: Disk) -> None:
    blocks = disk.path.stat().st_blocks
    io(daemon.uri("disk0"), "write -P 0x44 0 256k", "write -z 4k 64k", "read -P 0 4k 64k")
    assert disk.path.stat().st_blocks >= blocks
    io(daemon.uri("disk0"), "write -z -u 128k 64k", "read -P 0 128k 64k", "read -P 0x44 0 4k")
    assert disk.path.stat().st_blocks <= blocks - 64


def test_io_discard(daemon: Daemon, disk: Disk) -> None:
    blocks = disk.path.stat().st_blocks
    io(daemon.uri("disk0"), "discard 0 1M", "read -P 0 0 1M", "flush")
    assert disk.path.stat().st_blocks <= blocks - MIB // 1024


def test_io_many_at_once(daemon: Daemon) -> None:
    patterns = range(1, 64)
    writes = [f"aio_write -P {pattern} {pattern * 8}k 8k" for pattern in patterns]
    reads = [f"read -P {pattern} {pattern * 8}k 8k" for pattern in patterns]
    io(daemon.uri("disk0"), *writes, "aio_flush", *reads)


def test_io_write_to_a_read_only_export(read_only_daemon: Daemon, disk: Disk) -> None:
    before = disk.content()
    uri = read_only_daemon.uri("disk0")
    result = run_for_result("qemu-io", "-f", "raw", "-c", "write 0 512", uri)
    assert result.returncode == 1
    assert disk.content() == before
