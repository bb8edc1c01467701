# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""An NBD client of plain bytes on a plain socket, that can stop anywhere."""

from __future__ import annotations

import socket
import struct
from types import TracebackType
from typing import Self

READ, WRITE, DISC, FLUSH = range(4)

GREETING_SIZE = 18
FLAGS = struct.pack(">I", 3)
OPT_LIST, OPT_STRUCTURED_REPLY, OPT_GO = 3, 8, 7

#: Seconds after which a silent daemon is given up.
PATIENCE_S = 60.0


def option(number: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    """An option; its header may lie about the length."""
    announced = len(data) if length is None else length
    return b"IHAVEOPT" + struct.pack(">II", number, announced) + data


def go(export: str) -> bytes:
    """The option that chooses an export."""
    name = export.encode()
    return option(OPT_GO, struct.pack(">I", len(name)) + name + b"\0\0")


def request(
    command: int,
    offset: int = 0,
    length: int = 0,
    *,
    payload: bytes = b"",
    cookie: int = 0,
    flags: int = 0,
) -> bytes:
    """A request; `payload` sets the length."""
    size = len(payload) or length
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, size) + payload


class RawClient:
    """A connection; a context manager that closes it.

    Attributes:
        socket: For those who do something out of the ordinary.
    """

    def __init__(self, path: str):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.socket.close()

    def attach(self, export: str) -> None:
        """Negotiate simple replies, as short as possible."""
        self.receive(GREETING_SIZE)
        self.socket.sendall(FLAGS + go(export))
        self.take_option_replies()

    def take_option_replies(self) -> int:
        """Take the replies to one option; returns the kind of the last."""
        while True:
            _, _, kind, length = struct.unpack(">QIII", self.receive(20))
            self.receive(length)
            if kind == 1 or kind >= 1 << 31:
                return int(kind)

    def send(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        payload: bytes = b"",
        cookie: int = 0,
    ) -> None:
        """Send a request."""
        self.socket.sendall(request(command, offset, length, payload=payload, cookie=cookie))

    def reply(self) -> tuple[int, int]:
        """Take the header of a simple reply: cookie and error."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == 0x67446698
        return cookie, error

    def receive(self, length: int) -> bytes:
        """Take so many bytes."""
        data = bytearray(length)
        view = memoryview(data)
        while view:
            received = self.socket.recv_into(view)
            if not received:
                raise ConnectionError("the server has closed the connection")
            view = view[received:]
        return bytes(data)

    def is_closed_by_server(self) -> bool:
        """Take all there is; whether that has an end."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionError:
            pass
        return True
