# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A listening socket that can stop accepting for a while."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable
from typing import Final

REST_S: Final = 1.0
"""Seconds until the next try when the system had no room for one more client."""

_BACKLOG: Final = 128
_UNIX_SEND_BUFFER: Final = 512 * 1024

_log = logging.getLogger(__name__)


class Listener:
    """Accepts clients of one address and hands their sockets over.

    `asyncio.Server` cannot stop accepting, which a connection limit needs: clients beyond it wait
    in the kernel's queue, as with QEMU.

    Args:
        sock: A bound socket; the listener owns it from now on.
        on_accept: Takes the non-blocking socket of a client.
        owns_file: The file of a Unix socket is removed at the end; not that of a socket which
            a service manager goes on listening at.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_accept: Callable[[socket.socket], None],
        *,
        owns_file: bool = True,
    ):
        self._socket = sock
        self._on_accept = on_accept
        self._loop = asyncio.get_running_loop()
        self._is_accepting = False
        self._rest: asyncio.TimerHandle | None = None
        self._own_file = _identity(sock) if owns_file else None
        sock.setblocking(False)
        sock.listen(_BACKLOG)

    @property
    def address(self) -> str | tuple[str, int]:
        """The path of a Unix socket, `@` and the name if it is abstract, or host and port."""
        name = self._socket.getsockname()
        if self._socket.family == socket.AF_UNIX:
            return os.fsdecode(name).rstrip("\0").replace("\0", "@", 1)
        return str(name[0]), int(name[1])

    def set_accepting(self, is_accepting: bool) -> None:
        """Accept clients from now on, or let them wait."""
        if is_accepting == self._is_accepting:
            return
        self._is_accepting = is_accepting
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        if is_accepting:
            self._loop.add_reader(self._socket.fileno(), self._accept)
        else:
            self._loop.remove_reader(self._socket.fileno())

    def close(self) -> None:
        """Stop listening, and remove the file of a Unix socket if it is still ours."""
        self.set_accepting(False)
        if self._own_file is not None and _identity(self._socket) == self._own_file:
            os.unlink(self._socket.getsockname())
        self._socket.close()

    def _accept(self) -> None:
        """Take one client; the loop calls again while more are waiting."""
        try:
            client, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError, InterruptedError):
            return
        except OSError as error:
            # Out of file descriptors or memory: the client stays in the queue. To look at it
            # again at once would keep the loop busy and fill the log.
            _log.warning("cannot accept a client: %s", error)
            self._loop.remove_reader(self._socket.fileno())
            self._rest = self._loop.call_later(REST_S, self._go_on)
            return
        client.setblocking(False)
        self._on_accept(client)

    def _go_on(self) -> None:
        """Try again to accept."""
        self._rest = None
        self._loop.add_reader(self._socket.fileno(), self._accept)


def bind_unix(path: str) -> socket.socket:
    """Bind a Unix socket, replacing a socket file that an earlier process left behind.

    Raises:
        OSError: The path is too long, not writable, or something that is no socket.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_socket(path):
            os.unlink(path)
        sock.bind(path)
    except OSError as error:
        sock.close()
        number = error.errno or errno.EINVAL
        reason = error.strerror or str(error)
        raise OSError(number, f"Failed to bind socket to {path}: {reason}") from error
    return sock


def bind_tcp(host: str | None, port: int) -> list[socket.socket]:
    """Bind every address that a host name stands for, IPv4 and IPv6.

    Args:
        host: Name or address; None or "" for all addresses.
        port: Port; 0 lets the system choose one, the same for all addresses.

    Raises:
        OSError: The name is not known, or an address cannot be bound.
    """
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError as error:
                if error.errno == errno.EAFNOSUPPORT and len(found) > 1:
                    continue  # a kernel without IPv6
                raise
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address[0], port, *address[2:]))
            port = port or sock.getsockname()[1]
    except OSError as error:
        for sock in sockets:
            sock.close()
        number = error.errno or errno.EINVAL
        text = f"Failed to bind socket to {host or '*'}:{port}: {error.strerror or error}"
        raise OSError(number, text) from error
    return sockets


def prepare_client(sock: socket.socket) -> None:
    """Send small replies at once, and notice clients whose machine is gone."""
    if sock.family == socket.AF_UNIX:
        # The default holds less than two replies of 128 KiB; the kernel lowers what is too much.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_SEND_BUFFER)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return False


def _identity(sock: socket.socket) -> tuple[int, int] | None:
    """Return device and inode of the file of a Unix socket, None if it has none."""
    if sock.family != socket.AF_UNIX:
        return None
    try:
        status = os.lstat(sock.getsockname())
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
