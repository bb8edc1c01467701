# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Real clients on exports that are stopped, continued, limited, and that meet I/O errors.

What only nbdjobs has: qemu-storage-daemon does none of this to the clients of its exports.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from tests.interop.conftest import DISK_SIZE, MIB, StartDaemon
from tests.interop.daemon import Daemon, Disk, is_ours, unix_server
from tests.interop.test_other_clients import fio
from tests.interop.tools import PATIENCE_S, require, run, start

pytestmark = pytest.mark.skipif(not is_ours(), reason="only nbdjobs holds the clients of exports")

EXPORT: Final = "export-disk0"
RATES: Final = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")

#: Looks at a daemon until something is so; each is a command to it and its answer.
LOOKS: Final = 100_000

VERIFIED: Final = ("--rw=randwrite", "--bs=4k", "--iodepth=16", "--randseed=1")
VERIFY: Final = ("--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0")


def limit(daemon: Daemon, export: str = EXPORT, **limits: object) -> None:
    arguments = {"id": export, **dict.fromkeys(RATES, 0), **limits}
    daemon.qmp.execute("block_set_io_throttle", arguments)


def stats(daemon: Daemon) -> dict[str, Any]:
    (device,) = daemon.qmp.execute("query-blockstats")
    found: dict[str, Any] = device["stats"]
    return found


def has_written(daemon: Daemon, requests: int) -> bool:
    return bool(stats(daemon)["wr_operations"] >= requests)


def connections(daemon: Daemon) -> int:
    (export,) = daemon.qmp.execute("query-block-exports")
    count: int = export["x-connections"]
    return count


