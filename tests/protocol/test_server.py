# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop

from nbdjobs.protocol import listener as listener_module
from nbdjobs.protocol.constants import Command, HeaderStyle, NbdError, Option
from nbdjobs.protocol.constants import OptionReplyType as Kind
from nbdjobs.protocol.export import Export
from nbdjobs.protocol.listener import Listener
from nbdjobs.protocol.messages import ExportQuery
from nbdjobs.protocol.server import FULL_HANDSHAKE_LIMIT_S, HANDSHAKE_LIMIT_S, Server
from nbdjobs.protocol.turns import ALONE
from tests.protocol.client import Client
from tests.protocol.rig import SIZE, MemoryDisk, Rig, running


async def turns(count: int = 20) -> None:
    """Let everything happen that is due already."""
    for _ in range(count):
        await asyncio.sleep(0)


def is_there(path: str) -> bool:
    return os.path.lexists(path)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await turns(1)


async def until_unused(rig: Rig, export: Export) -> None:
    await until(lambda: export in rig.unused)


def test_bad_magic_ends_the_connection() -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path)
            client.writer.write(client.pack(Command.FLUSH, magic=0x12345678))
            assert await client.is_closed_by_server()
            assert rig.disk.calls == []
            await client.close()

    asyncio.run(main())


@pytest.mark.parametrize("style", list(HeaderStyle))
def test_an_oversized_write_is_refused_and_ends_the_connection(style: HeaderStyle) -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path, style=style)
            header = client.pack(Command.WRITE, 0, 2**25 + 1)
            client.writer.write(header)
            assert (await client.reply())[-1].error == NbdError.EINVAL
            assert await client.is_closed_by_server()
            await client.close()

    asyncio.run(main())


def test_disc_ends_the_connection_after_requests_in_flight() -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path)
            gate = rig.disk.hold("pwrite")
            client.send(Command.WRITE, 0, payload=b"last words")
            client.send(Command.DISC)
            client.send(Command.WRITE, 0, payload=b"nobody listens")
            await gate.reached()
            rig.disk.unhold("pwrite")
            assert not (await client.reply())[0].error
            assert await client.is_closed_by_server()
            assert rig.disk.content[:10] == b"last words"
            await client.close()

    asyncio.run(main())


def test_a_half_closed_client_still_gets_its_replies() -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path)
            gate = rig.disk.hold("pwrite")
            client.send(Command.WRITE, 0, payload=b"data")
            client.writer.write_eof()
            await gate.reached()
            rig.disk.unhold("pwrite")
            assert not (await client.reply())[0].error
            assert await client.is_closed_by_server()
            await client.close()

    asyncio.run(main())


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_half_closed_client_gets_even_what_had_to_wait_its_turn(loop: object) -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path)
            gate = rig.disk.hold("flush")
            client.writer.write(b"".join(client.pack(Command.FLUSH) for _ in range(300)))
            client.writer.write_eof()
            await gate.reached(ALONE.waiting)
            await turns()
            rig.disk.unhold("flush")
            for _ in range(300):
                assert not (await client.reply())[0].error
            assert await client.is_closed_by_server()
            await client.close()

    with asyncio.Runner(loop_factory=loop) as runner:  # type: ignore[arg-type]  # a factory
        runner.run(main())


@pytest.mark.parametrize(("how", "requests"), [("closed", 50), ("cut off", 200)])
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_writes_that_a_disk_holds_back_go_with_their_client(
    loop: object, how: str, requests: int
) -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path)
            gate = rig.disk.hold("pwrite")
            rig.disk.is_held = True
            write = client.pack(Command.WRITE, payload=b"never")
            client.writer.write(write * requests)
            await gate.reached(min(requests, ALONE.waiting))
            if how == "closed":
                client.writer.transport.abort()
            else:
                rig.server.disconnect_clients(rig.export)
            await until_unused(rig, rig.export)
            assert rig.server.connection_count == 0
            rig.disk.unhold("pwrite")
            await turns()
            assert not any(rig.disk.content)
            await client.close()

    with asyncio.Runner(loop_factory=loop) as runner:  # type: ignore[arg-type]  # a factory
        runner.run(main())


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_write_goes_on_when_its_client_is_gone(loop: object) -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path)
            gate = rig.disk.hold("pwrite")
            client.send(Command.WRITE, 0, payload=b"whole")
            await gate.reached()
            client.writer.transport.abort()
            await turns()
            assert rig.server.client_count(rig.export) == 1
            assert rig.unused == []
            rig.disk.unhold("pwrite")
            await until_unused(rig, rig.export)
            assert rig.disk.content[:5] == b"whole"
            assert rig.server.connection_count == 0

    with asyncio.Runner(loop_factory=loop) as runner:  # type: ignore[arg-type]  # a factory
        runner.run(main())


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\0\0",
        b"\0\0\0\3",
        b"\0\0\0\3IHAVEOPT\0\0\0",
        b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\6\0\0",
        b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\6\0\0\0\0\0\0",
        b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\6\0\0\0\0\0\0\x25\x60\x95\x13\0\0\0\1",
        b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\6\0\0\0\0\0\0"
        + struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, 1000)
        + b"half a payload",
    ],
)
@pytest.mark.parametrize("how", ["close", "abort"])
def test_clients_may_leave_in_every_phase(sent: bytes, how: str) -> None:
    async def main() -> None:
        async with running() as rig:
            _, writer = await asyncio.open_unix_connection(rig.path)
            writer.write(sent)
            await writer.drain()
            if how == "close":
                writer.close()
            else:
                writer.transport.abort()
            await until(lambda: rig.clock.timers and not rig.server.connection_count)
            assert rig.disk.calls == []
            assert all(timer.is_cancelled for timer in rig.clock.timers)

    asyncio.run(main())


