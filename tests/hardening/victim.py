# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A daemon to be mistreated, and what it costs: memory, descriptors, and whether it serves."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.hardening.raw import READ, WRITE, RawClient
from tests.interop.daemon import Daemon

KIB = 1024
MIB = 1024 * KIB

#: Of the disk `big`, which holds nothing; of the disk `file`, which is one.
BIG = 1024 * MIB
FILE = 4 * MIB

#: Clients at a time.
MAX_CONNECTIONS = 250

#: What memory may grow by for reasons that have nothing to do with the test.
SLACK = 16 * MIB

#: Answers of the daemon after which it has done what it is going to do.
ROUND_TRIPS = 50


class Victim:
    """A daemon with the exports `big` and `file`; a context manager that checks its end.

    Attributes:
        daemon: The process.
        content: What the disk `file` holds at first.
    """

    def __init__(self, directory: Path):
        (directory / "run").mkdir()
        self.content = bytes(range(256)) * (FILE // 256)
        image = directory / "file.img"
        image.write_bytes(self.content)
        self.daemon = Daemon(
            directory / "run",
            *("--blockdev", f"driver=null-co,node-name=big,size={BIG},read-zeroes=on"),
            *("--blockdev", f"driver=file,node-name=file,filename={image}"),
            *(
                "--nbd-server",
                f"addr.type=unix,addr.path={{nbd}},max-connections={MAX_CONNECTIONS}",
            ),
            *("--export", "type=nbd,id=big,node-name=big,writable=on"),
            *("--export", "type=nbd,id=file,node-name=file,writable=on"),
        )

    def __enter__(self) -> Self:
        self.check_service()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.daemon.__exit__(kind, error, traceback)

    def connect(self) -> RawClient:
        """A client that has said nothing yet."""
        return RawClient(str(self.daemon.nbd_socket))

    def attach(self, export: str = "big") -> RawClient:
        """A client in the transmission phase."""
        client = self.connect()
        client.attach(export)
        return client

    def monitor(self) -> socket.socket:
        """A QMP session that has said nothing yet."""
        monitor = socket.socket(socket.AF_UNIX)
        monitor.settimeout(60)
        monitor.connect(str(self.daemon.qmp_socket))
        return monitor

    def check_service(self) -> None:
        """The next client is served, over NBD and QMP."""
        with self.attach("file") as client:
            client.send(WRITE, 4096, payload=self.content[4096:8192], cookie=1)
            assert client.reply() == (1, 0)
            client.send(READ, 0, FILE, cookie=2)
            assert client.reply() == (2, 0)
            assert client.receive(FILE) == self.content
        assert len(self.daemon.qmp.execute("query-block-exports")) == 2

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """All requests of clients wait, as for a disk that hangs."""
        self.daemon.qmp.execute("stop")
        try:
            yield
        finally:
            self.daemon.qmp.execute("cont")

    def _memory(self, kind: str) -> int:
        """Bytes of memory that the process has now (VmRSS), or had at most (VmHWM)."""
        status = Path(f"/proc/{self.daemon.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith(f"{kind}:"))
        return int(line.split()[1]) * KIB

    @property
    def descriptors(self) -> int:
        """Open files and sockets."""
        return len(list(Path(f"/proc/{self.daemon.process.pid}/fd").iterdir()))

    @contextmanager
    def may_grow_by(self, limit: int) -> Iterator[None]:
        """Check what memory grows by at most, until the daemon has done what it is going to do."""
        # Forgets the most there ever was (proc(5), clear_refs).
        Path(f"/proc/{self.daemon.process.pid}/clear_refs").write_text("5")
        before = self._memory("VmRSS")
        yield
        self.let_it_work()
        grown = self._memory("VmHWM") - before
        assert grown <= limit, f"{grown >> 20} MiB more, {limit >> 20} allowed"

    def let_it_work(self) -> None:
        """Give it turns."""
        for _ in range(ROUND_TRIPS):
            self.daemon.qmp.execute("query-status")

    def wait_until(self, is_reached: Callable[[], bool]) -> None:
        """Give it turns until something has come about."""
        for _ in range(100):
            self.let_it_work()
            if is_reached():
                return
        raise AssertionError("it does not come about")

    def push(self, client: RawClient, data: bytes) -> int:
        """Send as much of the data as the daemon ever takes; returns how much that was."""
        sent = 0
        view = memoryview(data)
        client.socket.setblocking(False)
        while sent < len(data):
            try:
                sent += client.socket.send(view[sent:])
            except BlockingIOError:
                self.let_it_work()
                try:
                    sent += client.socket.send(view[sent:])
                except BlockingIOError:
                    break
        client.socket.settimeout(60)
        return sent
