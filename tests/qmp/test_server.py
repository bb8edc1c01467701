# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop

from nbdjobs.daemon.chardev_addresses import SocketOptions
from nbdjobs.errors import CommandError
from nbdjobs.qmp.server import QmpServer, ServerLimits
from tests.qmp.monitors import open_monitor
from tests.qmp.toy import TOY_REGISTRY, ToyBare, ToyContext, ToyHappened

NOW_NS = 1_000_000_002_000


class Client:
    """A plain client that negotiates when it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def read(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await self.reader.readuntil(b"\r\n"))
        return message

    async def ask(self, command: str, **arguments: object) -> dict[str, Any]:
        self.send(command, **arguments)
        return await self.read()

    def send(self, command: str, **arguments: object) -> None:
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        self.writer.write(json.dumps(request).encode())


class Running:
    """A server on a unix socket and its clients."""

    def __init__(self, server: QmpServer, context: ToyContext, path: Path) -> None:
        self.server = server
        self.context = context
        self.path = path
        self.clients = contextlib.AsyncExitStack()

    async def connect(self, *, negotiate: bool = True) -> Client:
        client = Client(*await asyncio.open_unix_connection(self.path, limit=1 << 24))

        async def close() -> None:
            client.writer.close()
            with contextlib.suppress(ConnectionError):
                await client.writer.wait_closed()

        self.clients.push_async_callback(close)
        assert "QMP" in await client.read()
        if negotiate:
            assert await client.ask("qmp_capabilities") == {"return": {}}
        return client


@contextlib.asynccontextmanager
async def running(path: Path, limits: ServerLimits | None = None) -> AsyncIterator[Running]:
    context = ToyContext()
    server = QmpServer(
        TOY_REGISTRY,
        context,
        limits=limits,
        clock_ns=lambda: NOW_NS,
        is_over=lambda: context.has_quit,
    )
    async with server:
        socket_path = path / "qmp.sock"
        await open_monitor(server, SocketOptions(path=str(socket_path), is_server=True, wait=False))
        running = Running(server, context, socket_path)
        async with running.clients:
            yield running


Scenario = Callable[[Running], Awaitable[None]]


def play(path: Path, scenario: Scenario, limits: ServerLimits | None = None) -> None:
    """Run a scenario on both event loops: uvloop is used, and the standard one must do."""

    async def run() -> None:
        async with running(path, limits) as server:
            await scenario(server)

    for loop_factory in (asyncio.new_event_loop, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(run())


def test_the_socket_is_the_users_alone_and_goes_with_the_server(tmp_path: Path) -> None:
    async def scenario(running: Running) -> None:
        assert stat.S_IMODE(running.path.stat().st_mode) == 0o600

    play(tmp_path, scenario)
    assert list(tmp_path.iterdir()) == []


def test_a_long_command_holds_up_its_own_session_only(tmp_path: Path) -> None:
    async def scenario(running: Running) -> None:
        slow, other = await running.connect(), await running.connect()
        slow.send("toy-hold", text="held")
        slow.send("toy-echo", text="after")
        await running.context.entered.wait()
        assert await other.ask("toy-echo", text="meanwhile") == {"return": {"text": "meanwhile"}}
        await other.ask("toy-open")
        assert await slow.read() == {"return": {}}
        assert await slow.read() == {"return": {"text": "after"}}
        assert running.context.log == ["meanwhile", "held", "after"]

    play(tmp_path, scenario)


def test_a_flood_of_commands_waits_its_turn(tmp_path: Path) -> None:
    async def scenario(running: Running) -> None:
        flood, other = await running.connect(), await running.connect()
        texts = [str(number) for number in range(1000)]
        flood.send("toy-hold", text="first")
        await running.context.entered.wait()
        for text in texts:
            flood.send("toy-echo", text=text)
        await other.ask("toy-open")
        assert await flood.read() == {"return": {}}
        for text in texts:
            assert await flood.read() == {"return": {"text": text}}
        assert running.context.log == ["first", *texts]

    play(tmp_path, scenario)


def test_an_out_of_band_command_overtakes(tmp_path: Path) -> None:
    async def scenario(running: Running) -> None:
        client = await running.connect(negotiate=False)
        await client.ask("qmp_capabilities", enable=["oob"])
        client.send("toy-hold", text="held")
        await running.context.entered.wait()
        client.writer.write(b'{"exec-oob": "toy-open", "id": 1}')
        assert await client.read() == {"return": {}, "id": 1}
        assert await client.read() == {"return": {}}

    play(tmp_path, scenario)


def test_events_reach_all_who_have_negotiated(tmp_path: Path) -> None:
    async def scenario(running: Running) -> None:
        first, second = await running.connect(), await running.connect()
        silent = await running.connect(negotiate=False)
        running.server.broadcast(ToyHappened(text="x", count=2))
        event = {
            "timestamp": {"seconds": 1000, "microseconds": 2},
            "event": "TOY_HAPPENED",
            "data": {"text": "x", "count": 2},
        }
        assert await first.read() == event
        assert await second.read() == event
        assert await silent.ask("qmp_capabilities") == {"return": {}}
        running.server.broadcast(ToyBare())
        assert (await silent.read())["event"] == "TOY_BARE"

    play(tmp_path, scenario)


def test_a_client_that_reads_no_events_is_dropped_and_harms_nobody(tmp_path: Path) -> None:
    async def scenario(running: Running) -> None:
        deaf, other = await running.connect(), await running.connect()
        transport = cast(asyncio.ReadTransport, deaf.writer.transport)
        transport.pause_reading()
        for _ in range(20):
            running.server.broadcast(ToyHappened(text="x" * 100_000))
            assert (await other.read())["event"] == "TOY_HAPPENED"
        transport.resume_reading()
        rest = await deaf.reader.read(1 << 24)
        while chunk := await deaf.reader.read(1 << 24):
            rest += chunk
        assert len(rest) < 20 * 100_000
        assert await other.ask("toy-echo", text="on") == {"return": {"text": "on"}}

    play(tmp_path, scenario, ServerLimits(backlog=300_000))


def test_a_client_that_vanishes_harms_nobody(tmp_path: Path) -> None:
    async def scenario(running: Running) -> None:
        client, other = await running.connect(), await running.connect()
        client.send("toy-hold", text="held")
        client.send("toy-echo", text="never")
        await running.context.entered.wait()
        client.writer.transport.abort()
        running.server.broadcast(ToyBare())
        assert (await other.read())["event"] == "TOY_BARE"
        running.context.gate.set()
        assert await other.ask("toy-echo", text="on") == {"return": {"text": "on"}}
        assert running.context.log[0] == "held"

    play(tmp_path, scenario)


def test_what_was_asked_before_the_client_shut_its_side_is_answered(tmp_path: Path) -> None:
    async def scenario(running: Running) -> None:
        client = await running.connect()
        client.send("toy-echo", text="a")
        client.send("toy-echo", text="b")
        client.writer.write_eof()
        assert await client.read() == {"return": {"text": "a"}}
        assert await client.read() == {"return": {"text": "b"}}
        assert await client.reader.read() == b""

    play(tmp_path, scenario)


def test_bytes_that_are_no_json_leave_the_session_alive(tmp_path: Path) -> None:
    async def scenario(running: Running) -> None:
        client = await running.connect()
        client.writer.write(b"\xff\n")
        assert "JSON parse error" in (await client.read())["error"]["desc"]
        assert await client.ask("toy-echo", text="on") == {"return": {"text": "on"}}

    play(tmp_path, scenario)


def test_the_number_of_sessions_is_limited(tmp_path: Path) -> None:
    async def scenario(running: Running) -> None:
        await running.connect()
        reader, writer = await asyncio.open_unix_connection(running.path)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()

    play(tmp_path, scenario, ServerLimits(sessions=1))


def test_closing_ends_sessions_and_the_commands_they_run(tmp_path: Path) -> None:
    async def scenario(running: Running) -> None:
        client = await running.connect()
        client.send("toy-hold", text="held")
        await running.context.entered.wait()
        running.server.close()
        assert await client.reader.read() == b""
        assert running.context.log == []

    play(tmp_path, scenario)


def test_the_reply_to_quit_goes_out(tmp_path: Path) -> None:
    async def scenario(running: Running) -> None:
        client = await running.connect()
        running.context.quit = running.server.close  # type: ignore[method-assign]  # as the daemon
        client.send("quit")
        client.send("toy-echo", text="x")
        assert await client.read() == {"return": {}}
        assert await client.reader.read() == b""
        assert running.context.log == []

    play(tmp_path, scenario)


def test_nothing_is_executed_once_the_end_has_begun(tmp_path: Path) -> None:
    async def scenario(running: Running) -> None:
        first, second = await running.connect(), await running.connect(negotiate=False)
        await second.ask("qmp_capabilities", enable=["oob"])
        second.send("toy-hold", text="begun before")
        await running.context.entered.wait()
        second.send("toy-echo", text="x")
        first.send("quit")
        first.send("toy-echo", text="y")
        assert await first.read() == {"return": {}}
        second.writer.write(b'{"exec-oob": "toy-open"}')
        running.server.broadcast(ToyBare())
        assert (await first.read())["event"] == "TOY_BARE"
        assert (await second.read())["event"] == "TOY_BARE"
        running.context.gate.set()
        assert await second.read() == {"return": {}}  # what had begun is answered
        running.server.close()
        assert await first.reader.read() == b""
        assert await second.reader.read() == b""
        assert running.context.log == ["begun before"]

    play(tmp_path, scenario)


def test_a_pretty_monitor_is_indented(tmp_path: Path) -> None:
    async def scenario(running: Running) -> None:
        path = str(running.path.with_name("pretty.sock"))
        options = SocketOptions(path=path, is_server=True, wait=False)
        await open_monitor(running.server, options, pretty=True)
        reader, writer = await asyncio.open_unix_connection(path)
        assert await reader.readline() == b"{\n"
        assert await reader.readline() == b'    "QMP": {\n'
        writer.close()

    play(tmp_path, scenario)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_tcp_is_served(tmp_path: Path, host: str) -> None:
    if host == "::1" and not has_ipv6():
        pytest.skip("IPv6 is not available")

    async def scenario(running: Running) -> None:
        options = SocketOptions(host=host, port="0", is_server=True, wait=False)
        [listener, *_] = await open_monitor(running.server, options)
        reader, writer = await asyncio.open_connection(*listener.getsockname()[:2])
        assert b"QMP" in await reader.readline()
        writer.close()

    play(tmp_path, scenario)


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


def test_a_monitor_may_call_its_client(tmp_path: Path) -> None:
    async def scenario(running: Running) -> None:
        path = str(tmp_path / "manager.sock")
        greeting: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def called(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            greeting.set_result(await reader.readline())
            writer.close()

        async with await asyncio.start_unix_server(called, path):
            assert await open_monitor(running.server, SocketOptions(path=path)) == []
            assert b"QMP" in await greeting

    play(tmp_path, scenario)


def test_waiting_for_a_client_ends_when_it_comes(tmp_path: Path) -> None:
    async def scenario(running: Running) -> None:
        path = tmp_path / "wait.sock"
        options = SocketOptions(path=str(path), is_server=True, wait=True)
        async with asyncio.TaskGroup() as tasks:
            opening = tasks.create_task(open_monitor(running.server, options))
            await asyncio.sleep(0)  # the socket listens once the task has had its turn
            assert not opening.done()
            _, writer = await asyncio.open_unix_connection(path)
            assert len(await opening) == 1
            writer.close()

    play(tmp_path, scenario)


def test_a_stale_socket_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(stale))
    file = tmp_path / "file"
    file.write_text("precious")

    async def scenario(running: Running) -> None:
        await open_monitor(
            running.server, SocketOptions(path=str(stale), is_server=True, wait=False)
        )
        with pytest.raises(CommandError, match="Address already in use"):
            await open_monitor(
                running.server, SocketOptions(path=str(file), is_server=True, wait=False)
            )

    play(tmp_path, scenario)
    assert file.read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            SocketOptions(path="/nonexistent/x", is_server=True),
            "Failed to bind socket to /nonexistent/x: No such file or directory",
        ),
        (
            SocketOptions(path="/nonexistent"),
            "Failed to connect to '/nonexistent': No such file or directory",
        ),
        (
            SocketOptions(path="/tmp/" + "x" * 120, is_server=True),
            f"UNIX socket path '/tmp/{'x' * 120}' is too long",
        ),
        (
            SocketOptions(host="127.0.0.1", port="no-such", is_server=True),
            "address resolution failed for 127.0.0.1:no-such: "
            "Servname not supported for ai_socktype",
        ),
        (
            SocketOptions(host="::1", port="1", ipv6=False, is_server=True),
            "address resolution failed for ::1:1: Address family for hostname not supported",
        ),
        (
            SocketOptions(host="127.0.0.1", port="1"),
            "Failed to connect to '127.0.0.1:1': Connection refused",
        ),
    ],
)
def test_a_socket_that_cannot_be_had_is_refused(
    tmp_path: Path, options: SocketOptions, sentence: str
) -> None:
    async def scenario(running: Running) -> None:
        with pytest.raises(CommandError) as refused:
            await open_monitor(running.server, options)
        assert refused.value.description == sentence

    play(tmp_path, scenario)