def test_a_client_that_takes_no_replies_costs_bounded_memory() -> None:
    async def main() -> None:
        async with running() as rig:
            rig.disk.is_data_known = True
            client = await Client.attach(rig.path)
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # it has it
            count = 2000
            client.writer.write(b"".join(client.pack(Command.READ, 0, SIZE) for _ in range(count)))
            await until(lambda: rig.disk.calls)
            await turns(200)
            begun = len(rig.disk.calls)
            assert begun < 10
            other = await Client.attach(rig.path)
            assert len(await other.read(0, 10)) == 10
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]  # it has it
            for _ in range(20):
                assert len((await client.reply())[0].payload) == SIZE + 8
            await other.close()
            client.writer.transport.abort()

    asyncio.run(main())


def test_negotiation_waits_for_a_client_that_takes_no_answers() -> None:
    async def main() -> None:
        async with running() as rig:
            for number in range(200):
                name = f"{number}".ljust(2000, "x")
                rig.server.add_export(replace(rig.export, name=name))
            client = await Client.connect(rig.path)
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # it has it
            one = struct.pack(">8sII", b"IHAVEOPT", Option.LIST, 0)
            client.writer.write(one * 50)
            await turns(200)
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]  # it has it
            servers = 0
            acks = 0
            while acks < 50:
                header = await client.reader.readexactly(20)
                _, _, kind, length = struct.unpack(">QIII", header)
                await client.reader.readexactly(length)
                servers += kind == Kind.SERVER
                acks += kind == Kind.ACK
            assert servers == 50 * 202
            await client.close()

    asyncio.run(main())


def test_clients_beyond_the_limit_wait_until_one_ends() -> None:
    async def main() -> None:
        async with running(max_connections=2) as rig:
            first = await Client.attach(rig.path)
            second = await Client.connect(rig.path)
            waiting = asyncio.ensure_future(Client.attach(rig.path))
            await turns()
            assert not waiting.done()
            assert rig.server.connection_count == 2
            first.send(Command.DISC)
            third = await waiting
            await third.write(0, b"in")
            for client in (first, second, third):
                await client.close()

    asyncio.run(main())


def test_clients_that_only_begin_to_negotiate_make_room_when_all_is_full() -> None:
    async def main() -> None:
        async with running(max_connections=4) as rig:
            attached = await Client.attach(rig.path)
            halves = [await Client.connect(rig.path) for _ in range(2)]
            rig.clock.expire(FULL_HANDSHAKE_LIMIT_S)
            assert rig.server.connection_count == 3
            halves.append(await Client.connect(rig.path))
            waiting = asyncio.ensure_future(Client.attach(rig.path))
            await turns()
            assert not waiting.done()
            rig.clock.expire(FULL_HANDSHAKE_LIMIT_S)
            late = await waiting
            for client in halves:
                assert await client.is_closed_by_server()
            for client in (attached, late):
                await client.write(0, b"served")
            for client in (attached, late, *halves):
                await client.close()

    asyncio.run(main())


def test_clients_that_have_negotiated_meanwhile_stay_when_all_is_full() -> None:
    async def main() -> None:
        async with running(max_connections=2) as rig:
            first = await Client.attach(rig.path)
            second = await Client.connect(rig.path)
            await turns()
            assert (await second.option(Option.GO, ExportQuery("", ()).pack()))[-1].kind is Kind.ACK
            rig.clock.expire(FULL_HANDSHAKE_LIMIT_S)
            await first.write(0, b"served")
            assert rig.server.connection_count == 2
            for client in (first, second):
                await client.close()

    asyncio.run(main())


