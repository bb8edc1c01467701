# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Socket addresses as QAPI writes them, in the flat and in the older nested form."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from dataclasses import dataclass, field
from typing import Any, Final

from nbdjobs.errors import CommandError
from nbdjobs.qapi.types import Uint16, flat_union, member

UNIX_PATH_LIMIT: Final = 108
"""Size of `sun_path` in bytes on Linux, the closing NUL of a path included."""


@flat_union(
    "type",
    lambda: {"inet": InetSocketAddress, "unix": UnixSocketAddress, "fd": FdSocketAddress},
)
@dataclass(frozen=True, slots=True, kw_only=True)
class SocketAddress:
    """Where to listen (QAPI `SocketAddress`)."""

    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InetSocketAddress(SocketAddress):
    """A TCP address.

    Attributes:
        host: Name or number; "" is every interface.
        port: Number or service name.
        numeric: Do not look names up.
        to: Try the ports from `port` up to this one.
        ipv4: Whether IPv4 may be used; None leaves it to the host name.
        ipv6: Likewise for IPv6.
        keep_alive: Whether the kernel probes idle peers.
        mptcp: Whether one connection may take several paths (multipath TCP).
    """

    host: str
    port: str
    numeric: bool | None = None
    to: Uint16 | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    keep_alive: bool | None = None
    mptcp: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixSocketAddress(SocketAddress):
    """A unix socket.

    Attributes:
        path: Of a file; or a name, if it is abstract.
        abstract: A name that the kernel keeps, without a file and so without permissions.
        tight: The abstract name ends where `path` does; with False, NUL bytes fill it up.
    """

    path: str
    abstract: bool | None = None
    tight: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FdSocketAddress(SocketAddress):
    """A socket that the process was started with, such as one from a service manager.

    Only on the command line: over QMP, qemu-storage-daemon refuses these.

    Attributes:
        number: The descriptor, in decimal (QAPI `str`).
    """

    number: str = field(metadata=member("str"))


@flat_union("type", lambda: {"inet": LegacyInetAddress, "unix": LegacyUnixAddress})
@dataclass(frozen=True, slots=True, kw_only=True)
class SocketAddressLegacy:
    """The older form, with the members below `data` (QAPI `SocketAddressLegacy`)."""

    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InetSocketAddressBase:
    """The members of a TCP address."""

    host: str
    port: str
    numeric: bool | None = None
    to: Uint16 | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    keep_alive: bool | None = None
    mptcp: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixSocketAddressBase:
    """The members of a unix socket."""

    path: str
    abstract: bool | None = None
    tight: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LegacyInetAddress(SocketAddressLegacy):
    """A TCP address in the older form."""

    data: InetSocketAddressBase


@dataclass(frozen=True, slots=True, kw_only=True)
class LegacyUnixAddress(SocketAddressLegacy):
    """A unix socket in the older form."""

    data: UnixSocketAddressBase


def flattened(address: SocketAddressLegacy) -> SocketAddress:
    """The same address in today's form."""
    if isinstance(address, LegacyUnixAddress):
        return UnixSocketAddress(
            type="unix",
            path=address.data.path,
            abstract=address.data.abstract,
            tight=address.data.tight,
        )
    assert isinstance(address, LegacyInetAddress)
    data = address.data
    return InetSocketAddress(
        type="inet",
        host=data.host,
        port=data.port,
        numeric=data.numeric,
        to=data.to,
        ipv4=data.ipv4,
        ipv6=data.ipv6,
        keep_alive=data.keep_alive,
        mptcp=data.mptcp,
    )


def check_unix_path(path: str) -> None:
    """Raise `CommandError` for a path or name that no unix socket can have."""
    if len(os.fsencode(path)) >= UNIX_PATH_LIMIT:
        raise CommandError(f"UNIX socket path '{path}' is too long")


def bind_abstract(address: UnixSocketAddress) -> socket.socket:
    """Bind a unix socket without a file.

    Raises:
        CommandError: The name is too long or taken, in QEMU's words.
    """
    name = b"\0" + os.fsencode(address.path)
    if len(name) > UNIX_PATH_LIMIT:
        raise CommandError(f"UNIX socket path '{address.path}' is too long")
    if address.tight is False:
        name = name.ljust(UNIX_PATH_LIMIT, b"\0")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(name)
    except OSError as error:
        sock.close()
        raise CommandError(f"Failed to bind socket to {address.path}: {error.strerror}") from error
    return sock


def passed_socket(address: FdSocketAddress) -> socket.socket:
    """Take over a socket that the process was started with.

    Raises:
        CommandError: The descriptor is none, in QEMU's words.
    """
    if not (address.number.isascii() and address.number.isdigit()):
        raise CommandError(f"Unable to parse FD number {address.number}")
    try:
        return socket.socket(fileno=int(address.number))
    except (OSError, OverflowError) as error:
        raise CommandError(f"File descriptor '{address.number}' is not a socket") from error


async def bind(address: InetSocketAddress) -> list[socket.socket]:
    """Bind all that a TCP address stands for.

    Raises:
        CommandError: The name means nothing or cannot be bound, in QEMU's words; then nothing
            stays bound.
    """
    bound: list[socket.socket] = []
    failure: OSError | None = None
    for family, kind, protocol, _, where in await _resolve(address):
        if address.mptcp:
            protocol = socket.IPPROTO_MPTCP
        try:
            bound.append(_bind_one(address, family, kind, protocol, where))
        except OSError as error:
            failure = error
    if failure is None or (bound and failure.errno in _IGNORABLE):
        return bound
    for sock in bound:
        sock.close()
    if failure.errno == errno.EADDRINUSE:
        raise CommandError(f"Failed to find an available port: {failure.strerror}") from failure
    raise CommandError(f"Failed to bind socket: {failure.strerror}") from failure


_IGNORABLE: Final = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})
"""A host without IPv6 may still resolve "localhost" to both families."""


def _bind_one(
    address: InetSocketAddress,
    family: socket.AddressFamily,
    kind: socket.SocketKind,
    protocol: int,
    where: tuple[Any, ...],
) -> socket.socket:
    host, first, *rest = where
    last = max(first, address.to or 0)
    for port in range(first, last + 1):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family is socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((host, port, *rest))
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRINUSE or port == last:
                raise
        else:
            return sock
    raise AssertionError("the range of ports is never empty")


async def _resolve(address: InetSocketAddress) -> list[Any]:
    flags = socket.AI_PASSIVE
    if address.numeric:
        flags |= socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    try:
        # The loop's own function takes any number for a port and cuts it to 16 bits.
        found = await asyncio.to_thread(
            socket.getaddrinfo,
            address.host or None,
            address.port or None,
            family=_family(address),
            type=socket.SOCK_STREAM,
            flags=flags,
        )
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else str(error)
        raise CommandError(
            f"address resolution failed for {address.host}:{address.port}: {reason}"
        ) from error
    return list(dict.fromkeys(found))


def _family(address: InetSocketAddress) -> socket.AddressFamily:
    """The one family that is left over, or any: a flag that is on asks for it alone."""
    if address.ipv4 is False and address.ipv6 is False:
        raise CommandError("Cannot disable IPv4 and IPv6 at same time")
    wants_ipv4 = not address.ipv6 if address.ipv4 is None else address.ipv4
    wants_ipv6 = not address.ipv4 if address.ipv6 is None else address.ipv6
    if wants_ipv4 == wants_ipv6:
        return socket.AF_UNSPEC
    return socket.AF_INET if wants_ipv4 else socket.AF_INET6
