# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A small synchronous QMP client for tests.

The product is driven over its real control socket, from outside its code, and a test wants to
read as a script: one command, one answer, then the event it waits for. Nothing here polls: every
wait is a blocking read with a time limit that only a broken server ever reaches.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Message = dict[str, Any]

#: Seconds until a read is given up: far above what any test needs, so that a server that never
#: answers is reported as such instead of hanging the suite.
PATIENCE_S = 60.0

RECEIVE_SIZE = 65536


class QmpError(Exception):
    """The server refused a command.

    Attributes:
        error_class: The class word, such as ``GenericError``.
        description: The sentence for the user.
    """

    def __init__(self, error_class: str, description: str) -> None:
        super().__init__(f"{error_class}: {description}")
        self.error_class = error_class
        self.description = description


class QmpClient:
    """One QMP session over a unix socket; a context manager that closes it.

    Attributes:
        greeting: What the server said first, or ``{}`` before ``read_greeting``.
        events: Events received and not yet taken by ``wait_event``, oldest first.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE_S)
        self._connection = connection
        self._buffer = b""
        self.greeting: Message = {}
        self.events: list[Message] = []

    @classmethod
    def connect(cls, path: Path | str) -> Self:
        """Open a session at a unix socket, read the greeting and leave negotiation mode.

        Raises:
            OSError: Nobody listens there.
        """
        client = cls(_connected(path))
        client.read_greeting()
        client.execute("qmp_capabilities")
        return client

    @classmethod
    def connect_raw(cls, path: Path | str) -> Self:
        """Open a connection and send nothing: for tests of the greeting and of negotiation."""
        return cls(_connected(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calling it again does nothing."""
        self._connection.close()

    def read_greeting(self) -> Message:
        """Read and remember the server's greeting."""
        self.greeting = self.receive()
        return self.greeting

    def execute(self, command: str, arguments: Message | None = None) -> Any:
        """Run a command and return what stands under ``return``.

        Raises:
            QmpError: The server answered with an error.
        """
        reply = self.ask(command, arguments)
        if "error" in reply:
            raise QmpError(reply["error"]["class"], reply["error"]["desc"])
        return reply["return"]

    def ask(self, command: str, arguments: Message | None = None) -> Message:
        """Run a command and return the whole reply, be it a result or an error."""
        message: Message = {"execute": command}
        if arguments is not None:
            message["arguments"] = arguments
        return self.ask_message(message)

    def ask_message(self, message: Message) -> Message:
        """Send any message and return the reply to it; events that come before are kept."""
        self.send_bytes(json.dumps(message).encode())
        return self.read_reply()

    def send_bytes(self, data: bytes) -> None:
        """Send bytes as they are: for messages in pieces, several at once, or broken ones."""
        self._connection.sendall(data)

    def read_reply(self) -> Message:
        """Return the next message that is not an event."""
        while "event" in (message := self.receive()):
            self.events.append(message)
        return message

    def wait_event(self, name: str, matches: Callable[[Message], bool] | None = None) -> Message:
        """Take the first event of this name, already received or still to come.

        Args:
            name: The event's name, such as ``BLOCK_JOB_COMPLETED``.
            matches: What the event's ``data`` must satisfy; everything does when not given.

        Raises:
            TimeoutError: The event never came.
            ConnectionError: The server closed the session first.
        """
        for position, event in enumerate(self.events):
            if _is_event(event, name, matches):
                return self.events.pop(position)
        while not _is_event(message := self.receive(), name, matches):
            if "event" not in message:
                raise AssertionError(f"a reply nobody asked for: {message}")
            self.events.append(message)
        return message

    def wait_job_status(self, job: str, status: str) -> None:
        """Wait for the ``JOB_STATUS_CHANGE`` event that says a job has this status."""
        wanted = {"id": job, "status": status}
        self.wait_event("JOB_STATUS_CHANGE", lambda data: data == wanted)

    def receive(self) -> Message:
        """Return the next message from the server, whatever it is.

        Raises:
            TimeoutError: None came.
            ConnectionError: The server closed the session.
        """
        while b"\n" not in self._buffer:
            received = self._connection.recv(RECEIVE_SIZE)
            if not received:
                raise ConnectionError("the QMP server closed the session")
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: Message = json.loads(line)
        return message


def _connected(path: Path | str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    return connection


def _is_event(
    message: Message, name: str, matches: Callable[[Message], bool] | None = None
) -> bool:
    if message.get("event") != name:
        return False
    return matches is None or matches(message.get("data", {}))