def test_clients_of_an_export_whose_disk_hangs_leave_connections_to_others() -> None:
    """They come, ask, are gone and come again; what they asked for never ends."""

    async def main() -> None:
        async with running(max_connections=24) as rig:
            healthy = replace(rig.export, name="healthy", backend=MemoryDisk())
            rig.server.add_export(healthy)
            gate = rig.disk.hold("flush")
            # A quarter of 24 is kept for three exports: two connections for each.
            for number in range(1, 21):
                client = await Client.attach(rig.path)
                client.send(Command.FLUSH)
                await gate.reached(number)
                client.writer.transport.abort()
            late = await Client.connect(rig.path)
            (refused,) = await late.option(Option.GO, ExportQuery("", ()).pack())
            assert refused.kind is Kind.ERR_POLICY
            await late.close()
            clients = [await Client.attach(rig.path, name="healthy") for _ in range(2)]
            for client in clients:
                await client.write(0, b"served")
            assert rig.server.client_count(rig.export) == 20
            rig.disk.unhold("flush")
            await until_unused(rig, rig.export)
            clients.append(await Client.attach(rig.path))
            await clients[-1].write(0, b"served again")
            for client in clients:
                await client.close()

    asyncio.run(main())


def test_one_export_may_have_all_connections() -> None:
    async def main() -> None:
        async with running(max_connections=8) as rig:
            rig.server.remove_export("other")
            clients = [await Client.attach(rig.path) for _ in range(8)]
            for client in clients:
                await client.close()

    asyncio.run(main())


def test_no_limit_is_a_limit_of_0() -> None:
    async def main() -> None:
        async with running(max_connections=0) as rig:
            clients = [await Client.attach(rig.path) for _ in range(110)]
            assert rig.server.connection_count == 110
            for client in clients:
                await client.close()

    asyncio.run(main())


@pytest.mark.parametrize("sent", [b"", b"\0\0\0\3", b"\0\0\0\3IHAVEOPT\0\0\0\3\0\0"])
def test_negotiation_has_a_time_limit(sent: bytes) -> None:
    async def main() -> None:
        async with running() as rig:
            attached = await Client.attach(rig.path)
            reader, writer = await asyncio.open_unix_connection(rig.path)
            await reader.readexactly(18)
            writer.write(sent)
            await turns()
            rig.clock.expire(HANDSHAKE_LIMIT_S)
            assert await Client(reader, writer).is_closed_by_server()
            await attached.write(0, b"not meant")
            writer.close()
            await attached.close()

    asyncio.run(main())


def test_a_time_limit_of_0_is_none() -> None:
    async def main() -> None:
        async with running(handshake_limit_s=0, max_connections=1) as rig:
            client = await Client.connect(rig.path)
            await turns()
            assert rig.clock.timers == []
            assert (await client.option(Option.LIST))[-1].kind is Kind.ACK
            await client.close()

    asyncio.run(main())


def test_a_removed_export_is_not_offered_and_its_clients_stay() -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path)
            assert rig.server.remove_export("") is rig.export
            late = await Client.connect(rig.path)
            replies = await late.option(Option.GO, ExportQuery("", ()).pack())
            assert replies[0].kind is Kind.ERR_UNKNOWN
            await client.write(0, b"still here")
            assert rig.server.client_count(rig.export) == 1
            assert rig.unused == []
            client.send(Command.DISC)
            await until_unused(rig, rig.export)
            assert rig.server.client_count(rig.export) == 0
            with pytest.raises(KeyError):
                rig.server.remove_export("")
            await client.close()
            await late.close()

    asyncio.run(main())


def test_clients_of_one_export_can_be_cut_off() -> None:
    async def main() -> None:
        async with running() as rig:
            one, two = await Client.attach(rig.path), await Client.attach(rig.path)
            other = await Client.attach(rig.path, name="other")
            gate = rig.disk.hold("pwrite")
            one.send(Command.WRITE, 0, payload=b"in flight")
            await gate.reached()
            rig.server.disconnect_clients(rig.export)
            assert await two.is_closed_by_server()
            await turns()
            assert rig.unused == []
            rig.disk.unhold("pwrite")
            await until_unused(rig, rig.export)
            assert rig.disk.content[:9] == b"in flight"
            assert rig.unused == [rig.export]
            assert await other.read(0, 9) == b"in flight"
            for client in (one, two, other):
                await client.close()

    asyncio.run(main())


def test_names_are_taken_once() -> None:
    async def main() -> None:
        async with running() as rig:
            with pytest.raises(ValueError, match="already has export named ''"):
                rig.server.add_export(rig.export)

    asyncio.run(main())


