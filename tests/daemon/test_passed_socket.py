# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`addr.type=fd`: a socket that the process was started with, and QEMU's words for bad ones."""

from __future__ import annotations

import asyncio
import os
import socket
import sys

import pytest

from nbdjobs.daemon.addresses import FdSocketAddress, passed_socket
from nbdjobs.daemon.daemon import Daemon
from nbdjobs.daemon.exports import NbdServerOptions
from nbdjobs.errors import CommandError
from nbdjobs.qapi.keyval import parse_option
from nbdjobs.qapi.visitor import visit
from tests.interop.tools import run_for_result


def options(number: int | str) -> NbdServerOptions:
    value, is_keyval = parse_option(f"addr.type=fd,addr.str={number}")
    return visit(NbdServerOptions, value, keyval=is_keyval)


def test_the_server_listens_at_a_passed_socket() -> None:
    async def main() -> None:
        daemon = Daemon()
        listener = socket.create_server(("127.0.0.1", 0))
        address = listener.getsockname()
        await daemon.exports.start_server(options(listener.detach()))
        assert daemon.exports.addresses == [address]
        await daemon.shutdown()

    asyncio.run(main())


def test_a_socket_that_cannot_listen_is_closed_and_leaves_no_server() -> None:
    async def main() -> None:
        daemon = Daemon()
        descriptor = socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach()
        with pytest.raises(CommandError, match="Failed to listen on socket: Operation not"):
            await daemon.exports.start_server(options(descriptor))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
        assert not daemon.exports.is_server_running

    asyncio.run(main())


@pytest.mark.interop
@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        ("0", "File descriptor '0' is not a socket"),
        ("99999", "File descriptor '99999' is not a socket"),
        ("foo", "Unable to parse FD number foo"),
        ("3x", "Unable to parse FD number 3x"),
    ],
)
@pytest.mark.parametrize("program", ["nbdjobs", "qemu-storage-daemon"])
def test_what_is_no_socket_is_refused_in_the_same_words(
    program: str, number: str, sentence: str
) -> None:
    words = [sys.executable, "-m", "nbdjobs", "daemon"] if program == "nbdjobs" else [program]
    option = f"addr.type=fd,addr.str={number}"
    ended = run_for_result(*words, "--nbd-server", option)
    assert ended.returncode == 1
    assert ended.stderr == f"{program}: --nbd-server {option}: {sentence}\n"


@pytest.mark.parametrize("number", ["9" * 20, "²", "-1", ""])
def test_odd_numbers_are_refused(number: str) -> None:
    with pytest.raises(CommandError):
        passed_socket(FdSocketAddress(type="fd", number=number))
