# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Backup jobs over QMP: how long a whole one takes, and what its clients feel meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import fio
from benchmarks.images import create_qcow2, format_of
from benchmarks.peers import Peer, Server, Transport, serving
from tests.interop.qmp_client import QmpClient

JOB: Final = "job0"
CLUSTER: Final = 64 << 10

#: So slow that the job outlasts the client's writes (bytes per second).
LIMITED_SPEED: Final = 64 << 20

#: In the worst case, writes go anywhere, and most are the first in their cluster.
WRITES_PER_CLUSTER: Final = 0.5

#: Otherwise the client works on this part of the disk, one in so many.
WORKING_SET: Final = 8

RANDOM_WRITES: Final = fio.Load("randwrite", 4 << 10, depth=16)


@dataclass(frozen=True, slots=True)
class Duration:
    """How long a backup took.

    Attributes:
        completed_s: Seconds from the command to ``BLOCK_JOB_COMPLETED``.
        stable_s: Seconds until the target is closed as well, hence on stable storage.
            nbdjobs has flushed it before it says completed; others do so when they close it.
    """

    completed_s: float
    stable_s: float


def duration(peer: Peer, source: Path, directory: Path, *, to_qcow2: bool = False) -> Duration:
    """Measure a full backup to a new image, raw or qcow2."""
    target = directory / ("target.qcow2" if to_qcow2 else "target.img")
    with _daemon(peer, source, directory) as (_, qmp), _target(qmp, source, target):
        began = time.perf_counter()
        _start(qmp, speed=0)
        completed = qmp.wait_event("BLOCK_JOB_COMPLETED")
        completed_s = time.perf_counter() - began
        while "error" in qmp.ask("blockdev-del", {"node-name": "target0"}):
            pass  # until the job has let go of it
        stable_s = time.perf_counter() - began
    if "error" in completed["data"]:
        raise BackupError(completed["data"]["error"])
    return Duration(completed_s, stable_s)


def writes_meanwhile(peer: Peer, source: Path, directory: Path, seconds: float) -> fio.Result:
    """Return what a client's random 4 KiB writes reach while a limited backup runs.

    The client writes in its working set, a part of the disk, over and over: at first most
    writes wait for the copy of their cluster, later fewer and fewer.
    """
    size = source.stat().st_size // WORKING_SET

    def load(uri: str) -> fio.Result:
        return fio.run_for(RANDOM_WRITES, uri, size, seconds, directory)

    return _during_a_backup(peer, source, directory, load)


def first_writes_meanwhile(peer: Peer, source: Path, directory: Path) -> fio.Result:
    """Return the same for the worst case: nearly every write is the first in its cluster."""
    size = source.stat().st_size
    requests = round(size / CLUSTER * WRITES_PER_CLUSTER)

    def load(uri: str) -> fio.Result:
        return fio.run_requests(RANDOM_WRITES, uri, size, requests, directory)

    return _during_a_backup(peer, source, directory, load)


def _during_a_backup(
    peer: Peer, source: Path, directory: Path, load: Callable[[str], fio.Result]
) -> fio.Result:
    target = directory / "target.img"
    with _daemon(peer, source, directory) as (server, qmp), _target(qmp, source, target):
        _start(qmp, speed=LIMITED_SPEED)
        result = load(server.address.uri)
        running = [job["status"] for job in qmp.execute("query-jobs")]
        if running != ["running"]:
            raise BackupError(f"the backup did not outlast the writes: {running}")
        qmp.execute("block-job-cancel", {"device": JOB})
        qmp.wait_event("BLOCK_JOB_CANCELLED")
    return result


@contextmanager
def _daemon(peer: Peer, source: Path, directory: Path) -> Iterator[tuple[Server, QmpClient]]:
    path = directory / "qmp.sock"
    chardev = f"socket,id=qmp,path={path},server=on,wait=off"
    monitor = ("--chardev", chardev, "--monitor", "chardev=qmp")
    with (
        serving(peer, source, Transport.UNIX, directory, *monitor) as server,
        QmpClient.connect(path) as qmp,
    ):
        yield server, qmp


@contextmanager
def _target(qmp: QmpClient, source: Path, path: Path) -> Iterator[None]:
    """Add a new, empty target, and remove its file afterwards."""
    size = source.stat().st_size
    _warm_memory(path, source.stat().st_blocks * 512)
    if format_of(path) == "qcow2":
        create_qcow2(path, size)
    else:
        with path.open("wb") as file:
            file.truncate(size)
    file_node = {"driver": "file", "filename": str(path), "discard": "unmap"}
    own = {"driver": format_of(path), "node-name": "target0", "discard": "unmap"}
    try:
        qmp.execute("blockdev-add", {**own, "file": file_node})
        yield
    finally:
        os.unlink(path)


def _warm_memory(path: Path, size: int) -> None:
    """Use as much page cache as the target will need, and give it back.

    In a virtual machine, memory that has not been used lately first has to be had from the
    host, which takes far longer than the copy, and would hit whoever happens to come first.
    """
    piece = os.urandom(1 << 20)
    with path.open("wb", buffering=0) as file:
        for _ in range(0, size, len(piece)):
            file.write(piece)
    os.unlink(path)
    os.sync()


def _start(qmp: QmpClient, speed: int) -> None:
    """Start the job. Target and source are new or settled, so nothing else is going on."""
    job = {"job-id": JOB, "device": "disk0", "target": "target0", "sync": "full"}
    qmp.execute("blockdev-backup", {**job, "speed": speed})


class BackupError(Exception):
    """The job failed or ended too early to measure."""
