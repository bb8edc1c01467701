# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""QEMU's own client library drives our server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient

from nbdjobs.daemon.chardev_addresses import SocketOptions
from nbdjobs.qmp.server import QmpServer
from tests.qmp.monitors import open_monitor
from tests.qmp.toy import TOY_REGISTRY, ToyContext, ToyHappened


def test_the_client_library_executes_and_listens(tmp_path: Path) -> None:
    async def run() -> None:
        context = ToyContext()
        path = str(tmp_path / "qmp.sock")
        async with QmpServer(TOY_REGISTRY, context) as server:
            await open_monitor(server, SocketOptions(path=path, is_server=True, wait=False))
            client = QMPClient("test")
            await client.connect(path)
            version = await client.execute("query-version")
            assert isinstance(version, dict)
            assert version["qemu"]["major"] == 7
            assert await client.execute("toy-echo", {"text": "é"}) == {"text": "é"}
            with pytest.raises(ExecuteError) as refused:
                await client.execute("toy-refuse")
            assert refused.value.error_class == "DeviceNotFound"
            assert str(refused.value) == "no such toy"
            with client.listener("TOY_HAPPENED") as listener:
                server.broadcast(ToyHappened(text="x"))
                event = await listener.get()
            assert event["data"] == {"text": "x"}
            schema = await client.execute("query-qmp-schema")
            assert isinstance(schema, list)
            assert any(entry["name"] == "quit" for entry in schema)
            await client.disconnect()

    asyncio.run(run())


def test_several_clients_at_once(tmp_path: Path) -> None:
    async def run() -> None:
        path = str(tmp_path / "qmp.sock")
        async with QmpServer(TOY_REGISTRY, ToyContext()) as server:
            await open_monitor(server, SocketOptions(path=path, is_server=True, wait=False))
            clients = [QMPClient(f"client{number}") for number in range(5)]
            heard = EventListener("TOY_HAPPENED")
            clients[-1].register_listener(heard)
            for client in clients:
                await client.connect(path)
            held = asyncio.create_task(clients[0].execute("toy-hold", {"text": "x"}))
            for client in clients[1:]:
                assert await client.execute("toy-echo", {"text": "y"}) == {"text": "y"}
            server.broadcast(ToyHappened(text="z"))
            assert (await heard.get())["data"] == {"text": "z"}
            await clients[1].execute("toy-open")
            assert await held == {}
            for client in clients:
                await client.disconnect()

    asyncio.run(run())