def look_until(is_so: Callable[[], bool]) -> None:
    for _ in range(LOOKS):
        if is_so():
            return
    raise AssertionError("it never came to that")


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A client that goes on beside the test; it is killed if the test fails first."""
    with start(*command) as client:
        try:
            yield client
        finally:
            client.kill()


def ended_well(client: subprocess.Popen[str]) -> str:
    output, _ = client.communicate(timeout=PATIENCE_S)
    assert client.returncode == 0, output
    return output


def qemu_io(daemon: Daemon, *commands: str) -> list[str]:
    words = [word for each in commands for word in ("-c", each)]
    return ["qemu-io", "-f", "raw", *words, daemon.uri("disk0")]


def fio_job(daemon: Daemon, export: str, size: int) -> list[str]:
    where = ("--ioengine=nbd", f"--uri={daemon.uri(export)}", f"--size={size}")
    return ["fio", f"--name={export}", *where, *VERIFIED, *VERIFY]


def test_qemu_io_waits_while_stopped(daemon: Daemon, disk: Disk) -> None:
    before = disk.content()
    daemon.qmp.execute("stop")
    with running(*qemu_io(daemon, "write -P 0x5a 64k 64k", "flush", "read -P 0x5a 64k 64k")) as io:
        look_until(lambda: connections(daemon) == 1)
        assert daemon.qmp.execute("query-status")["status"] == "paused"
        assert stats(daemon)["wr_operations"] == 0
        assert disk.content() == before
        daemon.qmp.execute("cont")
        ended_well(io)
    assert disk.content(64 << 10, 64 << 10) == b"\x5a" * (64 << 10)


def test_fio_verifies_across_stops(daemon: Daemon, disk: Disk, tmp_path: Path) -> None:
    """The limit makes sure that fio is at work each time, and not through before the end."""
    limit(daemon, iops=800)
    with running(*fio_job(daemon, "disk0", DISK_SIZE)) as client:
        for round_ in range(1, 4):
            look_until(partial(has_written, daemon, round_ * 100))
            daemon.qmp.execute("stop")
            written, content = stats(daemon)["wr_operations"], disk.content()
            assert client.poll() is None
            assert stats(daemon)["wr_operations"] == written
            assert disk.content() == content
            daemon.qmp.execute("cont")
        limit(daemon)
        ended_well(client)
    assert stats(daemon)["failed_wr_operations"] == 0


def test_fio_verifies_what_it_wrote_within_limits(daemon: Daemon, tmp_path: Path) -> None:
    limit(
        daemon,
        bps_wr=16 * MIB,
        bps_wr_max=64 * MIB,
        iops_rd=4000,
        iops_rd_max=8000,
        iops_rd_max_length=2,
        iops_size=65536,
    )
    counts = fio(daemon.uri("disk0"), tmp_path, *VERIFIED, *VERIFY)
    assert counts["write"] == DISK_SIZE // 4096
    assert counts["read"] >= DISK_SIZE // 4096


def test_clients_of_two_exports_share_a_limit(
    start_daemon: StartDaemon, disk: Disk, tmp_path: Path
) -> None:
    other = Disk(tmp_path / "other.img", "disk1")
    with other.path.open("wb") as file:
        file.truncate(DISK_SIZE)
    options = (*disk.blockdev(), *other.blockdev(), *unix_server())
    daemon = start_daemon(*options, *disk.export(), *other.export())
    for export in (EXPORT, "export-disk1"):
        limit(daemon, export, iops=2000, iops_max=8000, group="both")
    with (
        running(*fio_job(daemon, "disk0", 2 * MIB)) as one,
        running(*fio_job(daemon, "disk1", 2 * MIB)) as two,
    ):
        ended_well(one)
        ended_well(two)
    shown = daemon.qmp.execute("query-block")
    assert [device["inserted"]["group"] for device in shown] == ["both", "both"]


def test_nbdcopy_reads_a_limited_export(daemon: Daemon, disk: Disk, tmp_path: Path) -> None:
    limit(daemon, bps=64 * MIB, bps_max=256 * MIB)
    copy = tmp_path / "copy.img"
    run("nbdcopy", daemon.uri("disk0"), copy)
    assert copy.read_bytes() == disk.content()


def test_a_client_that_is_killed_while_stopped_is_gone(daemon: Daemon, disk: Disk) -> None:
    before = disk.content()
    daemon.qmp.execute("stop")
    with running(*qemu_io(daemon, "write -P 0x5a 0 64k")) as io:
        look_until(lambda: connections(daemon) == 1)
        io.kill()
        look_until(lambda: connections(daemon) == 0)
    daemon.qmp.execute("block-export-del", {"id": EXPORT, "mode": "safe"})
    daemon.qmp.wait_event("BLOCK_EXPORT_DELETED")
    daemon.qmp.execute("cont")
    assert disk.content() == before


def test_a_stopped_daemon_ends_and_tells_its_clients(daemon: Daemon, disk: Disk) -> None:
    before = disk.content()
    daemon.qmp.execute("stop")
    with running(*qemu_io(daemon, "write -P 0x5a 0 64k")) as io:
        look_until(lambda: connections(daemon) == 1)
        daemon.terminate()
        output, _ = io.communicate(timeout=PATIENCE_S)
        assert io.returncode != 0, output
    assert disk.content() == before


# I/O errors


def failing(disk: Disk, error: int, policy: str) -> list[str]:
    """Options of an export whose first write fails once."""
    rule = f"inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno={error}"
    return [
        *("--blockdev", f"driver=file,node-name=f,filename={disk.path}"),
        *("--blockdev", f"driver=blkdebug,node-name=d,image=f,{rule},inject-error.0.once=on"),
        *unix_server(),
        *("--export", f"type=nbd,id={EXPORT},node-name=d,name=disk0,writable=on,{policy}"),
    ]


@pytest.mark.parametrize(
    ("error", "policy", "status"),
    [
        (28, "werror=enospc", "nospace"),
        (5, "werror=stop", "failed"),
        (28, "werror=auto", "nospace"),
    ],
)
def test_a_client_never_sees_an_error_that_stops(
    start_daemon: StartDaemon, disk: Disk, error: int, policy: str, status: str
) -> None:
    daemon = start_daemon(*failing(disk, error, policy))
    with running(*qemu_io(daemon, "write -P 0x5a 64k 64k", "flush", "read -P 0x5a 64k 64k")) as io:
        told = daemon.qmp.wait_event("BLOCK_IO_ERROR")["data"]
        assert (told["qom-path"], told["action"]) == (EXPORT, "stop")
        daemon.qmp.wait_event("STOP")
        assert daemon.qmp.execute("query-status")["status"] == "io-error"
        (device,) = daemon.qmp.execute("query-block")
        assert device["io-status"] == status
        daemon.qmp.execute("cont")
        daemon.qmp.wait_event("RESUME")
        ended_well(io)
    assert disk.content(64 << 10, 64 << 10) == b"\x5a" * (64 << 10)


@pytest.fixture
def small_storage(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB, seen through a process that alone has it mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    script = f"mount -t tmpfs -o size=2m tmpfs '{folder}' && echo ready && exec cat"
    command = [require("unshare"), "--map-root-user", "--mount", "sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        if owner.stdout.readline() != b"ready\n":
            pytest.skip("a file system of its own needs rights to mount")
        yield Path(f"/proc/{owner.pid}/root{folder}")
        owner.stdin.close()


def test_a_client_never_sees_that_the_storage_was_full(
    start_daemon: StartDaemon, small_storage: Path
) -> None:
    disk, filler = Disk(small_storage / "disk.img"), small_storage / "filler"
    filler.write_bytes(b"f" * (3 * MIB // 2))
    with disk.path.open("wb") as file:
        file.truncate(4 * MIB)
    daemon = start_daemon(
        *disk.blockdev(),
        *unix_server(),
        *("--export", f"type=nbd,id={EXPORT},node-name=disk0,writable=on,werror=enospc"),
    )
    with running(*qemu_io(daemon, "write -P 0x5a 0 1M", "flush", "read -P 0x5a 0 1M")) as io:
        assert daemon.qmp.wait_event("BLOCK_IO_ERROR")["data"]["nospace"]
        daemon.qmp.wait_event("STOP")
        daemon.qmp.execute("cont")
        daemon.qmp.wait_event("STOP")  # nothing has changed
        filler.unlink()
        daemon.qmp.execute("cont")
        ended_well(io)
    assert disk.content(0, MIB) == b"\x5a" * MIB
    daemon.stop()  # before the file system goes


@pytest.mark.parametrize(("error", "policy"), [(5, "werror=enospc"), (28, "werror=report")])
def test_a_client_is_told_of_an_error_that_is_reported(
    start_daemon: StartDaemon, disk: Disk, error: int, policy: str
) -> None:
    daemon = start_daemon(*failing(disk, error, policy))
    before = disk.content()
    output = run(*qemu_io(daemon, "write -P 0x5a 0 64k"), is_checked=False)
    assert "wrote" not in output
    assert daemon.qmp.wait_event("BLOCK_IO_ERROR")["data"]["action"] == "report"
    assert daemon.qmp.execute("query-status")["status"] == "running"
    assert disk.content() == before
