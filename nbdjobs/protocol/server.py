# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The NBD server: exports on offer, sockets to listen on, clients and their limits."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable
from typing import Final

from nbdjobs.protocol.buffers import BufferPool, CallLater, Timer
from nbdjobs.protocol.connection import Connection
from nbdjobs.protocol.export import Export
from nbdjobs.protocol.listener import Listener, bind_tcp, bind_unix, prepare_client
from nbdjobs.protocol.memory import Budget
from nbdjobs.protocol.polling import Polling
from nbdjobs.protocol.turns import Turns

DEFAULT_MAX_CONNECTIONS: Final = 100
"""Clients at a time, as in QEMU's nbd-server-start."""

FULL_HANDSHAKE_LIMIT_S: Final = 1.0
"""Seconds it has while all connections are taken, so that those who only begin to negotiate cannot
lock others out for long."""

RESERVED: Final = 4
"""One connection in so many is kept for exports that have few clients."""

HANDSHAKE_LIMIT_S: Final = 10.0
"""Seconds a client has for its negotiation, as in QEMU."""

_POOL_BYTES: Final = 32 * 1024 * 1024

_log = logging.getLogger(__name__)


class Server:
    """Serves exports to NBD clients.

    Args:
        max_connections: Clients at a time, 0 for no limit; further ones wait to be accepted. Some
            of them are kept for each export (`has_room`).
        handshake_limit_s: Seconds a client has for its negotiation, 0 for no limit.
        on_unused: Called with an export when its last client is gone, whether or not the export
            is still on offer; not called for an export that never had a client.
        call_later: Timers; `loop.call_later` unless given.
        polling: When to look for requests instead of sleeping.
    """

    def __init__(
        self,
        *,
        max_connections: int = DEFAULT_MAX_CONNECTIONS,
        handshake_limit_s: float = HANDSHAKE_LIMIT_S,
        on_unused: Callable[[Export], None] | None = None,
        call_later: CallLater | None = None,
        polling: Polling | None = None,
    ):
        self._loop = asyncio.get_running_loop()
        self._max_connections = max_connections
        self._handshake_limit_s = handshake_limit_s
        self._on_unused = on_unused
        self._call_later: CallLater = call_later or self._loop.call_later
        self._pool = BufferPool(_POOL_BYTES, self._loop.call_later)
        self._budget = Budget()
        self._polling = polling or Polling()
        self._turns = Turns()
        self._exports: dict[str, Export] = {}
        self._listeners: list[Listener] = []
        self._connections: set[Connection] = set()
        self._accepting: set[asyncio.Task[None]] = set()
        self._hurry: Timer | None = None
        self._is_closed = False
        self._is_holding = False
        self._all_ended = asyncio.Event()
        self._all_ended.set()

    @property
    def connection_count(self) -> int:
        """Clients now, including those that negotiate."""
        return len(self._connections)

    @property
    def addresses(self) -> list[str | tuple[str, int]]:
        """Where the server listens: paths, and hosts with ports."""
        return [listener.address for listener in self._listeners]

    def hold_clients(self) -> None:
        """Let new clients wait in the kernel's queue until `release_clients`."""
        self._is_holding = True
        self._balance()

    def release_clients(self) -> None:
        """Accept clients again."""
        self._is_holding = False
        self._balance()

    def add_export(self, export: Export) -> None:
        """Offer an export.

        Raises:
            ValueError: Its name is taken.
        """
        if export.name in self._exports:
            raise ValueError(f"NBD server already has export named '{export.name}'")
        self._exports[export.name] = export

    def remove_export(self, name: str) -> Export:
        """Stop offering an export; clients that are attached to it stay.

        Raises:
            KeyError: There is no such export.
        """
        return self._exports.pop(name)

    def client_count(self, export: Export) -> int:
        """Return how many clients are attached to an export, on offer or not.

        A client that was cut off counts until its last request has ended.
        """
        return len(self._clients_of(export))

    def has_room(self, export: Export) -> bool:
        """Whether one more client may attach to an export.

        A client that is gone counts until its last request has ended, and on a disk that hangs
        that may be never. So that clients which come again and again to such an export do not
        use up all connections, each export on offer is sure of its part of a quarter of them,
        rounded down; the rest is for whoever comes first.
        """
        if not self._max_connections:
            return True
        attached = Counter(
            id(connection.export)
            for connection in self._connections
            if connection.export is not None
        )
        part = self._max_connections // (RESERVED * max(len(self._exports), 1))
        others = (other for other in self._exports.values() if other is not export)
        kept = sum(max(part - attached[id(other)], 0) for other in others)
        return attached.total() + kept < self._max_connections

    def disconnect_clients(self, export: Export) -> None:
        """Cut off the clients of an export; requests they have in flight are still done.

        `on_unused` is called when the last of them has ended, never from inside this call.
        """
        for connection in self._clients_of(export):
            connection.disconnect()

    def listen_unix(self, path: str) -> str:
        """Listen on a Unix socket; a socket file in its place is replaced.

        Raises:
            OSError: It cannot be bound.
        """
        self._listen(bind_unix(path))
        return path

    def listen_tcp(self, host: str | None, port: int) -> list[tuple[str, int]]:
        """Listen on all addresses of a host.

        Args:
            host: Name or address, IPv4 or IPv6; None for every address.
            port: Port, or 0 for one that the system chooses.

        Returns:
            The addresses with their ports.

        Raises:
            OSError: One of them cannot be bound; then none is.
        """
        sockets = bind_tcp(host, port)
        bound = [sock.getsockname()[:2] for sock in sockets]
        for sock in sockets:
            self._listen(sock)
        return bound

    def listen(self, sock: socket.socket) -> None:
        """Listen on a bound socket that somebody else made, such as one passed by systemd.

        The file of a Unix socket stays where it is: who made it removes it.

        Raises:
            OSError: It is none that can be listened on; it stays open.
        """
        self._listen(sock, owns_file=False)

    async def close(self, *, grace_s: float | None = None) -> None:
        """Stop: no new clients, no new requests, answers to those in flight, then the end.

        Args:
            grace_s: Seconds for requests in flight and for clients to take their answers; after
                that, clients are cut off and requests cancelled. None waits for them.
        """
        self._is_closed = True
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        if self._accepting:
            await asyncio.gather(*self._accepting, return_exceptions=True)
        for connection in tuple(self._connections):
            connection.finish()
        self._pool.close()
        if self._hurry is not None:
            self._hurry.cancel()
        try:
            await asyncio.wait_for(self._all_ended.wait(), grace_s)
        except TimeoutError:
            for connection in tuple(self._connections):
                connection.disconnect()
                connection.cancel_requests()
            await self._all_ended.wait()

    def _clients_of(self, export: Export) -> list[Connection]:
        return [connection for connection in self._connections if connection.export is export]

    def _listen(self, sock: socket.socket, *, owns_file: bool = True) -> None:
        listener = Listener(sock, self._accept, owns_file=owns_file)
        self._listeners.append(listener)
        listener.set_accepting(self._has_room())

    @property
    def _is_full(self) -> bool:
        return 0 < self._max_connections <= len(self._connections)

    def _has_room(self) -> bool:
        return not self._is_full and not self._is_holding

    def _balance(self) -> None:
        """Accept clients exactly while there is room for them."""
        for listener in self._listeners:
            listener.set_accepting(self._has_room())
        if self._is_full and self._hurry is None and self._handshake_limit_s:
            negotiating = self._negotiating()
            if negotiating:
                self._hurry = self._call_later(
                    FULL_HANDSHAKE_LIMIT_S, lambda: self._make_room(negotiating)
                )

    def _negotiating(self) -> set[Connection]:
        return {connection for connection in self._connections if connection.export is None}

    def _make_room(self, slow: set[Connection]) -> None:
        """Cut off those who still negotiate, if their places are still asked for."""
        self._hurry = None
        if self._is_full:
            for connection in slow & self._negotiating():
                _log.info("client disconnected: others wait for its place")
                connection.disconnect()
            self._balance()

    def _accept(self, sock: socket.socket) -> None:
        prepare_client(sock)
        connection = Connection(
            self._exports,
            has_room=self.has_room,
            pool=self._pool,
            budget=self._budget,
            polling=self._polling,
            turns=self._turns,
            handshake_limit_s=self._handshake_limit_s,
            call_later=self._call_later,
            on_end=self._ended,
        )
        self._connections.add(connection)
        self._all_ended.clear()
        self._balance()
        task = self._loop.create_task(self._attach(connection, sock))
        self._accepting.add(task)
        task.add_done_callback(self._accepting.discard)

    async def _attach(self, connection: Connection, sock: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: connection, sock)
        except OSError as error:
            _log.warning("cannot serve a client: %s", error)
            sock.close()
            self._ended(connection)

    def _ended(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._is_closed:
            self._balance()
        if not self._connections:
            self._all_ended.set()
        export = connection.export
        if export is not None and self._on_unused is not None and not self._clients_of(export):
            self._on_unused(export)
