# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the interop tests: a disk, a daemon that serves it, libnbd's handle.

Every test in this folder is marked ``interop`` and talks to the daemon from outside, through its
command line and sockets. ``coverage.py`` beside this file tells which test covers which NBD
option, command and flag. ``daemon.py`` tells how to run all of them against another program.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.interop.daemon import Daemon, Disk, unix_server
from tests.interop.tools import require_libnbd

MIB = 1 << 20

#: Size of the test disk: data, a hole, data, a hole, in equal parts.
DISK_SIZE = 8 * MIB
PART = DISK_SIZE // 4

StartDaemon = Callable[..., Daemon]
Connect = Callable[..., Any]

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.interop)


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[StartDaemon]:
    """A function that starts a daemon with options; each is stopped and checked at the end."""
    with ExitStack() as running:
        count = 0

        def start(*options: str) -> Daemon:
            nonlocal count
            count += 1
            directory = tmp_path / f"daemon{count}"
            directory.mkdir()
            return running.enter_context(Daemon(directory, *options))

        yield start


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """A sparse disk image: random data, a hole, random data, a hole."""
    path = tmp_path / "disk.img"
    data = random.Random(0).randbytes(PART)
    with path.open("wb") as file:
        file.truncate(DISK_SIZE)
        file.write(data)
        file.seek(2 * PART)
        file.write(data)
    return Disk(path)


@pytest.fixture
def daemon(start_daemon: StartDaemon, disk: Disk) -> Daemon:
    """A daemon with the disk as a writable export ``disk0``, discards reaching the file."""
    return start_daemon(*disk.blockdev(discard="unmap"), *unix_server(), *disk.export())


@pytest.fixture
def read_only_daemon(start_daemon: StartDaemon, disk: Disk) -> Daemon:
    """A daemon with the disk as a read-only export ``disk0``."""
    options = (*disk.blockdev(read_only="on"), *unix_server(), *disk.export(writable=False))
    return start_daemon(*options)


@pytest.fixture
def nbd() -> Any:
    """libnbd's module."""
    return require_libnbd()


@pytest.fixture
def connect(nbd: Any) -> Iterator[Connect]:
    """A function that connects a libnbd handle to an export of a daemon.

    ``prepare`` gets the handle before it connects, and may set what is negotiated. Handles still
    connected at the end say goodbye.
    """
    handles: list[Any] = []

    def connect(
        daemon: Daemon, export: str = "disk0", prepare: Callable[[Any], object] | None = None
    ) -> Any:
        handle = nbd.NBD()
        handles.append(handle)
        handle.set_export_name(export)
        if prepare is not None:
            prepare(handle)
        handle.connect_unix(str(daemon.nbd_socket))
        return handle

    yield connect
    for handle in handles:
        if handle.aio_is_ready():
            handle.shutdown()
