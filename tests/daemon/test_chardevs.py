# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Sockets that wait for their user: they listen and call as soon as they are made."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from nbdjobs.daemon.chardev_addresses import SocketOptions
from nbdjobs.daemon.chardev_socket import SocketChardev
from nbdjobs.daemon.chardevs import ChardevBackend
from nbdjobs.daemon.daemon import Daemon
from nbdjobs.errors import CommandError
from nbdjobs.qapi.visitor import visit
from nbdjobs.qmp.commands import REGISTRY
from nbdjobs.qmp.server import QmpServer

Scenario = Callable[[Daemon, QmpServer], Awaitable[None]]


def play(scenario: Scenario) -> None:
    """Run a scenario on both event loops, with a daemon and its monitors."""

    async def run() -> None:
        daemon = Daemon()
        async with QmpServer(REGISTRY, daemon) as monitors:
            try:
                await scenario(daemon, monitors)
            finally:
                await daemon.shutdown()

    for loop_factory in (asyncio.new_event_loop, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(run())


def unix(path: Path, **options: object) -> ChardevBackend:
    address = {"type": "unix", "data": {"path": str(path)}}
    return visit(ChardevBackend, {"type": "socket", "data": {"addr": address, **options}})


def tcp(**options: object) -> ChardevBackend:
    address = {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}
    return visit(ChardevBackend, {"type": "socket", "data": {"addr": address, **options}})


async def added(daemon: Daemon, name: str, backend: ChardevBackend) -> SocketChardev:
    await daemon.chardevs.add(name, backend)
    found = daemon.chardevs.find(name)
    assert isinstance(found, SocketChardev)
    return found


async def greeting(reader: asyncio.StreamReader) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(await reader.readline())
    return message


def test_a_client_may_come_before_the_monitor_does(tmp_path: Path) -> None:
    async def scenario(daemon: Daemon, monitors: QmpServer) -> None:
        path = tmp_path / "early.sock"
        chardev = await added(daemon, "c", unix(path, wait=False))
        assert chardev.filename == f"disconnected:unix:{path},server=on"
        reader, writer = await asyncio.open_unix_connection(path)
        await monitors.attach(chardev)
        assert "QMP" in await greeting(reader)
        assert chardev.filename == f"unix:{path},server=on"
        with pytest.raises(CommandError, match="Chardev 'c' is busy"):
            await daemon.chardevs.remove("c")
        writer.close()

    play(scenario)
    assert list(tmp_path.iterdir()) == []


def test_making_one_waits_for_its_first_client_if_it_should(tmp_path: Path) -> None:
    async def scenario(daemon: Daemon, monitors: QmpServer) -> None:
        path = tmp_path / "wait.sock"
        adding = asyncio.create_task(added(daemon, "c", unix(path, wait=True)))
        await asyncio.sleep(0)  # it listens once the task has had its turn
        assert daemon.chardevs.find("c") is None
        reader, writer = await asyncio.open_unix_connection(path)
        chardev = await adding
        assert chardev.filename == f"unix:{path},server=on"
        await monitors.attach(chardev)
        assert "QMP" in await greeting(reader)
        writer.close()

    play(scenario)


def test_giving_up_the_wait_closes_the_socket(tmp_path: Path) -> None:
    async def scenario(daemon: Daemon, monitors: QmpServer) -> None:
        adding = asyncio.create_task(added(daemon, "c", unix(tmp_path / "x", wait=True)))
        await asyncio.sleep(0)
        adding.cancel()
        await asyncio.wait([adding])
        await added(daemon, "c", unix(tmp_path / "x", wait=False))

    play(scenario)
    assert list(tmp_path.iterdir()) == []


def test_several_monitors_each_have_their_form(tmp_path: Path) -> None:
    async def scenario(daemon: Daemon, monitors: QmpServer) -> None:
        plain = await added(daemon, "plain", unix(tmp_path / "plain", wait=False))
        pretty = await added(daemon, "pretty", tcp(wait=False))
        await monitors.attach(plain)
        await monitors.attach(pretty, pretty=True)
        reader, writer = await asyncio.open_unix_connection(tmp_path / "plain")
        port = pretty.listeners[0].getsockname()[1]
        assert pretty.filename == f"disconnected:tcp:127.0.0.1:{port},server=on"
        other, other_writer = await asyncio.open_connection("127.0.0.1", port)
        assert (await reader.readline()).startswith(b'{"QMP": {')
        assert await other.readline() == b"{\n"
        own = other_writer.get_extra_info("sockname")[1]
        assert pretty.filename == f"tcp:127.0.0.1:{port},server=on <-> 127.0.0.1:{own}"
        for each in (writer, other_writer):
            each.close()

    play(scenario)


def test_a_new_socket_at_the_same_path_is_not_removed_with_the_old(tmp_path: Path) -> None:
    async def scenario(daemon: Daemon, monitors: QmpServer) -> None:
        path = tmp_path / "same.sock"
        await added(daemon, "c", unix(path, wait=False))
        await daemon.chardevs.change("c", unix(path, wait=False))
        chardev = daemon.chardevs.find("c")
        assert isinstance(chardev, SocketChardev)
        await monitors.attach(chardev)
        reader, writer = await asyncio.open_unix_connection(path)
        assert "QMP" in await greeting(reader)
        writer.close()
        with pytest.raises(CommandError, match="Chardev user does not support chardev hotswap"):
            await daemon.chardevs.change("c", unix(path, wait=False))

    play(scenario)


class Pauses:
    """Stands for the clock between two calls: it goes on when the test says so."""

    def __init__(self) -> None:
        self.seconds: asyncio.Queue[float] = asyncio.Queue()
        self._go_on = asyncio.Semaphore(0)

    async def sleep(self, seconds: float) -> None:
        self.seconds.put_nowait(seconds)
        await self._go_on.acquire()

    async def end_one(self) -> float:
        """Wait until somebody pauses, and let it go on; how long it wanted to wait."""
        seconds = await self.seconds.get()
        self._go_on.release()
        return seconds


def test_a_caller_calls_again_until_somebody_answers_and_when_it_is_gone(tmp_path: Path) -> None:
    async def scenario(daemon: Daemon, monitors: QmpServer) -> None:
        path, pauses = tmp_path / "manager.sock", Pauses()
        options = SocketOptions(path=str(path), reconnect=7)
        chardev = SocketChardev("c", options, sleep=pauses.sleep)
        await chardev.open()
        await monitors.attach(chardev)
        assert await pauses.end_one() == 7  # nobody was there
        calls: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

        def called(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            calls.put_nowait((reader, writer))

        await pauses.seconds.get()
        async with await asyncio.start_unix_server(called, path):
            pauses._go_on.release()
            for _ in range(2):
                reader, writer = await calls.get()
                assert "QMP" in await greeting(reader)
                assert chardev.filename == "unix:"
                writer.close()
                assert await pauses.end_one() == 7
            reader, writer = await calls.get()
            await chardev.close()
            writer.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    play(scenario)


def test_a_peer_that_was_called_waits_for_the_monitor(tmp_path: Path) -> None:
    async def scenario(daemon: Daemon, monitors: QmpServer) -> None:
        path = tmp_path / "manager.sock"
        calls: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

        def called(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            calls.put_nowait((reader, writer))

        async with await asyncio.start_unix_server(called, path):
            chardev = await added(daemon, "c", unix(path, server=False))
            reader, writer = await calls.get()
            await monitors.attach(chardev)
            assert "QMP" in await greeting(reader)
            writer.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    play(scenario)


def test_a_ring_buffer_keeps_the_last_bytes_only() -> None:
    async def scenario(daemon: Daemon, monitors: QmpServer) -> None:
        for name, size in (("big", 1 << 40), ("none", 0)):
            backend = visit(ChardevBackend, {"type": "ringbuf", "data": {"size": size}})
            await daemon.chardevs.add(name, backend)
            ask = REGISTRY.find("ringbuf-write").execute
            await ask(daemon, {"device": name, "data": "abc"})
        read = REGISTRY.find("ringbuf-read").execute
        assert await read(daemon, {"device": "big", "size": 1 << 62}) == "abc"
        assert await read(daemon, {"device": "none", "size": 1}) == ""

    play(scenario)
