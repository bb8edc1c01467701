# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The servers that are compared: how each is started on an image, and how it is reached."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.images import format_of

EXPORT: Final = "disk0"
LOCALHOST: Final = "127.0.0.1"

#: As many clients as the memory rows connect.
MAX_CONNECTIONS: Final = 100

#: Seconds a server may take until it greets a client, and between two attempts.
PATIENCE_S: Final = 30.0
ATTEMPT_EVERY_S: Final = 0.02


class Transport(StrEnum):
    """What clients reach the server over."""

    UNIX = "unix"
    TCP = "TCP"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens.

    Attributes:
        unix: The socket's path, or None for TCP on the loopback interface.
        port: The TCP port; 0 for a unix socket.
    """

    unix: Path | None = None
    port: int = 0

    @classmethod
    def new(cls, transport: Transport, directory: Path) -> Address:
        """Return an address that nobody listens at yet."""
        if transport is Transport.UNIX:
            return cls(unix=directory / "nbd.sock")
        with socket.socket() as probe:
            probe.bind((LOCALHOST, 0))
            return cls(port=probe.getsockname()[1])

    @property
    def uri(self) -> str:
        if self.unix is not None:
            return f"nbd+unix:///{EXPORT}?socket={self.unix}"
        return f"nbd://{LOCALHOST}:{self.port}/{EXPORT}"

    def connect(self) -> socket.socket:
        """Open a connection; the server has not said anything yet."""
        if self.unix is None:
            return socket.create_connection((LOCALHOST, self.port))
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(self.unix))
        except OSError:
            connection.close()
            raise
        return connection


CommandLine = Callable[[Path, Address], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Peer:
    """A server that takes part.

    Attributes:
        name: What its column is called.
        command: The program and the options that come before all others.
        serving: The options that serve a file at an address.
        version_command: Prints its version on the first line.
        has_qmp: Whether it takes qemu-storage-daemon's command line and QMP commands.
        knows_qcow2: Whether it serves the disk in a qcow2 image.
    """

    name: str
    command: tuple[str, ...]
    serving: CommandLine
    version_command: tuple[str, ...]
    has_qmp: bool = False
    knows_qcow2: bool = True

    def command_line(self, image: Path, address: Address) -> list[str]:
        """Return the whole command that serves an image, writable."""
        return [*self.command, *self.serving(image, address)]

    def version(self) -> str:
        """Return the first line that the program says about its version."""
        result = subprocess.run(self.version_command, capture_output=True, text=True, check=False)
        lines = result.stdout.splitlines()
        return lines[0] if lines else "unknown"


def storage_daemon_options(image: Path, address: Address, aio: str = "") -> list[str]:
    """Return the options of qemu-storage-daemon, which are ours too.

    Args:
        image: The file.
        address: Where to listen.
        aio: More options of the file node, each with a comma before it.
    """
    if address.unix is not None:
        listen = f"addr.type=unix,addr.path={address.unix}"
    else:
        listen = f"addr.type=inet,addr.host={LOCALHOST},addr.port={address.port}"
    return [
        *("--blockdev", f"driver=file,node-name=file0,filename={image},discard=unmap{aio}"),
        *("--blockdev", f"driver={format_of(image)},node-name=disk0,file=file0,discard=unmap"),
        *("--nbd-server", f"{listen},max-connections={MAX_CONNECTIONS}"),
        *("--export", f"type=nbd,id=export0,node-name=disk0,name={EXPORT},writable=on"),
    ]


def qemu_nbd_options(image: Path, address: Address) -> list[str]:
    """Return the options of qemu-nbd; its cache mode is its default, the page cache."""
    if address.unix is not None:
        listen = [f"--socket={address.unix}"]
    else:
        listen = [f"--bind={LOCALHOST}", f"--port={address.port}"]
    shared = [f"--shared={MAX_CONNECTIONS}", "--persistent", "--discard=unmap"]
    return [*listen, *shared, f"--export-name={EXPORT}", f"--format={format_of(image)}", str(image)]


def nbdkit_options(image: Path, address: Address) -> list[str]:
    """Return the options of nbdkit with its file plugin."""
    if address.unix is not None:
        listen = [f"--unix={address.unix}"]
    else:
        listen = [f"--ipaddr={LOCALHOST}", f"--port={address.port}"]
    return [*listen, "file", str(image)]


OURS: Final = "nbdjobs"
STORAGE_DAEMON: Final = "qemu-storage-daemon"

#: Those that take part when nothing else is asked: each as its users start it. The storage
#: daemon's own default is a pool of threads; its io_uring form is there to be asked for.
USUAL: Final = rf"{OURS}|qemu-nbd.*|{STORAGE_DAEMON}|nbdkit"


def peers(scratch: Path) -> list[Peer]:
    """Return the servers that this machine has, ours first.

    Args:
        scratch: A directory in which qemu-nbd is tried with io_uring, which containers often
            refuse; its column then says that it runs with threads.
    """
    ours = (sys.executable, "-m", "nbdjobs")
    candidates = [
        Peer(OURS, (*ours, "daemon"), storage_daemon_options, (*ours, "--version"), has_qmp=True),
        _qemu_nbd(scratch),
        Peer(
            STORAGE_DAEMON,
            (STORAGE_DAEMON,),
            storage_daemon_options,
            (STORAGE_DAEMON, "--version"),
            has_qmp=True,
        ),
        Peer(
            f"{STORAGE_DAEMON} (io_uring)",
            (STORAGE_DAEMON,),
            partial(storage_daemon_options, aio=",aio=io_uring"),
            (STORAGE_DAEMON, "--version"),
            has_qmp=True,
        ),
        Peer(
            "nbdkit",
            ("nbdkit", "--foreground", "--exit-with-parent"),
            nbdkit_options,
            ("nbdkit", "--version"),
            knows_qcow2=False,
        ),
    ]
    return [peer for peer in candidates if shutil.which(peer.command[0])]


def _qemu_nbd(scratch: Path) -> Peer:
    version = ("qemu-nbd", "--version")
    fast = Peer("qemu-nbd", ("qemu-nbd", "--aio=io_uring"), qemu_nbd_options, version)
    if not shutil.which("qemu-nbd") or _starts(fast, scratch):
        return fast
    return Peer("qemu-nbd (threads)", ("qemu-nbd", "--aio=threads"), qemu_nbd_options, version)


def _starts(peer: Peer, scratch: Path) -> bool:
    image = scratch / "probe.img"
    image.write_bytes(bytes(1 << 20))
    try:
        with serving(peer, image, Transport.UNIX, scratch):
            return True
    except ServerError:
        return False
    finally:
        image.unlink()


class ServerError(Exception):
    """A server did not start; the message is what it said."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    peer: Peer
    process: subprocess.Popen[str]
    address: Address

    @property
    def processor_s(self) -> float:
        """Seconds that all its threads have spent on processors so far."""
        statistics = Path(f"/proc/{self.process.pid}/stat").read_text()
        # Fields 14 and 15, counted from 1; the name before them may hold anything.
        user, system = statistics.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(
    peer: Peer, image: Path, transport: Transport, directory: Path, *more: str
) -> Iterator[Server]:
    """Run a server on a file, from its first greeting to its end.

    Args:
        peer: The server.
        image: A raw file, served writable.
        transport: What its clients will use.
        directory: Where its unix socket and its log are made.
        more: Further options, such as those of a QMP monitor.

    Raises:
        ServerError: It ended, or did not greet a client.
    """
    address = Address.new(transport, directory)
    log = directory / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*peer.command_line(image, address), *more],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            text=True,
        )
    try:
        _await_greeting(process, address, log)
        yield Server(peer, process, address)
    finally:
        _end(process)
        if address.unix is not None:
            address.unix.unlink(missing_ok=True)


def _await_greeting(process: subprocess.Popen[str], address: Address, log: Path) -> None:
    for _ in range(round(PATIENCE_S / ATTEMPT_EVERY_S)):
        try:
            with address.connect() as connection:
                connection.settimeout(PATIENCE_S)
                if connection.recv(8) == b"NBDMAGIC":
                    return
        except (FileNotFoundError, ConnectionError):
            pass
        try:
            process.wait(ATTEMPT_EVERY_S)
        except subprocess.TimeoutExpired:
            continue
        break
    said = log.read_text().strip()
    raise ServerError(said.splitlines()[-1] if said else "no NBD server answers")


def _end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
