# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Serves QMP sessions on sockets: moves bytes, and decides nothing about them.

Each session has a reader, which takes messages into a short queue, and an answerer, which
executes them one after the other. So the commands of one session keep their order, a long
one holds up its own session only, and a client that does not read its replies is not read
either. Events cannot wait: a client that lets them pile up loses its session.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from nbdjobs.daemon.chardev_socket import SocketChardev
from nbdjobs.qapi.jsonparse import DEFAULT_LIMITS, JsonError, JsonLimits, Parsed
from nbdjobs.qmp.events import event_message
from nbdjobs.qmp.registry import Registry
from nbdjobs.qmp.session import Session
from nbdjobs.qmp.wire import encode

logger = logging.getLogger(__name__)

READ_SIZE: Final = 16 * 1024
"""Bytes taken from a socket at once; parsing them holds the event loop for some milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """What clients may make the server hold.

    Attributes:
        sessions: Sessions at once; a further client is disconnected.
        queued: Messages of a session that wait for the one before; QEMU's number.
        backlog: Bytes not yet read by a client when an event comes; beyond, it is dropped.
        flush_s: Seconds that a client may take for its last replies.
        message: Bounds of one message.
    """

    sessions: int = 64
    queued: int = 8
    backlog: int = 4 * 1024 * 1024
    flush_s: float = 1.0
    message: JsonLimits = field(default=DEFAULT_LIMITS)


class QmpServer:
    """All QMP sessions of a daemon; an async context manager that ends them on exit.

    Args:
        registry: Commands and events on offer.
        context: What commands act on.
        limits: What clients may make the server hold.
        clock_ns: The time of events, in nanoseconds since the epoch.
        is_over: Whether the end has begun: then nothing more is executed, and events and the
            last replies still go out.
    """

    def __init__(
        self,
        registry: Registry,
        context: object,
        *,
        limits: ServerLimits | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        self._registry = registry
        self._context = context
        self._limits = limits if limits is not None else ServerLimits()
        self._clock_ns = clock_ns
        self._is_over = is_over
        self._tasks = asyncio.TaskGroup()
        self._connections: dict[_Connection, asyncio.Task[None]] = {}
        self._chardevs: list[SocketChardev] = []
        self._is_released = asyncio.Event()
        self._is_released.set()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        # No session lets an error out, so what the body raised can stay what it is.
        await self._tasks.__aexit__(None, None, None)
        for chardev in self._chardevs:
            await chardev.close()

    def hold_clients(self) -> None:
        """Let clients that come from now on wait for their greeting until `release_clients`."""
        self._is_released.clear()

    def release_clients(self) -> None:
        """Serve clients from now on."""
        self._is_released.set()

    async def attach(self, chardev: SocketChardev, *, pretty: bool = False) -> None:
        """Serve QMP to the clients of a socket, from now until the server closes.

        Args:
            chardev: The socket, which nobody else uses.
            pretty: Indent what is sent.
        """
        chardev.is_in_use = True
        self._chardevs.append(chardev)

        def serve(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> asyncio.Task[None] | None:
            return self._accept(reader, writer, pretty)

        await chardev.attach(serve)

    def broadcast(self, event: object) -> None:
        """Tell every client that has negotiated; never waits.

        Args:
            event: An instance of a dataclass declared with `@event`.
        """
        message = event_message(event, self._clock_ns())
        for connection in list(self._connections):
            connection.tell(message)

    def close(self) -> None:
        """Stop listening and end all sessions; leaving the context waits for their end."""
        for chardev in self._chardevs:
            chardev.stop()
        for connection, task in self._connections.items():
            connection.is_ended = True
            task.cancel()

    def _accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pretty: bool
    ) -> asyncio.Task[None] | None:
        if len(self._connections) >= self._limits.sessions:
            logger.warning("QMP client refused: %d sessions are open", len(self._connections))
            writer.transport.abort()
            return None
        session = Session(self._registry, pretty=pretty, limits=self._limits.message)
        connection = _Connection(
            session, self._context, reader, writer, self._limits, self._is_over
        )
        task = self._tasks.create_task(self._serve(connection))
        self._connections[connection] = task
        return task

    async def _serve(self, connection: _Connection) -> None:
        try:
            await connection.run(self._is_released)
        except Exception:
            logger.exception("a QMP session failed unexpectedly")
        finally:
            del self._connections[connection]


class _Connection:
    """A session on its socket.

    Attributes:
        is_ended: Nothing more is executed; set before the task is cancelled, because `quit`
            is itself executed in it and the next command would still have its turn.
    """

    def __init__(
        self,
        session: Session,
        context: object,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        limits: ServerLimits,
        is_over: Callable[[], bool],
    ) -> None:
        self._session = session
        self._context = context
        self._reader = reader
        self._writer = writer
        self._limits = limits
        self._is_over = is_over
        self.is_ended = False
        self._queue: asyncio.Queue[Parsed | JsonError | None] = asyncio.Queue(limits.queued)

    async def run(self, is_released: asyncio.Event) -> None:
        """Serve until the client leaves; what it sent before that is still executed."""
        try:
            await is_released.wait()
            self._writer.write(self._session.greeting())
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read())
                tasks.create_task(self._answer())
        finally:
            await self._finish()

    def tell(self, event: dict[str, object]) -> None:
        """Send an event, or give the client up when it does not read."""
        transport = self._writer.transport
        if not self._session.is_negotiated or transport.is_closing():
            return
        if transport.get_write_buffer_size() > self._limits.backlog:
            logger.warning("QMP client dropped: it does not read its events")
            transport.abort()
            return
        self._writer.write(encode(event, pretty=self._session.pretty))

    async def _read(self) -> None:
        while data := await self._receive():
            for message in self._session.receive(data):
                if self._is_at_its_end:
                    continue
                if self._session.is_urgent(message):
                    self._writer.write(await self._session.answer(message, self._context))
                else:
                    await self._queue.put(message)
            # Bytes that are here already would be read without a turn for anybody else.
            await asyncio.sleep(0)
        await self._queue.put(None)

    @property
    def _is_at_its_end(self) -> bool:
        return self.is_ended or self._is_over() or self._writer.is_closing()

    async def _receive(self) -> bytes:
        """Bytes from the client; none when it has left, in whatever way."""
        try:
            return await self._reader.read(READ_SIZE)
        except ConnectionError:
            return b""

    async def _answer(self) -> None:
        """Answer in order; once the client is gone, execute no more of what it asked."""
        while (message := await self._queue.get()) is not None:
            if self._is_at_its_end:
                continue
            self._writer.write(await self._session.answer(message, self._context))
            try:
                await self._writer.drain()
            except ConnectionError:
                self._writer.transport.abort()

    async def _finish(self) -> None:
        """Close the socket, with a moment for the last replies to be read."""
        self._writer.close()
        try:
            async with asyncio.timeout(self._limits.flush_s):
                await self._writer.wait_closed()
        except (OSError, TimeoutError):
            self._writer.transport.abort()
