# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The character device `socket`: it listens or calls as soon as it is made.

Whoever is at the other end waits until a user of the device comes, such as a monitor, and serves
it. A listening device has any number of clients at once; one that calls has one, and calls again
when that is gone, if it was made so.

Source: QEMU qapi/char.json (ChardevSocket) and docs about `-chardev socket`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final

from nbdjobs.daemon.chardev import Chardev
from nbdjobs.daemon.chardev_addresses import SocketOptions, connect, open_listeners
from nbdjobs.errors import CommandError

logger = logging.getLogger(__name__)

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], asyncio.Task[None] | None]
"""Takes a client; what it returns is done when the client has been served, None at once."""

_CLIENTS_AT_ONCE: Final = 1024


class SocketChardev(Chardev):
    """A socket; `open` makes it.

    Args:
        name: Its id.
        options: What kind of socket.
        sleep: Waits for seconds; for tests.
    """

    def __init__(
        self,
        name: str,
        options: SocketOptions,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        super().__init__(name)
        self._sleep = sleep
        self.options: Final = options
        self.listeners: list[socket.socket] = []
        self._servers: list[asyncio.Server] = []
        self._waiting: socket.socket | None = None
        self._serve: asyncio.Future[Serve] | None = None
        self._calling: asyncio.Task[None] | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._made: os.stat_result | None = None

    async def open(self) -> None:
        """Listen or call; with `wait`, return when the first client is there.

        Raises:
            CommandError: That is not possible; nothing is left open.
        """
        loop = asyncio.get_running_loop()
        self._serve = loop.create_future()
        try:
            if self.options.is_server:
                await self._listen()
            elif self.options.reconnect > 0:
                self._calling = loop.create_task(self._keep_calling())
            else:
                self._waiting = await connect(self.options)
        except BaseException:
            await self.close()
            raise

    async def _listen(self) -> None:
        self.listeners = await open_listeners(self.options)
        if self._has_file:
            self._made = os.lstat(str(self.options.path))
        if self.options.wait:
            self._waiting = await _first_client(self.listeners)

    @property
    def _has_file(self) -> bool:
        return self.options.path is not None and not self.options.is_abstract

    async def attach(self, serve: Serve) -> None:
        """Give all clients from now on, and one that waits, to `serve`."""
        assert self._serve is not None, "opened before"
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self._take(serve, *await asyncio.open_connection(sock=waiting))
        self._serve.set_result(serve)
        for listener in self.listeners:
            # Start functions differ by family only in what they check.
            is_unix = listener.family is socket.AF_UNIX
            start = asyncio.start_unix_server if is_unix else asyncio.start_server

            def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                self._take(serve, reader, writer)

            self._servers.append(await start(take, sock=listener))

    def _take(
        self, serve: Serve, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> asyncio.Task[None] | None:
        if len(self._writers) >= _CLIENTS_AT_ONCE:
            self._writers = {each for each in self._writers if not each.is_closing()}
        self._writers.add(writer)
        return serve(reader, writer)

    async def _keep_calling(self) -> None:
        """Be connected as long as anybody is there to connect to."""
        assert self._serve is not None
        has_told = False
        while True:
            try:
                reader, writer = await asyncio.open_connection(sock=await connect(self.options))
            except (CommandError, OSError) as error:
                if not has_told:  # once, until somebody has been there again
                    logger.warning("Unable to connect character device %s: %s", self.name, error)
                has_told = True
            else:
                has_told = False
                self._writers = {writer}
                # Whoever comes later to use the device finds the peer that is there.
                serve = await asyncio.shield(self._serve)
                served = serve(reader, writer)
                if served is not None:
                    await asyncio.wait([served])
            await self._sleep(self.options.reconnect)

    # What it is

    @property
    def filename(self) -> str:
        """Where it is, in QEMU's form."""
        ends = [each.get_extra_info("socket") for each in self._writers if not each.is_closing()]
        if self._waiting is not None:
            ends.append(self._waiting)
        return _described(self.options, ends[0]) if ends else f"disconnected:{self._address}"

    @property
    def _address(self) -> str:
        options = self.options
        role = ",server=on" if options.is_server else ""
        if options.path is not None:
            abstract = ",abstract=on" if options.is_abstract else ""
            return f"unix:{options.path}{abstract}{role}"
        host, port = options.host, options.port
        if self.listeners:
            host, port = self.listeners[0].getsockname()[:2]
        return f"tcp:{_bracketed(str(host))}:{port}{role}"

    async def close(self) -> None:
        """Stop listening and calling, and remove the socket's file; who is served stays so."""
        self.stop()
        if self._calling is not None:
            await asyncio.wait([self._calling])

    def stop(self) -> None:
        """Do so without waiting for the end of what is under way."""
        if self._calling is not None:
            self._calling.cancel()
        for server in self._servers:
            server.close()
        for each in [*self.listeners, *([self._waiting] if self._waiting else [])]:
            each.close()
        self._remove_file()
        self.listeners, self._servers, self._waiting = [], [], None
        if not self.is_in_use:
            for writer in self._writers:
                writer.close()

    def _remove_file(self) -> None:
        """Remove the file, unless somebody has put another one there."""
        made, self._made = self._made, None
        if made is None:
            return
        with contextlib.suppress(FileNotFoundError):
            found = os.lstat(str(self.options.path))
            if (found.st_dev, found.st_ino) == (made.st_dev, made.st_ino):
                os.unlink(str(self.options.path))


async def _first_client(listeners: list[socket.socket]) -> socket.socket:
    """Wait for somebody to connect to one of the listeners."""
    loop = asyncio.get_running_loop()
    waits = [loop.create_task(loop.sock_accept(each)) for each in listeners]
    try:
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.wait(waits)
    accepted = [wait.result()[0] for wait in waits if wait in done]
    for surplus in accepted[1:]:
        surplus.close()
    return accepted[0]


def _described(options: SocketOptions, end: Any) -> str:
    """A connection, by both of its ends."""
    role = ",server=on" if options.is_server else ""
    if options.path is not None:
        return f"unix:{options.path if options.is_server else ''}{role}"
    (host, port), (peer, peer_port) = end.getsockname()[:2], end.getpeername()[:2]
    return f"tcp:{_bracketed(host)}:{port}{role} <-> {_bracketed(peer)}:{peer_port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
