# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A whole daemon inside the test: QMP and NBD over real sockets, disks in memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from nbdjobs.daemon.chardev_addresses import SocketOptions
from nbdjobs.daemon.daemon import Daemon
from nbdjobs.qmp.commands import REGISTRY
from nbdjobs.qmp.server import QmpServer
from tests.nodes.faults import MemoryNode
from tests.protocol.client import Client
from tests.qmp.monitors import open_monitor

MIB = 1024 * 1024


class Monitor:
    """A QMP session."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.events: list[dict[str, Any]] = []
        self._reader = reader
        self._writer = writer

    async def ask(self, command: str, **arguments: object) -> dict[str, Any]:
        """Execute a command; the whole reply. Events that come first are put aside."""
        self.send(command, **arguments)
        return await self.reply()

    def send(self, command: str, **arguments: object) -> None:
        named = arguments  # only this command's arguments are from before the hyphens
        if command != "block_set_io_throttle":
            named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._writer.write(json.dumps({"execute": command, "arguments": named}).encode())

    async def reply(self) -> dict[str, Any]:
        while "event" in (message := await self._read()):
            self.events.append(message)
        return message

    async def get(self, command: str, **arguments: object) -> Any:
        """Execute a command that has to succeed; what it returns."""
        reply = await self.ask(command, **arguments)
        assert "return" in reply, reply
        return reply["return"]

    async def refusal(self, command: str, **arguments: object) -> str:
        """Execute a command that has to be refused; why."""
        reply = await self.ask(command, **arguments)
        description: str = reply["error"]["desc"]
        return description

    async def event(self, name: str, **data: object) -> dict[str, Any]:
        """Wait for an event with that data among its own, and drop those before it."""
        while True:
            message = self.events.pop(0) if self.events else await self._read()
            found: dict[str, Any] = message.get("data", {})
            if message.get("event") == name and found.items() >= data.items():
                return found

    async def _read(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await self._reader.readline())
        return message

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


class Rig:
    """The daemon and what tests do with it."""

    def __init__(self, daemon: Daemon, directory: Path):
        self.daemon = daemon
        self.nbd_path = str(directory / "nbd.sock")
        self.qmp_path = str(directory / "qmp.sock")
        self.closing = contextlib.AsyncExitStack()

    def add_disk(self, name: str, content: bytes | int = MIB) -> MemoryNode:
        disk = MemoryNode(content, name=name)
        disk.is_owned_by_user = True
        self.daemon.graph.add(disk)
        return disk

    async def monitor(self) -> Monitor:
        monitor = Monitor(*await asyncio.open_unix_connection(self.qmp_path, limit=1 << 24))
        self.closing.push_async_callback(monitor.close)
        await monitor.reply()
        await monitor.get("qmp_capabilities")
        return monitor

    async def start_nbd(self, monitor: Monitor) -> None:
        await monitor.get(
            "nbd-server-start", addr={"type": "unix", "data": {"path": self.nbd_path}}
        )

    async def export(self, monitor: Monitor, node: str, **options: object) -> None:
        arguments = {"type": "nbd", "id": f"export-{node}", "node-name": node, "writable": True}
        await monitor.get("block-export-add", **(arguments | options))

    async def client(self, name: str) -> Client:
        client = await Client.attach(self.nbd_path, name=name)
        self.closing.push_async_callback(client.close)
        return client


@contextlib.asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Rig]:
    """A daemon with a QMP socket; at the end it has to have let go of everything."""
    daemon = Daemon()
    async with QmpServer(REGISTRY, daemon) as monitors:
        daemon.subscribe(monitors.broadcast)
        rig = Rig(daemon, directory)
        await open_monitor(monitors, SocketOptions(path=rig.qmp_path, is_server=True, wait=False))
        try:
            async with rig.closing:
                yield rig
        finally:
            await daemon.shutdown()
    assert not daemon.graph.nodes
    assert not list(daemon.jobs)
    assert not list(daemon.exports)
    assert not await asyncio.to_thread(os.path.lexists, rig.nbd_path)
    assert not await asyncio.to_thread(os.path.lexists, rig.qmp_path)
