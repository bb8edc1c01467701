# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Addresses that need more than a path or a port."""

from __future__ import annotations

import asyncio
import secrets
import socket
from pathlib import Path

import pytest

from nbdjobs.daemon.addresses import InetSocketAddress, UnixSocketAddress, bind, bind_abstract
from nbdjobs.errors import CommandError
from tests.daemon.rig import running


@pytest.mark.parametrize(("tight", "length"), [(None, 0), (True, 0), (False, 108)])
def test_an_abstract_name_ends_with_its_text_or_is_filled_up(
    tight: bool | None, length: int
) -> None:
    name = f"nbdjobs-{secrets.token_hex(8)}"
    address = UnixSocketAddress(type="unix", path=name, abstract=True, tight=tight)
    with bind_abstract(address) as bound, socket.socket(socket.AF_UNIX) as client:
        bound.listen()
        client.connect((b"\0" + name.encode()).ljust(length, b"\0"))


def test_an_abstract_name_that_is_taken_is_refused() -> None:
    address = UnixSocketAddress(type="unix", path=f"nbdjobs-{secrets.token_hex(8)}", abstract=True)
    with bind_abstract(address), pytest.raises(CommandError, match="Address already in use"):
        bind_abstract(address)


def test_the_server_listens_on_an_abstract_name(tmp_path: Path) -> None:
    name = f"nbdjobs-{secrets.token_hex(8)}"

    async def run() -> None:
        async with running(tmp_path) as rig:
            monitor = await rig.monitor()
            data = {"path": name, "abstract": True}
            await monitor.get("nbd-server-start", addr={"type": "unix", "data": data})
            assert rig.daemon.exports.addresses == [f"@{name}"]
            reader, writer = await asyncio.open_unix_connection(f"\0{name}")
            assert await reader.readexactly(8) == b"NBDMAGIC"
            writer.close()
            await writer.wait_closed()

    asyncio.run(run())
    assert not Path(name).exists()


def test_a_tcp_address_may_be_one_of_several_paths() -> None:
    address = InetSocketAddress(type="inet", host="127.0.0.1", port="0", mptcp=True)
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP).close()
    except OSError:  # a kernel without it
        with pytest.raises(CommandError, match="Failed to bind socket"):
            asyncio.run(bind(address))
        return
    [bound] = asyncio.run(bind(address))
    with bound:
        assert bound.proto == socket.IPPROTO_MPTCP
