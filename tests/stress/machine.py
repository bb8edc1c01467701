# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A daemon with a disk, writers on it, and backups to targets, steered over QMP."""

from __future__ import annotations

import random
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from tests.interop.daemon import PATIENCE_S, Daemon, Disk, unix_server
from tests.interop.qmp_client import QmpError
from tests.interop.tools import require_libnbd
from tests.stress.plots import check_point_in_time, cut
from tests.stress.writers import Crowd

KIB = 1024

#: Not a multiple of the backup's clusters, but of what direct I/O asks for.
DISK_SIZE = 3072 * KIB + 4096

LONGEST_PLOT = 200 * KIB
WRITERS = 4

#: So slow that only guests' writes move the backup on (bytes per second).
HELD_BACK = 1

#: Those that the test under way has started.
RUNNING: list[Machine] = []


@dataclass(frozen=True)
class Backup:
    """A backup that was started.

    Attributes:
        job: Its id.
        path: The target's file.
        begin: When the command was sent.
        end: When the reply had come: the point in time lies between.
    """

    job: str
    path: Path
    begin: float
    end: float


class Machine:
    """All that a stress test needs.

    Attributes:
        daemon: The process.
        disk: Its disk.
        plots: What is known of the disk's content.
    """

    def __init__(self, directory: Path, random_: random.Random, *, is_direct: bool = False):
        """Start the daemon.

        Args:
            directory: For images and sockets.
            random_: Decides everything that is left to chance.
            is_direct: Pass the page cache by: all requests wait for the storage, and small ones
                read, change and write back blocks that they share with others.
        """
        self.random = random_
        self._options = {"discard": "unmap"}
        if is_direct:
            self._options["cache.direct"] = "on"
        self._nbd = require_libnbd()
        self._directory = directory
        (directory / "run").mkdir()
        self.disk = Disk(directory / "disk.img")
        content = random_.randbytes(DISK_SIZE // 2) + bytes(DISK_SIZE - DISK_SIZE // 2)
        self.disk.path.write_bytes(content)
        self.plots = cut(content, random_, longest=LONGEST_PLOT)
        self._crowds: list[Crowd] = []
        self.daemon = self._start_daemon()
        RUNNING.append(self)

    def _start_daemon(self) -> Daemon:
        options = (*self.disk.blockdev(**self._options), *unix_server(), *self.disk.export())
        return Daemon(self._directory / "run", *options)

    def crowd(self) -> Crowd:
        """Writers on the disk, not yet started."""
        crowd = Crowd(self._nbd, self.daemon.uri("disk0"), self.plots, self.random, WRITERS)
        self._crowds.append(crowd)
        return crowd

    def node_names(self) -> list[str]:
        """All nodes."""
        nodes = self.daemon.qmp.execute("query-named-block-nodes")
        return sorted(node["node-name"] for node in nodes)

    # Backups

    def start_backup(self, job: str, **options: Any) -> Backup:
        """Back up to a file full of something else."""
        path = self._directory / f"{job}.img"
        path.write_bytes(self.random.randbytes(DISK_SIZE))
        qmp = self.daemon.qmp
        qmp.execute("blockdev-add", {"driver": "file", "node-name": job, "filename": str(path)})
        arguments = {
            "job-id": job, "device": "disk0", "target": job, "sync": "full", "auto-dismiss": False,
        }  # fmt: skip
        begin = monotonic()
        qmp.execute("blockdev-backup", {**arguments, **options})
        return Backup(job, path, begin, monotonic())

    def steer(self, backup: Backup) -> bool:
        """Do something to a running backup; whether it was told to end without effect."""
        device = {"device": backup.job}
        deed = self.random.choice(("pause", "resume", "speed", "speed", "cancel"))
        try:
            match deed:
                case "speed":
                    speed = self.random.choice((HELD_BACK, 64 * KIB, 4096 * KIB, 0))
                    self.daemon.qmp.execute("block-job-set-speed", {**device, "speed": speed})
                case "cancel":
                    self.daemon.qmp.execute("block-job-cancel", {**device, "force": True})
                    return True
                case _:
                    self.daemon.qmp.execute(f"block-job-{deed}", device)
        except QmpError:
            pass  # it is paused, or not, or over
        return False

    def end_backup(self, backup: Backup) -> str | None:
        """Let it run to its end and take it away; the answer is its error."""
        qmp = self.daemon.qmp
        for command in (
            ("block-job-resume", {"device": backup.job}),
            ("block-job-set-speed", {"device": backup.job, "speed": 0}),
        ):
            with suppress(QmpError):
                qmp.execute(*command)
        qmp.wait_job_status(backup.job, "concluded")
        (job,) = (job for job in qmp.execute("query-jobs") if job["id"] == backup.job)
        qmp.execute("job-dismiss", {"id": backup.job})
        qmp.execute("blockdev-del", {"node-name": backup.job})
        error: str | None = job.get("error")
        return error

    def check_backup(self, backup: Backup) -> None:
        """Check that a completed backup is the disk at its instant."""
        check_point_in_time(self.plots, backup.path.read_bytes(), backup.begin, backup.end)

    def check_disk(self) -> None:
        """Check that the disk holds what was acknowledged."""
        content = self.disk.content()
        for plot in self.plots:
            plot.check_after_crash(content[plot.offset : plot.offset + len(plot.content)])

    # Ends

    def abandon(self) -> None:
        """Leave nothing running, whatever a failed test has left: writers would go on for ever."""
        if self.daemon.process.poll() is None:
            self.crash()
        for crowd in self._crowds:
            crowd.join()

    def crash(self) -> None:
        """Kill the daemon, as the kernel does when memory is short."""
        self.daemon.process.send_signal(signal.SIGKILL)
        self.daemon.process.communicate(timeout=PATIENCE_S)
        self.daemon.qmp.close()

    def start_again(self) -> None:
        """Start the daemon in the same place, and take the disk as it is now."""
        self.daemon = self._start_daemon()
        self.plots = cut(self.disk.content(), self.random, longest=LONGEST_PLOT)
