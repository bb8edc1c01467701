# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Unix socket, IPv4 and IPv6, and exports that come and go."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.interop.conftest import DISK_SIZE, Connect, StartDaemon
from tests.interop.daemon import Disk, unix_server
from tests.interop.tools import run, run_for_result


def free_port(host: str) -> int:
    """Return a port that nobody listens on at a local address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def has_ipv6() -> bool:
    try:
        free_port("::1")
    except OSError:
        return False
    return True


NEEDS_IPV6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=NEEDS_IPV6)])
def test_tcp(host: str, start_daemon: StartDaemon, disk: Disk, tmp_path: Path) -> None:
    port = free_port(host)
    server = ["--nbd-server", f"addr.type=inet,addr.host={host},addr.port={port}"]
    start_daemon(*disk.blockdev(), *server, *disk.export())
    address = f"[{host}]" if ":" in host else host
    uri = f"nbd://{address}:{port}/disk0"
    copy = tmp_path / "copy"
    run("nbdcopy", "-C", "4", uri, copy)
    assert copy.read_bytes() == disk.content()
    assert run("nbdinfo", "--size", uri) == f"{DISK_SIZE}\n"
    if ":" not in host:  # nbd-client 3.24 does not take an IPv6 address with a port
        assert "disk0" in run("nbd-client", "--list", host, str(port)).split()


def test_unix(start_daemon: StartDaemon, disk: Disk, tmp_path: Path) -> None:
    daemon = start_daemon(*disk.blockdev(), *unix_server(), *disk.export())
    copy = tmp_path / "copy"
    run("nbdcopy", "-C", "4", daemon.uri("disk0"), copy)
    assert copy.read_bytes() == disk.content()


def test_exports_come_and_go(start_daemon: StartDaemon, disk: Disk) -> None:
    daemon = start_daemon(*disk.blockdev())
    address = {"type": "unix", "data": {"path": str(daemon.nbd_socket)}}
    daemon.qmp.execute("nbd-server-start", {"addr": address})
    daemon.qmp.execute("block-export-add", {"type": "nbd", "id": "e", "node-name": "disk0"})
    assert run("nbdinfo", "--size", daemon.uri("disk0")) == f"{DISK_SIZE}\n"

    daemon.qmp.execute("block-export-del", {"id": "e"})
    daemon.qmp.wait_event("BLOCK_EXPORT_DELETED", lambda data: data == {"id": "e"})
    assert run_for_result("nbdinfo", "--size", daemon.uri("disk0")).returncode == 1

    daemon.qmp.execute("nbd-server-stop")
    assert run_for_result("nbdinfo", "--size", daemon.uri("disk0")).returncode == 1


def test_an_export_in_use_is_deleted_only_hard(
    start_daemon: StartDaemon, disk: Disk, connect: Connect
) -> None:
    daemon = start_daemon(*disk.blockdev(), *unix_server(), *disk.export())
    handle = connect(daemon)
    safe = {"id": "export-disk0", "mode": "safe"}
    refusal = daemon.qmp.ask("block-export-del", safe)["error"]
    assert refusal["class"] == "GenericError"
    assert refusal["desc"] == "export 'export-disk0' still in use"
    assert len(handle.pread(512, 0)) == 512

    daemon.qmp.execute("block-export-del", {"id": "export-disk0", "mode": "hard"})
    daemon.qmp.wait_event("BLOCK_EXPORT_DELETED")
    assert run_for_result("nbdinfo", daemon.uri("disk0")).returncode == 1


def test_the_limit_on_connections_is_kept(
    start_daemon: StartDaemon, disk: Disk, connect: Connect
) -> None:
    """One more waits for its turn instead of costing the others anything."""
    limited = [f"{option},max-connections=2" for option in unix_server()[1:]]
    daemon = start_daemon(*disk.blockdev(), "--nbd-server", *limited, *disk.export())
    first, second = connect(daemon), connect(daemon)
    with socket.socket(socket.AF_UNIX) as third:
        third.connect(str(daemon.nbd_socket))
        third.setblocking(False)
        for handle in (first, second):
            assert len(handle.pread(512, 0)) == 512
        with pytest.raises(BlockingIOError):
            third.recv(8)
        first.shutdown()
        third.setblocking(True)
        third.settimeout(60)
        assert third.recv(8) == b"NBDMAGIC"
