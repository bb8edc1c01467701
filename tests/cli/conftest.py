# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A running daemon for the operator's commands: ours, and the real qemu-storage-daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdjobs.cli.main import main
from tests.interop.daemon import Daemon, Disk, unix_server
from tests.interop.tools import require

SIZE = 4 << 20

#: So slow, in bytes per second, that a job never ends by itself.
CRAWL = 1


class Operated:
    """A daemon with the exported disk `disk0`, and the command line pointed at it.

    qemu-storage-daemon talks to one client per socket, and the test itself has the first one.
    """

    def __init__(self, daemon: Daemon, disk: Disk, socket: Path, *, is_ours: bool):
        self.daemon = daemon
        self.disk = disk
        self.socket = socket
        self.is_ours = is_ours

    def run(self, subcommand: str, *words: str) -> int:
        """Run a subcommand."""
        return main([subcommand, *words, "--qmp", str(self.socket)])

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a QMP command from the test's own session."""
        return self.daemon.qmp.execute(command, arguments)

    def wait_status(self, status: str) -> None:
        """Wait until the job `j` says that it has this status."""
        self.daemon.qmp.wait_job_status("j", status)

    def start_job(self, *, speed: int = CRAWL, **options: object) -> None:
        """Start the job `j`, which backs `disk0` up to nowhere."""
        target = {"driver": "null-co", "node-name": "nowhere", "size": SIZE}
        self.execute("blockdev-add", target)
        self.execute(
            "blockdev-backup",
            {
                "job-id": "j",
                "device": "disk0",
                "target": "nowhere",
                "sync": "full",
                "speed": speed,
                **{name.replace("_", "-"): value for name, value in options.items()},
            },
        )

    def job(self) -> dict[str, Any]:
        """The job `j` as the daemon shows it."""
        [found] = self.execute("query-block-jobs")
        assert isinstance(found, dict)
        return found


@pytest.fixture(params=["nbdjobs", pytest.param("qemu-storage-daemon", marks=pytest.mark.interop)])
def operated(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Operated]:
    """Run each test against both programs."""
    if request.param != "nbdjobs":
        monkeypatch.setenv("NBDJOBS_PROGRAM", require(request.param))
    disk = Disk(tmp_path / "disk.img")
    with disk.path.open("wb") as file:
        file.truncate(SIZE)
        file.write(bytes([7]) * (SIZE // 2))
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    options = (
        *disk.blockdev(),
        *unix_server(),
        *disk.export(),
        *("--chardev", f"socket,id=cli,path={sockets / 'cli.sock'},server=on,wait=off"),
        *("--monitor", "chardev=cli"),
    )
    with Daemon(sockets, *options) as daemon:
        is_ours = request.param == "nbdjobs"
        yield Operated(daemon, disk, sockets / "cli.sock", is_ours=is_ours)
