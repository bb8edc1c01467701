# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The sockets of character devices: where they listen, or whom they call.

Source: QEMU qapi/char.json (ChardevSocket); texts of qemu-storage-daemon 7.2.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from nbdjobs.daemon.addresses import check_unix_path
from nbdjobs.errors import CommandError

BACKLOG: Final = 16
"""Connections that may wait to be accepted."""

SOCKET_MODE: Final = 0o600
"""Whoever may connect rules the daemon, so that is its user alone."""

# An address has the form that its family asks for.
_Candidate: TypeAlias = tuple[socket.AddressFamily, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketOptions:
    """Options of a socket character device; either `path` or `host` and `port` are given.

    Attributes:
        path: Of a unix socket.
        is_abstract: The path is a name that is no file's.
        host: Name or address for TCP; empty means all interfaces.
        port: Number or service name for TCP.
        ipv4: Use IPv4; None leaves it to what `host` resolves to.
        ipv6: Use IPv6, likewise.
        is_server: Listen; otherwise connect.
        wait: As a server, do not go on before the first client is there.
        reconnect: As a client, seconds after which to try again; 0 for never.
    """

    path: str | None = None
    is_abstract: bool = False
    host: str | None = None
    port: str | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    is_server: bool = False
    wait: bool = True
    reconnect: int = 0


async def open_listeners(options: SocketOptions) -> list[socket.socket]:
    """Bind and listen; nothing is left open when that fails.

    Raises:
        CommandError: The address cannot be used.
    """
    if options.path is not None:
        return [_listen_unix(options.path, is_abstract=options.is_abstract)]
    return await _listen_tcp(options)


async def connect(options: SocketOptions) -> socket.socket:
    """Connect to the peer of a character device that is no server.

    Raises:
        CommandError: Nobody listens there.
    """
    loop = asyncio.get_running_loop()
    if options.path is not None:
        check_unix_path(options.path)
        name = f"\0{options.path}" if options.is_abstract else options.path
        candidates: list[_Candidate] = [(socket.AF_UNIX, name)]
        shown = options.path
    else:
        candidates = await _resolve(options)
        shown = f"{options.host}:{options.port}"
    failure = errno.EADDRNOTAVAIL
    for family, address in candidates:
        peer = socket.socket(family, socket.SOCK_STREAM)
        peer.setblocking(False)
        try:
            await loop.sock_connect(peer, address)
        except OSError as error:
            peer.close()
            failure = error.errno or failure
        except BaseException:
            peer.close()
            raise
        else:
            return peer
    raise CommandError(f"Failed to connect to '{shown}': {os.strerror(failure)}")


def _listen_unix(path: str, *, is_abstract: bool) -> socket.socket:
    check_unix_path(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if is_abstract:
            listener.bind(f"\0{path}")
        else:
            _remove_stale(path)
            listener.bind(path)
            # Nobody can connect before listen(), so nobody gets in before the mode is right.
            os.chmod(path, SOCKET_MODE)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise CommandError(f"Failed to bind socket to {path}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


def _remove_stale(path: str) -> None:
    """Remove what an earlier daemon left; a file that is no socket is left alone."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(Path(path).lstat().st_mode):
            os.unlink(path)


async def _listen_tcp(options: SocketOptions) -> list[socket.socket]:
    """Listen on every address of the host that can be had; one is enough."""
    listeners: list[socket.socket] = []
    failure = errno.EADDRNOTAVAIL
    for family, address in await _resolve(options):
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family is socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            failure = error.errno or failure
        else:
            listener.setblocking(False)
            listeners.append(listener)
    if not listeners:
        raise CommandError(f"Failed to bind socket: {os.strerror(failure)}")
    return listeners


async def _resolve(options: SocketOptions) -> list[_Candidate]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            options.host or None,
            options.port,
            family=_family(options),
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE if options.is_server else 0,
        )
    except socket.gaierror as error:
        where = f"{options.host}:{options.port}"
        raise CommandError(f"address resolution failed for {where}: {error.strerror}") from error
    return [(family, address) for family, _, _, _, address in found]


def _family(options: SocketOptions) -> socket.AddressFamily:
    """The one family left over, or any: a flag that is on asks for it alone."""
    wants_ipv4 = options.ipv4 if options.ipv4 is not None else not options.ipv6
    wants_ipv6 = options.ipv6 if options.ipv6 is not None else not options.ipv4
    if wants_ipv4 == wants_ipv6:
        return socket.AF_UNSPEC
    return socket.AF_INET if wants_ipv4 else socket.AF_INET6
