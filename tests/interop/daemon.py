# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Running the daemon under test as its users do: a process, a command line and two sockets.

The program is ``nbdjobs daemon`` of this checkout. ``NBDJOBS_PROGRAM`` names another one with the
same command line: ``NBDJOBS_PROGRAM=qemu-storage-daemon make test`` runs the same tests against
the real qemu-storage-daemon, which tells a wrong test from a wrong product.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.interop.qmp_client import QmpClient
from tests.interop.tools import require

#: Seconds a daemon may take to start or to stop before the test gives it up.
PATIENCE_S = 60.0

#: Seconds between two looks at a daemon that is starting.
LOOK_EVERY_S = 0.01

#: What the log of a sound program never has, whatever its clients do.
DEFECTS = ("Traceback", "never awaited", "never retrieved", "was destroyed", "ResourceWarning")


def program() -> list[str]:
    """Return the command that starts the daemon under test, without options."""
    other = os.environ.get("NBDJOBS_PROGRAM")
    if other is None:
        return [sys.executable, "-W", "default", "-m", "nbdjobs", "daemon"]
    words = shlex.split(other)
    return [require(words[0]), *words[1:]]


def is_ours() -> bool:
    """Whether the daemon under test is nbdjobs, held to more than qemu-storage-daemon 7.2 does."""
    return "NBDJOBS_PROGRAM" not in os.environ


def left_behind(directory: Path) -> list[str]:
    """Return what an ended daemon left in its directory of sockets: nothing, if it is ours.

    qemu-storage-daemon 7.2 forgets to remove the NBD server's unix socket.
    """
    names = sorted(path.name for path in directory.iterdir())
    return names if is_ours() else [name for name in names if name != "nbd.sock"]


class Daemon:
    """A running daemon with a QMP session; a context manager that stops and checks it.

    Attributes:
        directory: Where its sockets are; empty before and after.
        nbd_socket: Where the NBD server of ``unix_server`` listens.
        qmp_socket: Where QMP is spoken.
        qmp: The session that the test uses.
    """

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self.nbd_socket = directory / "nbd.sock"
        self.qmp_socket = directory / "qmp.sock"
        # The monitor comes first: as options act in order, whatever fails later finds it there,
        # and must remove it.
        command = [
            *program(),
            *("--chardev", f"socket,id=qmp,path={self.qmp_socket},server=on,wait=off"),
            *("--monitor", "chardev=qmp"),
            *(option.replace("{nbd}", str(self.nbd_socket)) for option in options),
        ]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            self.qmp = self._first_session()
        except BaseException:
            self._kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self._kill()

    def uri(self, export: str = "") -> str:
        """Return the NBD URI of an export on the unix socket."""
        return f"nbd+unix:///{export}?socket={self.nbd_socket}"

    def stop(self) -> None:
        """End the daemon with ``quit`` and check that it left nothing behind.

        It may have ended already, by a test's own ``quit`` or signal.
        """
        if self.process.poll() is None:
            self.qmp.ask("quit")
        self.qmp.close()
        self.assert_ended_clean()

    def terminate(self) -> None:
        """End the daemon with SIGTERM, as a service manager does, and check likewise."""
        self.process.send_signal(signal.SIGTERM)
        self.assert_ended_clean()
        self.qmp.close()

    def assert_ended_clean(self) -> None:
        """Wait for the end: exit code 0, no sign of a defect in the log, no socket left."""
        try:
            _, complaints = self.process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._kill()
            raise
        assert self.process.returncode == 0, complaints
        assert left_behind(self.directory) == []
        assert not any(mark in complaints for mark in DEFECTS), complaints

    def _first_session(self) -> QmpClient:
        """Connect once the daemon listens; the greeting then says that it has started.

        Options are processed before the first QMP byte, so after the greeting every node and
        export of the command line is there.
        """
        for _ in range(round(PATIENCE_S / LOOK_EVERY_S)):
            try:
                return QmpClient.connect(self.qmp_socket)
            except (FileNotFoundError, ConnectionRefusedError):
                self._look_whether_it_lives()
        raise TimeoutError("the daemon does not listen for QMP")

    def _look_whether_it_lives(self) -> None:
        try:
            self.process.wait(LOOK_EVERY_S)
        except subprocess.TimeoutExpired:
            return
        _, complaints = self.process.communicate()
        raise AssertionError(f"exit code {self.process.returncode} at start: {complaints}")

    def _kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()
        if hasattr(self, "qmp"):
            self.qmp.close()


def unix_server() -> list[str]:
    """Return the options of an NBD server on the daemon's own unix socket."""
    return ["--nbd-server", "addr.type=unix,addr.path={nbd}"]


@dataclass(frozen=True)
class Disk:
    """A raw image on the file system, and the options that open and export it.

    Attributes:
        path: The file.
        name: Its node name and export name.
    """

    path: Path
    name: str = "disk0"

    def blockdev(self, **options: str) -> list[str]:
        """Return the options of its node, a raw node over a file node.

        Args:
            options: More options of the file node, ``_`` in a name standing for ``-``.
        """
        more = "".join(f",{name.replace('_', '-')}={value}" for name, value in options.items())
        file_node = f"driver=file,node-name={self.name}-file,filename={self.path}{more}"
        return [
            *("--blockdev", file_node),
            *(
                "--blockdev",
                f"driver=raw,node-name={self.name},file={self.name}-file{_flags(more)}",
            ),
        ]

    def export(self, *, writable: bool = True) -> list[str]:
        """Return the options of its NBD export; a server must come before them."""
        switch = "on" if writable else "off"
        return [
            "--export",
            f"type=nbd,id=export-{self.name},node-name={self.name},name={self.name},writable={switch}",
        ]

    def content(self, offset: int = 0, length: int = -1) -> bytes:
        """Return bytes of the file as the file system has them now; all of them by default."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)


def _flags(file_options: str) -> str:
    """Repeat on the raw node those options that every layer has to agree on."""
    shared = ("read-only", "discard", "detect-zeroes")
    return "".join(
        f",{option}" for option in file_options.split(",") if option.partition("=")[0] in shared
    )
