# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The busy client of the demo: writes to an NBD export without a break, from its own process.

Run as `python -m nbdjobs.cli.demo_writer SOCKET EXPORT`. Nothing but the standard library and the
NBD specification, so that the demo does not prove one half of nbdjobs with the other half.

It obeys words on its standard input, one per line, and answers each on its standard output with a
line `WRITES BYTES`, counted since its start:

- `hold`: send nothing more, wait until every write is acknowledged, answer, and wait;
- `go`: answer and write on;
- `stop`: as `hold`, then flush, disconnect and end. The end of the input means the same.

Every block it writes is filled with the write's number, so that no two writes are alike.
"""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

KIB: Final = 1024

#: Bytes of one write: 4 to 64 KiB, aligned to 4 KiB.
BLOCK: Final = 4 * KIB
BLOCKS_MAX: Final = 16

#: Writes unacknowledged at once.
DEPTH: Final = 16

#: Writes per second: busy, and yet a speed-limited backup gets to copy most of the disk itself.
RATE: Final = 1000

#: Nine of ten writes go to this part of the disk, as with most programs; the rest goes anywhere.
HOT_SHARE: Final = 0.9
HOT_PART: Final = 1 / 16

# NBD specification, "Fixed newstyle negotiation" and "Transmission phase".
NBD_MAGIC: Final = b"NBDMAGICIHAVEOPT"
OPTION_MAGIC: Final = b"IHAVEOPT"
CLIENT_FLAGS: Final = struct.pack(">I", 0b11)  # fixed newstyle, no zeroes
OPT_GO: Final = 7
REPLY: Final = struct.Struct(">QIII")
REPLY_MAGIC: Final = 0x3E889045565A9
REP_ACK: Final = 1
REP_INFO: Final = 3
REP_ERROR: Final = 1 << 31
INFO_EXPORT: Final = struct.Struct(">HQH")
REPLY_LENGTH_MAX: Final = 64 * KIB
REQUEST: Final = struct.Struct(">IHHQQI")
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
SIMPLE_REPLY_MAGIC: Final = 0x67446698
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3


class WriterError(Exception):
    """The server refused something or broke the protocol: the demo cannot go on."""


@dataclass(slots=True)
class Counts:
    """What has been acknowledged so far."""

    writes: int = 0
    length: int = 0


def negotiate(connection: socket.socket, export: str) -> int:
    """Open an export.

    Returns:
        Its size in bytes.

    Raises:
        WriterError: The server has no such export, or is no NBD server.
    """
    if not _receive(connection, 18).startswith(NBD_MAGIC):
        raise WriterError("the server does not speak newstyle NBD")
    name = export.encode()
    data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    connection.sendall(CLIENT_FLAGS + OPTION_MAGIC + struct.pack(">II", OPT_GO, len(data)) + data)
    size = 0
    while True:
        magic, _, kind, length = REPLY.unpack(_receive(connection, REPLY.size))
        if magic != REPLY_MAGIC or length > REPLY_LENGTH_MAX:
            raise WriterError("the server's answer to NBD_OPT_GO makes no sense")
        content = _receive(connection, length)
        if kind == REP_ACK:
            return size
        if kind & REP_ERROR:
            raise WriterError(f"no export '{export}': {content.decode(errors='replace')}")
        if kind == REP_INFO and length == INFO_EXPORT.size and content[:2] == b"\0\0":
            size = INFO_EXPORT.unpack(content)[1]


class Writer:
    """Writes to an export, many requests in flight, at a steady rate.

    Attributes:
        counts: What has been acknowledged.
    """

    def __init__(self, connection: socket.socket, size: int, choice: random.Random):
        """Prepare.

        Args:
            connection: In transmission phase, without structured replies.
            size: Bytes of the export, at least 64 KiB.
            choice: Chooses where and how much to write.
        """
        self.counts = Counts()
        self._connection = connection
        self._blocks = size // BLOCK
        self._hot = choice.randrange(self._blocks)
        self._choice = choice
        self._lengths: dict[int, int] = {}  # of the requests in flight, by cookie
        self._sent = 0
        self._received = b""
        self._next = time.monotonic()

    def write_until(self, is_asked: Callable[[], bool]) -> None:
        """Write until somebody asks for something, looking at least for every write."""
        self._next = time.monotonic()
        while not is_asked():
            delay = self._next - time.monotonic()
            if delay <= 0 and len(self._lengths) < DEPTH:
                self._send_write()
                self._next += 1 / RATE
            else:
                self._take_replies(max(0.0, delay) if len(self._lengths) < DEPTH else None)

    def drain(self) -> None:
        """Wait until nothing is in flight."""
        while self._lengths:
            self._take_replies(None)

    def end(self) -> None:
        """Flush what was written, and say goodbye."""
        self.drain()
        self._send(CMD_FLUSH, 0, 0)
        self.drain()
        self._connection.sendall(self._request(CMD_DISC, 0, 0))

    def _send_write(self) -> None:
        length = self._choice.randint(1, BLOCKS_MAX)
        if self._choice.random() < HOT_SHARE:
            first = self._hot + self._choice.randrange(max(1, int(self._blocks * HOT_PART)))
        else:
            first = self._choice.randrange(self._blocks)
        first = min(first % self._blocks, self._blocks - length)
        number = struct.pack(">Q", self._sent + 1)
        self._send(CMD_WRITE, first * BLOCK, length * BLOCK, number * (length * BLOCK // 8))

    def _send(self, command: int, offset: int, length: int, payload: bytes = b"") -> None:
        self._sent += 1
        self._lengths[self._sent] = length
        self._connection.sendall(self._request(command, offset, length) + payload)

    def _request(self, command: int, offset: int, length: int) -> bytes:
        return REQUEST.pack(REQUEST_MAGIC, 0, command, self._sent, offset, length)

    def _take_replies(self, patience: float | None) -> None:
        """Wait for replies, at most so many seconds, and count what they acknowledge."""
        if not select.select([self._connection], [], [], patience)[0]:
            return
        received = self._connection.recv(64 * KIB)
        if not received:
            raise WriterError("the server closed the connection")
        self._received += received
        while len(self._received) >= SIMPLE_REPLY.size:
            magic, error, cookie = SIMPLE_REPLY.unpack_from(self._received)
            self._received = self._received[SIMPLE_REPLY.size :]
            if magic != SIMPLE_REPLY_MAGIC or cookie not in self._lengths:
                raise WriterError("the server's reply belongs to no request")
            if error:
                raise WriterError(f"the server failed a request: {os.strerror(error)}")
            length = self._lengths.pop(cookie)
            if length:
                self.counts.writes += 1
                self.counts.length += length


def main(arguments: list[str]) -> int:
    """Connect, write and obey until told to stop; return the exit code."""
    path, export = arguments
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            _obey(Writer(connection, negotiate(connection, export), random.Random()))
    except (WriterError, OSError) as error:
        print(f"demo client: {error}", file=sys.stderr)
        return 1
    return 0


def _obey(writer: Writer) -> None:
    while True:
        writer.write_until(_is_asked)
        word = sys.stdin.readline().strip()
        writer.drain()
        if word != "hold":
            writer.end()
        print(writer.counts.writes, writer.counts.length, flush=True)
        if word != "hold" or sys.stdin.readline().strip() != "go":
            return
        print(writer.counts.writes, writer.counts.length, flush=True)


def _is_asked() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def _receive(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(length - len(parts))
        if not part:
            raise WriterError("the server closed the connection")
        parts += part
    return bytes(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
