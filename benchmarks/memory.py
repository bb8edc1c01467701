# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Resident memory of a server, idle and with many clients."""

from __future__ import annotations

import socket
import struct
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from benchmarks.peers import EXPORT, MAX_CONNECTIONS, Address, Peer, Transport, serving

HANDSHAKE_SIZE: Final = 18
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION: Final = struct.Struct(">QII")
REQUEST: Final = struct.Struct(">IHHQQI")
SIMPLE_REPLY_SIZE: Final = 16

IHAVEOPT: Final = 0x49484156454F5054
REQUEST_MAGIC: Final = 0x25609513
FIXED_NEWSTYLE_NO_ZEROES: Final = 3
OPT_EXPORT_NAME: Final = 1
SIZE_AND_FLAGS: Final = 10

READ_SIZE: Final = 4096


def usage(peer: Peer, image: Path, directory: Path, connections: int) -> dict[str, int]:
    """Return ``Rss`` and ``Pss`` in bytes, with this many clients that each have read once."""
    with serving(peer, image, Transport.UNIX, directory) as server, ExitStack() as clients:
        for _ in range(connections):
            client = clients.enter_context(connect(server.address))
            read_once(client)
        return _read_usage(server.process.pid)


def connect(address: Address) -> socket.socket:
    """Open a connection and choose the export by the oldest and shortest way."""
    client = address.connect()
    client.settimeout(30)
    _receive(client, HANDSHAKE_SIZE)
    name = EXPORT.encode()
    client.sendall(
        CLIENT_FLAGS.pack(FIXED_NEWSTYLE_NO_ZEROES)
        + OPTION.pack(IHAVEOPT, OPT_EXPORT_NAME, len(name))
        + name
    )
    _receive(client, SIZE_AND_FLAGS)
    return client


def read_once(client: socket.socket) -> None:
    """Make the server touch the buffers that it has for a connection."""
    client.sendall(REQUEST.pack(REQUEST_MAGIC, 0, 0, 1, 0, READ_SIZE))
    _receive(client, SIMPLE_REPLY_SIZE + READ_SIZE)


def _receive(client: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        received = client.recv(length - len(data))
        if not received:
            raise ConnectionError("the server closed the connection")
        data += received
    return data


def _read_usage(process: int) -> dict[str, int]:
    usage = {}
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("Rss", "Pss"):
            usage[name] = int(value.split()[0]) << 10
    return usage


CROWD: Final = MAX_CONNECTIONS
