# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Sending the pieces of replies straight to a socket, as far as it takes them at once.

Pieces in memory leave together in one `writev`. A range of a file never comes into the memory of
this process: the kernel sends it from its page cache, which takes half the time for long reads.

Errors of the socket are raised as `OSError`: the client is gone.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Final

from nbdjobs.protocol.export import FileRange

Memory = bytes | memoryview
Piece = Memory | FileRange

_IOV_MAX: Final = 1024

_LEAVES_THE_REST: Final = frozenset({errno.EAGAIN, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
"""The socket is full, or the kernel cannot send from this file system by itself."""

UNREAD_FROM: Final = 128 * 1024
"""Bytes from which on sending a range of a file is faster than reading and sending it."""

UNREAD_FROM_UNIX: Final = 64 * 1024
"""The same for Unix sockets, where the reader takes what the page cache has."""

UNREAD_TO: Final = 2 * 1024 * 1024
"""Bytes up to which a socket takes a range of a file as a whole, or nearly."""


def unread_from(family: int) -> int:
    """Bytes of a read from which on a socket of this family is better given a range of a file."""
    return UNREAD_FROM_UNIX if family == socket.AF_UNIX else UNREAD_FROM


def send(descriptor: int, pieces: list[Memory]) -> list[Memory]:
    """Send pieces in memory without waiting; return what the socket did not take."""
    first = 0
    try:
        for first in range(0, len(pieces), _IOV_MAX):
            batch = pieces[first : first + _IOV_MAX] if len(pieces) > _IOV_MAX else pieces
            sent = os.writev(descriptor, batch)
            if sent != sum(map(len, batch)):
                return _after(batch, sent) + pieces[first + _IOV_MAX :]
    except BlockingIOError:
        return pieces[first:]
    return []


def send_with_files(descriptor: int, pieces: list[Piece]) -> list[Memory]:
    """Send pieces, some of which are ranges of files; what is left of those is read.

    Raises:
        OSError: Or a file has become shorter than its range: then the reply that has begun
            cannot be completed.
    """
    gathered: list[Memory] = []
    for number, piece in enumerate(pieces):
        if not isinstance(piece, FileRange):
            gathered.append(piece)
            continue
        rest: list[Piece] = [*send(descriptor, gathered)]
        gathered = []
        if not rest:
            rest += _send_file(descriptor, piece)
        else:
            rest.append(piece)
        if rest:
            return [_in_memory(left) for left in rest + pieces[number + 1 :]]
    return send(descriptor, gathered)


def _send_file(descriptor: int, piece: FileRange) -> list[FileRange]:
    """Send a range of a file; return what the socket did not take."""
    offset = piece.offset
    end = offset + piece.length
    try:
        while offset < end:
            sent = os.sendfile(descriptor, piece.fd, offset, end - offset)
            if not sent:
                raise OSError("the file has become shorter")
            offset += sent
    except OSError as error:
        if error.errno not in _LEAVES_THE_REST:
            raise
        return [FileRange(piece.fd, offset, end - offset)]
    return []


def _in_memory(piece: Piece) -> Memory:
    """Read a range, which the page cache has."""
    if not isinstance(piece, FileRange):
        return piece
    buffer = memoryview(bytearray(piece.length))
    if os.preadv(piece.fd, [buffer], piece.offset) != piece.length:
        raise OSError("the file has become shorter")
    return buffer


def _after(pieces: list[Memory], sent: int) -> list[Memory]:
    """Return what is left of the pieces behind the first `sent` bytes."""
    for number, piece in enumerate(pieces):
        if sent < len(piece):
            return [memoryview(piece)[sent:], *pieces[number + 1 :]]
        sent -= len(piece)
    return []
