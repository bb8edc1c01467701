# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""nbdinfo: what an administrator sees of an export."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.interop.conftest import DISK_SIZE, PART, StartDaemon
from tests.interop.daemon import Daemon, Disk, unix_server
from tests.interop.tools import run, run_for_result

#: nbdinfo's exit code for "no", which is not a failure.
IS_FALSE = 2


def test_plain(daemon: Daemon) -> None:
    report = run("nbdinfo", daemon.uri("disk0"))
    assert "protocol: newstyle-fixed without TLS, using structured packets" in report
    assert 'export="disk0":' in report
    assert f"export-size: {DISK_SIZE} (8M)" in report
    assert "base:allocation" in report


def test_list(daemon: Daemon) -> None:
    report = run("nbdinfo", "--list", daemon.uri())
    assert 'export="disk0":' in report
    assert f"export-size: {DISK_SIZE}" in report


def test_json(daemon: Daemon) -> None:
    report = json.loads(run("nbdinfo", "--json", daemon.uri("disk0")))
    assert report["protocol"] == "newstyle-fixed"
    assert report["structured"] is True
    [export] = report["exports"]
    assert export["export-name"] == "disk0"
    assert export["export-size"] == DISK_SIZE
    assert export["contexts"] == ["base:allocation"]
    assert export["is_read_only"] is False
    assert export["block_size_minimum"] == 1
    assert export["block_size_maximum"] == 32 << 20


def test_json_list(daemon: Daemon) -> None:
    report = json.loads(run("nbdinfo", "--list", "--json", daemon.uri()))
    assert [export["export-name"] for export in report["exports"]] == ["disk0"]


def test_size(daemon: Daemon) -> None:
    assert run("nbdinfo", "--size", daemon.uri("disk0")) == f"{DISK_SIZE}\n"


def test_map(daemon: Daemon) -> None:
    extents = json.loads(run("nbdinfo", "--map", "--json", daemon.uri("disk0")))
    assert [(extent["offset"], extent["length"], extent["type"]) for extent in extents] == [
        (0, PART, 0),
        (PART, PART, 3),
        (2 * PART, PART, 0),
        (3 * PART, PART, 3),
    ]


def test_map_totals(daemon: Daemon) -> None:
    totals = json.loads(run("nbdinfo", "--map", "--totals", "--json", daemon.uri("disk0")))
    assert {total["description"]: total["size"] for total in totals} == {
        "data": DISK_SIZE // 2,
        "hole,zero": DISK_SIZE // 2,
    }


@pytest.mark.parametrize(
    "ability",
    [
        *("connect", "read", "write", "flush", "fua", "trim", "zero", "fast-zero"),
        *("df", "cache", "structured-reply", "multi-conn"),
    ],
)
def test_a_writable_export_can(ability: str, daemon: Daemon) -> None:
    run("nbdinfo", "--can", ability, daemon.uri("disk0"))


@pytest.mark.parametrize("ability", ["write", "trim", "zero", "fast-zero"])
def test_a_read_only_export_cannot(ability: str, read_only_daemon: Daemon) -> None:
    result = run_for_result("nbdinfo", "--can", ability, read_only_daemon.uri("disk0"))
    assert result.returncode == IS_FALSE


@pytest.mark.parametrize("ability", ["connect", "read", "df", "cache", "multi-conn"])
def test_a_read_only_export_can(ability: str, read_only_daemon: Daemon) -> None:
    run("nbdinfo", "--can", ability, read_only_daemon.uri("disk0"))


@pytest.mark.parametrize("claim", ["read-only", "tls"])
def test_a_writable_file_is_not(claim: str, daemon: Daemon) -> None:
    result = run_for_result("nbdinfo", "--is", claim, daemon.uri("disk0"))
    assert result.returncode == IS_FALSE


def kernel_says_rotational(path: Path) -> bool:
    """Whether the kernel takes the disk under a file for a spinning one."""
    device = path.stat().st_dev
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    answers = (at / "queue/rotational" for at in (folder, folder.parent))
    return any(answer.exists() and answer.read_text().strip() == "1" for answer in answers)


def test_a_file_is_rotational_only_where_its_disk_is(daemon: Daemon, disk: Disk) -> None:
    result = run_for_result("nbdinfo", "--is", "rotational", daemon.uri("disk0"))
    assert result.returncode in (0, IS_FALSE)
    if result.returncode == 0:
        assert kernel_says_rotational(disk.path)


def test_a_disk_of_nothing_is_not_rotational(start_daemon: StartDaemon) -> None:
    node = "driver=null-co,node-name=disk0,size=1048576,read-zeroes=on"
    export = "type=nbd,id=e,node-name=disk0"
    daemon = start_daemon("--blockdev", node, *unix_server(), "--export", export)
    result = run_for_result("nbdinfo", "--is", "rotational", daemon.uri("disk0"))
    assert result.returncode == IS_FALSE


def test_a_read_only_export_is(read_only_daemon: Daemon) -> None:
    run("nbdinfo", "--is", "read-only", read_only_daemon.uri("disk0"))


def test_an_unknown_export_is_named(daemon: Daemon) -> None:
    result = run_for_result("nbdinfo", daemon.uri("unknown"))
    assert result.returncode == 1
    assert "unknown" in result.stderr
