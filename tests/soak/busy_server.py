# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A server on which everything happens at once, round after round, and what each round leaves.

A round adds disks, lets clients write them, does whatever chance says to them meanwhile, and
takes everything away again. Then all data has to be right, and the process has to be what it was:
no node, export, job, thread, descriptor or lock more than before, and no more memory.
"""

from __future__ import annotations

import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Final, Self

from tests.hardening.raw import READ, RawClient
from tests.interop.daemon import Daemon, unix_server
from tests.interop.qmp_client import QmpError
from tests.interop.tools import require_libnbd
from tests.stress.plots import Plot, check_point_in_time, cut
from tests.stress.test_leaks import count_threads, open_files, wait_until_settled
from tests.stress.writers import Crowd

KIB: Final = 1024

#: Not a multiple of the backup's clusters, but of what direct I/O asks for.
DISK_SIZE: Final = 1024 * KIB + 4096
LONGEST_PLOT: Final = 64 * KIB

DISKS: Final = 2
WRITERS: Final = 2
DEEDS: Final = 12

#: Rounds after which memory is as large as it gets, and what it may grow by afterwards.
WARM_UP: Final = 5
MAX_GROWTH: Final = 24 << 20


@dataclass
class Backup:
    """A backup that was started.

    Attributes:
        job: Its id, and the name of its target.
        path: The target's file.
        begin: When the command was sent.
        end: When the reply had come: the point in time lies between.
        may_fail: It was told to end, or its target fails.
    """

    job: str
    path: Path
    begin: float
    end: float
    may_fail: bool = False


@dataclass
class Disk:
    """A disk, what is known of its content, and what goes on with it."""

    name: str
    path: Path
    plots: list[Plot]
    crowd: Crowd
    backups: list[Backup] = field(default_factory=list)


class BusyServer:
    """The daemon, and what is done to it; a context manager that ends and checks it.

    Attributes:
        deeds: How often what was done.
        refused: How often what was refused, for a good reason.
        rounds: Rounds completed.
    """

    def __init__(self, directory: Path, seed: int):
        self.deeds: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.rounds = 0
        self._nbd = require_libnbd()
        self._random = random.Random(seed)
        self._directory = directory
        (directory / "run").mkdir()
        self.daemon = Daemon(directory / "run", *unix_server())
        self._qmp = self.daemon.qmp
        self._number = 0
        self._before: list[str] = []
        self._memory_before = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.daemon.__exit__(kind, error, traceback)

    @property
    def memory(self) -> int:
        """Bytes of memory that the process has now."""
        status = Path(f"/proc/{self.daemon.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * KIB

    def round(self) -> None:
        """Let disks come, be used and go; raises AssertionError when anything is wrong then."""
        if not self._before:
            self._before = open_files(self.daemon)
        disks = [self._add_disk() for _ in range(DISKS)]
        for disk in disks:
            disk.crowd.start()
        for _ in range(DEEDS):
            disk = self._random.choice(disks)
            disk.crowd.let_write(self._random.randrange(20))
            self._do(self._random.choice(DEED_NAMES), disk)
        for disk in disks:
            self._remove_disk(disk)
        self._check_nothing_is_left()
        self.rounds += 1

    def _do(self, name: str, disk: Disk) -> None:
        try:
            getattr(self, name)(disk)
        except QmpError as error:
            if name not in OF_JOBS or not error.description.startswith(REFUSALS):
                raise
            self.refused[name] += 1
        else:
            self.deeds[name] += 1

    def _new(self, kind: str) -> str:
        self._number += 1
        return f"{kind}{self._number}"

    # Disks come and go

    def _add_disk(self) -> Disk:
        name = self._new("disk")
        path = self._directory / f"{name}.img"
        content = self._random.randbytes(DISK_SIZE // 2) + bytes(DISK_SIZE - DISK_SIZE // 2)
        path.write_bytes(content)
        limits = {"qom-type": "throttle-group", "id": f"{name}-limits", "limits": {}}
        self._qmp.execute("object-add", limits)
        self._qmp.execute("blockdev-add", self._file_options(name, path))
        throttle = {
            "driver": "throttle",
            "node-name": name,
            "throttle-group": f"{name}-limits",
            "file": f"{name}-file",
            "discard": "unmap",
        }
        self._qmp.execute("blockdev-add", throttle)
        self._add_export(name, name, writable=True)
        plots = cut(content, self._random, longest=LONGEST_PLOT)
        crowd = Crowd(self._nbd, self.daemon.uri(name), plots, self._random, WRITERS)
        return Disk(name, path, plots, crowd)

    def _file_options(self, name: str, path: Path, *, is_direct: bool = False) -> dict[str, Any]:
        return {
            "driver": "file",
            "node-name": f"{name}-file",
            "filename": str(path),
            "discard": "unmap",
            "cache": {"direct": is_direct},
        }

    def _add_export(self, export: str, node: str, *, writable: bool) -> None:
        options = {"type": "nbd", "id": export, "node-name": node, "name": export}
        self._qmp.execute("block-export-add", {**options, "writable": writable})

    def _remove_disk(self, disk: Disk) -> None:
        self._qmp.execute("cont")
        disk.crowd.finish()
        self._set_limits(disk, {})
        for backup in disk.backups:
            self._end_backup(disk, backup)
        self._remove_export(disk.name)
        self._qmp.execute("blockdev-del", {"node-name": disk.name})
        self._qmp.execute("blockdev-del", {"node-name": f"{disk.name}-file"})
        self._qmp.execute("object-del", {"id": f"{disk.name}-limits"})
        content = disk.path.read_bytes()
        for plot in disk.plots:
            plot.check_after_crash(content[plot.offset : plot.offset + len(plot.content)])
        disk.path.unlink()

    def _remove_export(self, export: str) -> None:
        self._qmp.execute("block-export-del", {"id": export, "mode": "hard"})
        self._qmp.wait_event("BLOCK_EXPORT_DELETED", lambda data: data["id"] == export)

    # What is done to a disk in use

    def back_up(self, disk: Disk) -> None:
        """Start a backup to a file full of something else."""
        self._start_backup(disk, may_fail=False)

    def back_up_to_a_failing_target(self, disk: Disk) -> None:
        """Start one whose target fails at its last step, of which clients notice nothing."""
        self._start_backup(disk, may_fail=True)

    def _start_backup(self, disk: Disk, *, may_fail: bool) -> None:
        job = self._new("backup")
        path = self._directory / f"{job}.img"
        path.write_bytes(self._random.randbytes(DISK_SIZE))
        image = {"driver": "file", "filename": str(path)}
        target: dict[str, Any] = {**image, "node-name": job}
        if may_fail:
            rule = {"event": "none", "iotype": "flush"}
            target = {"driver": "blkdebug", "node-name": job, "image": image}
            target["inject-error"] = [rule]
        self._qmp.execute("blockdev-add", target)
        options = {
            "job-id": job,
            "device": disk.name,
            "target": job,
            "sync": "full",
            "auto-dismiss": False,
            "speed": self._random.choice((1, 256 * KIB, 4096 * KIB, 0)),
            "x-perf": {"use-copy-range": self._random.random() < 0.5},
        }
        begin = monotonic()
        try:
            self._qmp.execute("blockdev-backup", options)
        except QmpError:
            self._qmp.execute("blockdev-del", {"node-name": job})
            path.unlink()
            raise
        disk.backups.append(Backup(job, path, begin, monotonic(), may_fail))

    def pause(self, disk: Disk) -> None:
        """Pause a job."""
        self._steer(disk, "job-pause", id=None)

    def resume(self, disk: Disk) -> None:
        """Resume one."""
        self._steer(disk, "job-resume", id=None)

    def cancel(self, disk: Disk) -> None:
        """Cancel one."""
        for backup in self._steer(disk, "job-cancel", id=None):
            backup.may_fail = True

    def change_speed(self, disk: Disk) -> None:
        """Let one go faster or slower."""
        speed = self._random.choice((1, 64 * KIB, 4096 * KIB, 0))
        self._steer(disk, "block-job-set-speed", device=None, speed=speed)

    def _steer(self, disk: Disk, command: str, **arguments: object) -> list[Backup]:
        """Do something to one of the jobs, which stands for the argument that is None."""
        chosen = self._random.sample(disk.backups, min(len(disk.backups), 1))
        for backup in chosen:
            named = {k: backup.job if v is None else v for k, v in arguments.items()}
            self._qmp.execute(command, named)
        return chosen

    def _end_backup(self, disk: Disk, backup: Backup) -> None:
        """Let it run to its end, check what it made, and take it away."""
        for command in (
            ("job-resume", {"id": backup.job}),
            ("block-job-set-speed", {"device": backup.job, "speed": 0}),
        ):
            with suppress(QmpError):
                self._qmp.execute(*command)
        self._qmp.wait_job_status(backup.job, "concluded")
        (job,) = (job for job in self._qmp.execute("query-jobs") if job["id"] == backup.job)
        self._qmp.execute("job-dismiss", {"id": backup.job})
        self._qmp.execute("blockdev-del", {"node-name": backup.job})
        if "error" in job:
            assert backup.may_fail, job
        else:
            check_point_in_time(disk.plots, backup.path.read_bytes(), backup.begin, backup.end)
            self.deeds["a backup was exact"] += 1
        backup.path.unlink()

    def throttle(self, disk: Disk) -> None:
        """Change the limits."""
        choices: tuple[dict[str, int], ...] = (
            {},
            {"iops-total": 2000},
            {"bps-write": 8192 * KIB, "bps-write-max": 65536 * KIB},
        )
        self._set_limits(disk, self._random.choice(choices))

    def _set_limits(self, disk: Disk, limits: dict[str, int]) -> None:
        path = {"path": f"/objects/{disk.name}-limits", "property": "limits"}
        self._qmp.execute("qom-set", {**path, "value": limits})

    def stop_and_cont(self, disk: Disk) -> None:
        """Hold all clients back for a while."""
        self._qmp.execute("stop")
        assert not self._qmp.execute("query-status")["running"]
        self._qmp.execute("cont")

    def reopen(self, disk: Disk) -> None:
        """Go on past the page cache, or through it, while clients write."""
        is_direct = self._random.random() < 0.5
        options = self._file_options(disk.name, disk.path, is_direct=is_direct)
        self._qmp.execute("blockdev-reopen", {"options": [options]})

    def resize(self, disk: Disk) -> None:
        """Grow and shrink another node; that of an export must keep its size."""
        name = self._new("scratch")
        path = self._directory / f"{name}.img"
        path.write_bytes(b"\x11" * 64 * KIB)
        file = {"driver": "file", "node-name": name, "filename": str(path)}
        self._qmp.execute("blockdev-add", file)
        for size in (128 * KIB, 512, 0, 4096 * KIB):
            self._qmp.execute("block_resize", {"node-name": name, "size": size})
            assert path.stat().st_size == size
        self._qmp.execute("blockdev-del", {"node-name": name})
        path.unlink()

    def serve_and_cut_off(self, disk: Disk) -> None:
        """Another export of the same node goes while its clients read."""
        export = self._new("extra")
        self._add_export(export, disk.name, writable=False)
        with self._client(export) as one, self._client(export) as other:
            for client in (one, other):
                client.socket.sendall(b"")
                for _ in range(50):
                    client.send(READ, 0, DISK_SIZE // 2)
            self._remove_export(export)
            assert other.is_closed_by_server()

    def come_and_go(self, disk: Disk) -> None:
        """Clients leave in the middle of whatever they do."""
        for sent in (b"", b"\0\0\0\3", b"\0\0\0\3IHAVEOPT\0\0\0\3"):
            with RawClient(str(self.daemon.nbd_socket)) as client:
                client.socket.sendall(sent)
        with self._client(disk.name) as client:
            for _ in range(20):
                client.send(READ, 0, 64 * KIB)
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(self.daemon.qmp_socket))
            monitor.sendall(b'{"execute": "qmp_capabilities"}{"execute": "query-jo')

    @contextmanager
    def _client(self, export: str) -> Iterator[RawClient]:
        with RawClient(str(self.daemon.nbd_socket)) as client:
            client.attach(export)
            yield client

    # What is left

    def _check_nothing_is_left(self) -> None:
        for query in ("query-named-block-nodes", "query-block-exports", "query-jobs"):
            assert self._qmp.execute(query) == [], query
        self._settle(lambda: count_threads(self.daemon) == 1)
        self._settle(lambda: open_files(self.daemon) == self._before)
        locks = Path("/proc/locks").read_text().split()
        assert str(self.daemon.process.pid) not in locks
        left = [path.name for path in self._directory.iterdir()]
        assert left == ["run"], left
        self._qmp.events.clear()
        if self.rounds == WARM_UP:
            self._memory_before = self.memory
        grown = self.memory - self._memory_before
        assert self.rounds < WARM_UP or grown <= MAX_GROWTH, f"{grown >> 20} MiB more memory"

    def _settle(self, is_settled: Callable[[], bool]) -> None:
        wait_until_settled(self.daemon, is_settled)


#: Deeds that a job may refuse, and how: it is paused already, or not, or about to end.
OF_JOBS: Final = ("pause", "resume", "cancel", "change_speed")
REFUSALS: Final = ("Job ", "Can't resume a job that was not paused")

DEED_NAMES: Final = (
    "back_up",
    "back_up_to_a_failing_target",
    "pause",
    "resume",
    "cancel",
    "change_speed",
    "throttle",
    "stop_and_cont",
    "reopen",
    "resize",
    "serve_and_cut_off",
    "come_and_go",
)
