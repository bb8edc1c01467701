# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""nbd-client and fio: the reference implementation's client, and a load that checks itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.interop.conftest import DISK_SIZE
from tests.interop.daemon import Daemon
from tests.interop.tools import run, run_for_result


def test_nbd_client_lists_the_exports(daemon: Daemon) -> None:
    listing = run("nbd-client", "--list", "--unix", daemon.nbd_socket)
    assert "disk0" in listing.split()


def fio(uri: str, directory: Path, *options: str) -> dict[str, int]:
    """Run fio on an export; returns how many requests of each direction it made."""
    output = directory / "fio.json"
    # No state file for a later verification: it would land in the current directory.
    common = (
        "--verify_state_save=0",
        "--name=job",
        "--ioengine=nbd",
        f"--uri={uri}",
        f"--size={DISK_SIZE}",
    )
    result = run_for_result(
        "fio", *common, *options, "--output-format=json", f"--output={output}", "--group_reporting"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    text = output.read_text()
    [job] = json.loads(text[text.index("{") :])["jobs"]
    assert job["error"] == 0
    return {way: job[way]["total_ios"] for way in ("read", "write", "trim")}


@pytest.mark.parametrize("block_size", ["4k-4k", "512-64k"])
@pytest.mark.parametrize("depth", [1, 16])
def test_fio_verifies_what_it_wrote(
    block_size: str, depth: int, daemon: Daemon, tmp_path: Path
) -> None:
    counts = fio(
        daemon.uri("disk0"),
        tmp_path,
        *("--rw=randwrite", f"--bsrange={block_size}", f"--iodepth={depth}"),
        *("--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randseed=1"),
    )
    assert counts["write"] > 0
    assert counts["read"] > 0


def test_fio_on_several_connections(daemon: Daemon, tmp_path: Path) -> None:
    """Each connection has its own quarter of the disk and checks that nobody else wrote there."""
    quarter = DISK_SIZE // 4
    counts = fio(
        daemon.uri("disk0"),
        tmp_path,
        *("--rw=randwrite", "--bs=4k", "--iodepth=16", "--numjobs=4"),
        *(f"--size={quarter}", f"--offset_increment={quarter}"),
        *("--verify=crc32c", "--verify_fatal=1", "--do_verify=1"),
    )
    assert counts["write"] == DISK_SIZE // 4096


def test_fio_trims_and_flushes(daemon: Daemon, tmp_path: Path) -> None:
    counts = fio(
        daemon.uri("disk0"), tmp_path, "--rw=randtrim", "--bs=64k", "--iodepth=4", "--fsync=8"
    )
    assert counts["trim"] == DISK_SIZE // 65536
