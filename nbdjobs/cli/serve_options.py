# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What `nbdjobs serve` means in qemu-storage-daemon's options, and what it tells the user. Pure."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import quote

from nbdjobs.cli.images import Format, Image, node_name
from nbdjobs.cli.units import format_size

#: Addresses that mean every interface: fine to listen at, useless to connect to.
_ANY_HOST: Final = ("0.0.0.0", "::")

PORT_MAX: Final = 65535


@dataclass(frozen=True, slots=True)
class UnixListen:
    """Clients on this machine connect at a path."""

    path: Path

    def option(self) -> str:
        """The value of `--nbd-server`."""
        return f"addr.type=unix,addr.path={_escaped(str(self.path))}"

    def uri(self, name: str) -> str:
        """The NBD URI of an export."""
        return f"nbd+unix:///{quote(name, safe='')}?socket={quote(str(self.path))}"


@dataclass(frozen=True, slots=True)
class TcpListen:
    """Clients connect over the network.

    Attributes:
        host: Name or number, IPv6 without brackets.
        port: 1 to 65535.
    """

    host: str
    port: int

    def option(self) -> str:
        """The value of `--nbd-server`."""
        return f"addr.type=inet,addr.host={_escaped(self.host)},addr.port={self.port}"

    def uri(self, name: str) -> str:
        """The NBD URI of an export, as another machine would use it."""
        host = socket.gethostname() if self.host in _ANY_HOST else self.host
        if ":" in host:
            host = f"[{host}]"
        return f"nbd://{host}:{self.port}/{quote(name, safe='')}"


@dataclass(frozen=True, slots=True)
class PassedListen:
    """Clients connect to a socket that a service manager has made.

    Attributes:
        descriptor: Its number in this process.
        where: The address it listens at, which clients are told.
    """

    descriptor: int
    where: UnixListen | TcpListen

    def option(self) -> str:
        """The value of `--nbd-server`."""
        return f"addr.type=fd,addr.str={self.descriptor}"

    def uri(self, name: str) -> str:
        """The NBD URI of an export."""
        return self.where.uri(name)


Listen: TypeAlias = UnixListen | TcpListen | PassedListen


@dataclass(frozen=True, slots=True)
class Served:
    """One image and the name its clients ask for."""

    image: Image
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Everything that `nbdjobs serve` was asked for, checked.

    Attributes:
        disks: What to serve, at least one.
        listen: Where NBD clients connect.
        qmp: Where QMP clients connect.
        read_only: No client may write.
        is_direct: Bypass the page cache.
        max_connections: NBD clients at once; None is the daemon's default.
        is_found: `nbdjobs backup` finds the QMP socket without being told.
        snapshot: Internal snapshot of the images that is served, by id or name.
    """

    disks: tuple[Served, ...]
    listen: Listen
    qmp: Path
    read_only: bool = False
    is_direct: bool = False
    max_connections: int | None = None
    is_found: bool = True
    snapshot: str | None = None


def parse_tcp(text: str) -> TcpListen:
    """Read `PORT`, `HOST:PORT` or `[IPV6]:PORT`; a port alone serves this machine only.

    NBD has no passwords, so whoever can connect can write: other machines must be asked for.

    Raises:
        ValueError: Something else; the message names what was expected.
    """
    host, separator, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = port = ""
    if not port.isascii() or not port.isdigit() or not 1 <= int(port) <= PORT_MAX:
        raise ValueError(
            f"'{text}' is not an address: expected PORT, HOST:PORT or [IPV6]:PORT with a port"
            f" from 1 to {PORT_MAX}"
        )
    return TcpListen(host or ("0.0.0.0" if separator else "localhost"), int(port))


def daemon_options(serving: Serving) -> list[str]:
    """Translate into the command line of `nbdjobs daemon` and qemu-storage-daemon.

    The QMP socket comes first, so that a start that fails later cannot have been missed by
    whoever waits for it.
    """
    chardev, monitor = control_options(serving.qmp)
    return [
        *("--chardev", chardev),
        *("--monitor", monitor),
        *(option for disk in serving.disks for option in _node(disk, serving)),
        *("--nbd-server", _server(serving)),
        *(option for disk in serving.disks for option in _exports(disk, serving)),
    ]


def control_options(path: Path) -> tuple[str, str]:
    """The values of `--chardev` and `--monitor` for a QMP socket."""
    return f"socket,id=control,path={_escaped(str(path))},server=on,wait=off", "chardev=control"


def _node(disk: Served, serving: Serving) -> Iterator[str]:
    node, image = node_name(disk.name), disk.image
    filename = f"filename={_escaped(str(image.path))}"
    if image.format is Format.RAW:
        value = f"driver={image.driver},node-name={node},{filename}"
    else:
        value = f"driver={image.format},node-name={node},file.driver={image.driver},file.{filename}"
    # Space that clients discard goes back to the file system.
    value += ",read-only=on" if serving.read_only else ",discard=unmap"
    if serving.snapshot is not None:
        value += f",snapshot={_escaped(serving.snapshot)}"
    if serving.is_direct:
        value += ",cache.direct=on"
    yield from ("--blockdev", value)


def _server(serving: Serving) -> str:
    limit = serving.max_connections
    return serving.listen.option() + ("" if limit is None else f",max-connections={limit}")


def _exports(disk: Served, serving: Serving) -> Iterator[str]:
    node = node_name(disk.name)
    yield from ("--export", _export(node, node, disk.name, serving))
    if has_default(serving) and disk.name:
        yield from ("--export", _export(f"{node}.default", node, "", serving))


def _export(export_id: str, node: str, name: str, serving: Serving) -> str:
    writable = "off" if serving.read_only else "on"
    return f"type=nbd,id={export_id},node-name={node},name={_escaped(name)},writable={writable}"


def has_default(serving: Serving) -> bool:
    """Whether clients that ask for no name get a disk.

    Only when there is just one: with several, a client that forgot the name would write to a
    disk nobody meant.
    """
    return len(serving.disks) == 1


def banner(serving: Serving) -> list[str]:
    """Return the lines that say what is served, where, and what to do next."""
    lines = []
    for disk in serving.disks:
        access = "read-only" if serving.read_only else "read-write"
        what = f"{disk.image.path} ({format_size(disk.image.size)}, {access})"
        lines += [f"serving {what}", f"  {serving.listen.uri(disk.name)}"]
    lines += [f"QMP socket: {shlex.quote(str(serving.qmp))}", f"backup:     {_backup(serving)}"]
    return lines


def _backup(serving: Serving) -> str:
    name = serving.disks[0].name or node_name("")
    words = ["nbdjobs", "backup", name, f"{node_name(name)}-backup.img"]
    if not serving.is_found:
        words += ["--qmp", str(serving.qmp)]
    return shlex.join(words)


def _escaped(value: str) -> str:
    """A comma ends a value, two are one comma in it (QEMU's keyval syntax)."""
    return value.replace(",", ",,")