def test_closing_answers_requests_in_flight_first() -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path)
            gate = rig.disk.hold("pwrite")
            client.send(Command.WRITE, 0, payload=b"data")
            await gate.reached()
            closing = asyncio.ensure_future(rig.server.close())
            await turns()
            assert not closing.done()
            assert not is_there(rig.path)
            rig.disk.unhold("pwrite")
            assert not (await client.reply())[0].error
            await closing
            assert await client.is_closed_by_server()
            await client.close()

    asyncio.run(main())


def test_closing_gives_up_on_a_stuck_disk() -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path)
            gate = rig.disk.hold("flush")
            client.send(Command.FLUSH)
            await gate.reached()
            await rig.server.close(grace_s=0)
            assert rig.server.connection_count == 0
            await client.close()

    asyncio.run(main())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_tcp_over_both_families(host: str) -> None:
    async def main() -> None:
        server = Server()
        server.add_export(Export(name="", backend=MemoryDisk()))
        try:
            address = server.listen_tcp(host, 0)[0]
        except OSError:
            pytest.skip(f"this machine has no {host}")
        reader, writer = await asyncio.open_connection(*address)
        assert (await reader.readexactly(8)) == b"NBDMAGIC"
        writer.close()
        await server.close()

    asyncio.run(main())


def test_a_port_that_is_taken_is_named() -> None:
    async def main() -> None:
        server = Server()
        _, port = server.listen_tcp("127.0.0.1", 0)[0]
        with pytest.raises(OSError, match=f"127.0.0.1:{port}"):
            server.listen_tcp("127.0.0.1", port)
        await server.close()

    asyncio.run(main())


def test_a_left_over_socket_is_replaced_and_the_own_one_removed(tmp_path: Path) -> None:
    async def main() -> None:
        path = str(tmp_path / "s")
        old = socket.socket(socket.AF_UNIX)
        old.bind(path)
        old.close()
        server = Server()
        server.listen_unix(path)
        assert server.addresses == [path]
        await server.close()
        assert not is_there(path)

    asyncio.run(main())


def test_only_sockets_are_replaced_and_only_own_ones_removed(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "s"
        path.write_text("precious")
        server = Server()
        with pytest.raises(OSError, match="Failed to bind socket"):
            server.listen_unix(str(path))
        assert path.read_text() == "precious"
        path.unlink()
        server.listen_unix(str(path))
        path.unlink()
        path.write_text("of another")
        await server.close()
        assert path.read_text() == "of another"

    asyncio.run(main())


def test_the_file_of_a_passed_socket_stays(tmp_path: Path) -> None:
    async def main() -> None:
        path = str(tmp_path / "s")
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(path)
        server = Server()
        server.listen(sock)
        assert server.addresses == [path]
        await server.close()
        assert is_there(path)
        assert sock.fileno() == -1

    asyncio.run(main())


def test_a_passed_socket_that_cannot_listen_stays_open() -> None:
    async def main() -> None:
        server = Server()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            with pytest.raises(OSError, match="not supported"):
                server.listen(sock)
            assert sock.fileno() != -1
        assert server.addresses == []
        await server.close()

    asyncio.run(main())


class Exhausted(socket.socket):
    """A listening socket whose system has no file descriptor left."""

    attempts = 0
    has_room = False

    def accept(self) -> tuple[socket.socket, object]:
        self.attempts += 1
        if not self.has_room:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


@pytest.mark.parametrize(("rest_s", "is_accepted"), [(1e6, False), (0.0, True)])
def test_without_file_descriptors_it_rests_before_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rest_s: float, is_accepted: bool
) -> None:
    async def main() -> None:
        monkeypatch.setattr(listener_module, "REST_S", rest_s)
        sock = Exhausted(socket.AF_UNIX)
        sock.bind(str(tmp_path / "s"))
        accepted: list[socket.socket] = []
        listener = Listener(sock, accepted.append)
        listener.set_accepting(True)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "s"))
            await until(lambda: sock.attempts)
            sock.has_room = True
            if is_accepted:
                await until(lambda: accepted)
                accepted.pop().close()
            else:
                await turns()
                assert sock.attempts == 1
        listener.close()

    asyncio.run(main())


def test_a_grown_receive_buffer_shrinks_again() -> None:
    async def main() -> None:
        async with running(size=8 * SIZE) as rig:
            client = await Client.attach(rig.path)
            await client.write(0, bytes(4 * SIZE))
            (connection,) = rig.server._connections
            assert connection._incoming.capacity > 4 * SIZE
            rig.clock.expire(2.0)
            rig.clock.expire(2.0)
            assert connection._incoming.capacity <= SIZE
            await client.write(0, b"go on")
            await client.close()

    asyncio.run(main())
