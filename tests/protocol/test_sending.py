# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Pieces of replies on a real socket: what it takes and what is left are all of them, in order."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdjobs.protocol.export import FileRange
from nbdjobs.protocol.sending import Memory, Piece, send, send_with_files

FILE = os.urandom(1 << 20)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    path = tmp_path_factory.mktemp("sending") / "file"
    path.write_bytes(FILE)
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def pair(family: int) -> tuple[socket.socket, socket.socket]:
    """Two ends; the first never waits, and the kernel keeps little for it."""
    if family == socket.AF_UNIX:
        ours, theirs = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            theirs = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
    ours.setblocking(False)
    return ours, theirs


def received(theirs: socket.socket) -> bytes:
    found = bytearray()
    while data := theirs.recv(1 << 20):
        found += data
    return bytes(found)


memory = st.binary(min_size=1, max_size=40)
ranges = st.tuples(st.integers(0, 400_000), st.integers(1, 300_000))


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
@given(layout=st.lists(memory | ranges, max_size=12), room=st.sampled_from([4096, 65536, 1 << 20]))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_sent_and_what_is_left_are_all_pieces(
    family: int, file: int, layout: list[bytes | tuple[int, int]], room: int
) -> None:
    pieces: list[Piece] = [
        each if isinstance(each, bytes) else FileRange(file, *each) for each in layout
    ]
    expected = b"".join(
        each if isinstance(each, bytes) else FILE[each[0] : sum(each)] for each in layout
    )
    ours, theirs = pair(family)
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        left = send_with_files(ours.fileno(), pieces)
        size = sum(map(len, left))
        ours.shutdown(socket.SHUT_WR)
        assert received(theirs) + b"".join(left) == expected
    assert size < len(expected) or not expected


def test_a_socket_that_is_full_leaves_everything(file: int) -> None:
    ours, theirs = pair(socket.AF_UNIX)
    with ours, theirs:
        filled: list[Memory] = [bytes(1 << 20)]
        while send(ours.fileno(), filled) != filled:
            pass
        pieces: list[Piece] = [b"header", FileRange(file, 5, 100)]
        assert send_with_files(ours.fileno(), pieces) == [b"header", FILE[5:105]]


def test_more_pieces_than_one_call_takes() -> None:
    ours, theirs = pair(socket.AF_UNIX)
    with ours, theirs:
        pieces: list[Memory] = [number.to_bytes(2, "big") for number in range(3000)]
        left = send(ours.fileno(), pieces)
        ours.shutdown(socket.SHUT_WR)
        assert received(theirs) + b"".join(left) == b"".join(pieces)


def test_a_client_that_is_gone_is_an_error(file: int) -> None:
    ours, theirs = pair(socket.AF_UNIX)
    with ours:
        theirs.close()
        with pytest.raises(BrokenPipeError):
            send(ours.fileno(), [b"x"])
        with pytest.raises(BrokenPipeError):
            send_with_files(ours.fileno(), [FileRange(file, 0, 100)])


@pytest.mark.parametrize("is_full", [True, False])
def test_a_file_that_became_shorter_cannot_complete_its_reply(file: int, is_full: bool) -> None:
    ours, theirs = pair(socket.AF_UNIX)
    with ours, theirs:
        while is_full and not send(ours.fileno(), [bytes(1 << 20)]):
            pass
        with pytest.raises(OSError, match="shorter"):
            send_with_files(ours.fileno(), [FileRange(file, len(FILE) - 10, 20)])


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_the_kernel_cannot_send_from_is_read(
    file: int, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "sendfile", refuse)
    ours, theirs = pair(socket.AF_UNIX)
    with ours, theirs:
        left = send_with_files(ours.fileno(), [b"header", FileRange(file, 5, 100), b"more"])
        ours.shutdown(socket.SHUT_WR)
        assert received(theirs) == b"header"
        assert left == [FILE[5:105], b"more"]
