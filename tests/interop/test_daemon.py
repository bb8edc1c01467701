# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The daemon as a process: it starts, serves, and ends without leaving anything behind."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
from pathlib import Path

from tests.interop.conftest import DISK_SIZE, StartDaemon
from tests.interop.daemon import Daemon, Disk, left_behind, program, unix_server
from tests.interop.qmp_client import QmpClient
from tests.interop.tools import run, run_for_result


def test_it_ends_by_quit_and_leaves_nothing(daemon: Daemon) -> None:
    daemon.qmp.execute("quit")
    daemon.assert_ended_clean()


def test_it_ends_by_sigterm_and_leaves_nothing(daemon: Daemon) -> None:
    daemon.terminate()


def test_it_ends_while_clients_are_connected(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX) as silent_client:
        silent_client.connect(str(daemon.nbd_socket))
        assert silent_client.recv(8) == b"NBDMAGIC"
        daemon.stop()


def test_two_monitors_are_served_at_once(tmp_path: Path, start_daemon: StartDaemon) -> None:
    second = tmp_path / "second.sock"
    daemon = start_daemon(
        *("--chardev", f"socket,id=more,path={second},server=on,wait=off"),
        *("--monitor", "chardev=more"),
    )
    with QmpClient.connect(second) as session:
        assert session.execute("query-version") == daemon.qmp.execute("query-version")


def test_a_wrong_option_ends_it_with_one_sentence(tmp_path: Path) -> None:
    missing = tmp_path / "missing.img"
    options = ["--blockdev", f"driver=file,node-name=disk0,filename={missing}"]
    result = run_for_result(*program(), *options)
    assert result.returncode == 1
    assert result.stdout == ""
    assert str(missing) in result.stderr
    assert "No such file or directory" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_it_daemonizes_and_writes_its_pid(tmp_path: Path, disk: Disk) -> None:
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    nbd_socket = sockets / "nbd.sock"
    pid_file = sockets / "pid"
    server = [option.replace("{nbd}", str(nbd_socket)) for option in unix_server()]
    options = [*disk.blockdev(), *server, *disk.export(), "--pidfile", str(pid_file)]
    subprocess.run([*program(), *options, "--daemonize"], check=True, timeout=60)

    pid = int(pid_file.read_text())
    ended = os.pidfd_open(pid)
    try:
        uri = f"nbd+unix:///disk0?socket={nbd_socket}"
        assert run("nbdinfo", "--size", uri) == f"{DISK_SIZE}\n"
    finally:
        signal.pidfd_send_signal(ended, signal.SIGTERM)
        _wait_readable(ended)
        os.close(ended)
    assert left_behind(sockets) == []


def _wait_readable(descriptor: int) -> None:
    """Wait until the process behind a pidfd has ended."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    assert poll.poll(60_000)
