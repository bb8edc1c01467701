# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed: whatever bytes come, they are answered or refused in the way that is promised.

A target is one function under `@target(...)`. It takes any bytes and raises when something is
wrong with what is made of them; the seeds are where fuzzing begins. Everything else (the test,
`make fuzz`, its guidance) goes by the table `TARGETS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import struct
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from nbdjobs.cli.config import read_config
from nbdjobs.cli.daemon_chardev import ChardevOptions
from nbdjobs.cli.daemon_options import UsageError, parse_command_line
from nbdjobs.cli.daemon_setup import MonitorOptions
from nbdjobs.daemon.exports import BlockExportOptions, NbdServerOptions
from nbdjobs.daemon.object_options import ObjectOptions
from nbdjobs.errors import CommandError, NodeError, ProtocolError
from nbdjobs.nodes.crypto.luks_header import LuksHeader
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.nodes.qcow2.create import CreateOptions, empty_image
from nbdjobs.protocol.buffers import BufferPool, ReceiveBuffer
from nbdjobs.protocol.constants import Command, HeaderStyle, Option
from nbdjobs.protocol.export import Export, MetaContext
from nbdjobs.protocol.memory import Budget
from nbdjobs.protocol.messages import ExportQuery, MetaContextQuery, OptionHeader
from nbdjobs.protocol.negotiation import Chosen, Negotiation
from nbdjobs.protocol.requests import COMPACT_REQUEST, EXTENDED_REQUEST, PAYLOAD_LEN
from nbdjobs.protocol.session import Session
from nbdjobs.protocol.turns import SHARED
from nbdjobs.qapi.jsonparse import JsonError, JsonStream, parse_json
from nbdjobs.qapi.keyval import parse_option
from nbdjobs.qapi.types import Null
from nbdjobs.qapi.visitor import to_qapi, visit
from nbdjobs.qmp.commands import REGISTRY
from nbdjobs.qmp.session import Session as QmpSession
from tests.nodes.encrypted import SPEC, new_volume
from tests.nodes.qcow2.logged_file import LoggedFile
from tests.nodes.qcow2.rig import opened
from tests.protocol.client import Client
from tests.protocol.rig import Allocation, Even, MemoryDisk, running
from tests.qmp.toy import TOY_REGISTRY, ToyContext

LONGEST: Final = 4096
"""Bytes of one input; what is longer finds nothing more, and takes longer."""

Run = Callable[[bytes], None]


@dataclass(frozen=True)
class Target:
    """Something to be fuzzed.

    Attributes:
        run: Takes any bytes.
        seeds: Where to begin: inputs that get far.
    """

    run: Run
    seeds: tuple[bytes, ...]


TARGETS: Final[dict[str, Target]] = {}


def target(seeds: Sequence[bytes]) -> Callable[[Run], Run]:
    """Make a function the target of its name."""

    def declare(run: Run) -> Run:
        TARGETS[run.__name__] = Target(run, tuple(seeds))
        return run

    return declare


# NBD

_DISK: Final = MemoryDisk(64 * 1024)
_EXPORT: Final = Export(
    name="", backend=_DISK, is_writable=True, contexts=(Allocation(_DISK), Even())
)


def _options(*options: tuple[int, bytes]) -> bytes:
    headers = (OptionHeader(number, len(data)).pack() + data for number, data in options)
    return struct.pack(">I", 3) + b"".join(headers)


_GO: Final = (Option.GO, ExportQuery("", (3,)).pack())
_NEGOTIATIONS: Final = [
    _options(_GO),
    _options((Option.STRUCTURED_REPLY, b""), (Option.LIST, b""), _GO),
    _options(
        (Option.EXTENDED_HEADERS, b""),
        (Option.SET_META_CONTEXT, MetaContextQuery("", ("base:allocation", "test:even")).pack()),
        _GO,
    ),
    _options((Option.LIST_META_CONTEXT, MetaContextQuery("", ()).pack()), (Option.ABORT, b"")),
    _options(
        (Option.STARTTLS, b""), (99, b"data"), (Option.INFO, _GO[1]), (Option.EXPORT_NAME, b"")
    ),
]


@target(_NEGOTIATIONS)
def negotiation(data: bytes) -> None:
    """Answers do not depend on how the bytes come; the next client may choose the export."""
    whole, chosen = _negotiate([data])
    pieces, chosen_in_pieces = _negotiate([data[at : at + 1] for at in range(len(data))])
    assert whole == pieces
    assert chosen == chosen_in_pieces
    _, chosen = _negotiate([_NEGOTIATIONS[0]])
    assert chosen is not None


def _negotiate(pieces: Sequence[bytes]) -> tuple[bytes, tuple[object, ...] | None]:
    """Return all answers, and what was chosen with the bytes behind it."""
    server = Negotiation({"": _EXPORT})
    answers = b""
    for number, piece in enumerate(pieces):
        server.receive(piece)
        while (answer := server.advance()) is not None:
            answers += answer
        if isinstance(server.outcome, Chosen):
            rest = server.unconsumed + b"".join(pieces[number + 1 :])
            return answers, (server.outcome.style, sorted(server.outcome.contexts), rest)
    return answers, None


def _requests(style: HeaderStyle) -> bytes:
    """Some requests of all kinds."""
    pieces = [bytes([list(HeaderStyle).index(style)])]
    is_extended = style is HeaderStyle.EXTENDED
    layout = EXTENDED_REQUEST if is_extended else COMPACT_REQUEST
    magic = 0x21E41C71 if is_extended else 0x25609513
    for cookie, command in enumerate(Command):
        is_write = command is Command.WRITE
        flags = PAYLOAD_LEN if is_write and is_extended else 0
        if command is not Command.DISC:
            pieces.append(layout.pack(magic, flags, command, cookie, 4096, 512))
            pieces.append(b"x" * 512 if is_write else b"")
    return b"".join(pieces)


@target([_requests(style) for style in HeaderStyle])
def transmission(data: bytes) -> None:
    """Requests, after a byte that chooses the kind of headers: replies and content do not depend
    on how they come, and the size of the disk does not change."""
    style = list(HeaderStyle)[data[0] % 3] if data else HeaderStyle.SIMPLE
    requests = data[1:]
    whole = asyncio.run(_transmit(style, [requests]))
    size = 1 + len(requests) // 7
    pieces = [requests[at : at + size] for at in range(0, len(requests), size)]
    assert asyncio.run(_transmit(style, pieces)) == whole


async def _transmit(style: HeaderStyle, pieces: Sequence[bytes]) -> tuple[bytes, bytes, bool]:
    """Return all replies, what the disk holds in the end, and whether a rule was broken."""
    disk = MemoryDisk(64 * 1024)
    contexts: dict[int, MetaContext] = {0: Allocation(disk), 1: Even()}
    if style is HeaderStyle.SIMPLE:
        contexts = {}
    export = Export(name="", backend=disk, is_writable=True, contexts=tuple(contexts.values()))
    pool = BufferPool(0)
    progress = asyncio.Event()
    session = Session(
        Chosen(export, style, contexts),
        pool=pool,
        budget=Budget(),
        flush=lambda: None,
        notify=lambda: progress.set(),
    )
    buffer = ReceiveBuffer(pool, 2 * LONGEST)
    is_broken = False
    for piece in pieces:
        buffer.append(piece)
        session.is_turn_over = True
        while session.is_turn_over and not (session.is_over or is_broken):
            session.spent = 0
            try:
                session.consume(buffer, SHARED)
            except ProtocolError:
                is_broken = True
            while session.in_flight:  # it searches for extents, and others have their turn
                progress.clear()
                await progress.wait()
    assert disk.size == 64 * 1024
    assert not session.has_file_ranges
    replies = b"".join(cast(list[bytes], session.out))
    return replies, bytes(disk.content), is_broken


@target([opening + _requests(HeaderStyle.SIMPLE)[1:] for opening in _NEGOTIATIONS])
def server(data: bytes) -> None:
    """A whole connection over a socket: it ends, and the next client is served."""
    asyncio.run(_serve(data))


async def _serve(data: bytes) -> None:
    async with running() as rig:
        reader, writer = await asyncio.open_unix_connection(rig.path)
        drained = asyncio.ensure_future(_take_all(reader))
        with contextlib.suppress(ConnectionError):
            size = 1 + len(data) // 3
            for at in range(0, len(data), size):
                writer.write(data[at : at + size])
                await writer.drain()
            writer.write_eof()
        await drained
        writer.close()
        client = await Client.attach(rig.path)
        assert len(await client.read(0, 10)) == 10
        await client.close()


async def _take_all(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(1 << 16):
            pass


# QMP

_COMMANDS: Final = [
    b'{"execute": "qmp_capabilities"}',
    b'{"execute": "toy-echo", "arguments": {"text": "\\u00e9\\ud83d\\ude00"}, "id": [{}]}',
    b"{'exec-oob': 'x', 'a': [1e3, -0.5, true, 18446744073709551615]} ",
    b'{"execute": "query-commands"}{"execute": "nothing"}[]"" \n',
]


@target(_COMMANDS)
def qmp(data: bytes) -> None:
    """Replies are JSON and do not depend on how the bytes come; another session is served."""
    whole = asyncio.run(_talk([_COMMANDS[0], data]))
    assert whole == asyncio.run(_talk([_COMMANDS[0], *(bytes([byte]) for byte in data)]))
    for reply in whole:
        assert ("return" in json.loads(reply)) != ("error" in json.loads(reply))
    assert b"error" not in asyncio.run(_talk([_COMMANDS[0]]))[0]


async def _talk(pieces: Sequence[bytes]) -> list[bytes]:
    session, context = QmpSession(TOY_REGISTRY), ToyContext()
    context.gate.set()
    return [
        await session.answer(message, context)
        for piece in pieces
        for message in session.receive(piece)
    ]


@target([b'{"a": [1, -2.5e3, "\\n\\u0041", null, true, {}]}', b"[[[]]]", b"'it''s'", b"1e999"])
def json_text(data: bytes) -> None:
    """What is read is read again from its own JSON; pieces make no difference."""
    stream, slow = JsonStream(), JsonStream()
    whole = [str(message) for message in stream.feed(data)]
    assert whole == [str(message) for byte in data for message in slow.feed(bytes([byte]))]
    try:
        value = parse_json(data.decode(errors="surrogateescape"))
    except JsonError:
        return
    assert parse_json(json.dumps(value)) == value


_ARGUMENTS: Final = [
    b'blockdev-add\n{"driver": "raw", "node-name": "a", "file": {"driver": "null-co", "size": 1}}',
    b'block-export-add\n{"type": "nbd", "id": "a", "node-name": "b", "bitmaps": ["x"]}',
    b'blockdev-backup\n{"device": "a", "target": "b", "sync": "full", "x-perf": {}}',
    b'object-add\n{"qom-type": "throttle-group", "id": "t", "limits": {"iops-total": 10}}',
    b'nbd-server-start\n{"addr": {"type": "unix", "data": {"path": "x"}}}',
]


@target(_ARGUMENTS)
def arguments(data: bytes) -> None:
    """Arguments of a command are refused, or become values that go back to JSON."""
    name, _, text = data.decode(errors="replace").partition("\n")
    try:
        expected = REGISTRY.find(name).shape.arguments
        if expected is not None:
            _visited(expected, parse_json(text))
    except CommandError:
        return


def _visited(kind: type, value: object, *, keyval: bool = False) -> None:
    json.dumps(to_qapi(visit(kind, value, keyval=keyval)))


# The command line and the configuration file

_KINDS: Final[Sequence[tuple[type[Any], str | None]]] = (
    (BlockdevOptions, "driver"),
    (BlockExportOptions, "type"),
    (NbdServerOptions, None),
    (ObjectOptions, "qom-type"),
    (ChardevOptions, "backend"),
    (MonitorOptions, "chardev"),
)


@target(
    [
        b"\x00driver=raw,node-name=a,file.driver=file,file.filename=x,,y,cache.direct=on",
        b"\x00file,filename=x,discard=unmap",
        b"\x01type=nbd,id=a,node-name=b,name=c,bitmaps.0=x,bitmaps.1.node=n,bitmaps.1.name=m",
        b"\x02addr.type=inet,addr.host=::,addr.port=10809,max-connections=10",
        b"\x03throttle-group,id=t,limits.iops-total=10,x-bps-read=5",
        b"\x04socket,id=c,path=x,server=on,wait=off",
        b"\x05chardev=c,mode=control,pretty=on",
        b'\x00{"driver": "null-co", "node-name": "n", "size": 1}',
    ]
)
def option(data: bytes) -> None:
    """An option of the command line, after a byte that says which: refused, or a typed value."""
    kind, implied_key = _KINDS[data[0] % len(_KINDS)] if data else _KINDS[0]
    text = data[1:].decode(errors="surrogateescape")
    with contextlib.suppress(CommandError):
        value, is_keyval = parse_option(text, implied_key=implied_key)
        visit(kind, value, keyval=is_keyval)


@target([b"--blockdev\0null-co,node-name=a\0--daemonize\0--pidfile=x", b"--version", b"-h\0--"])
def command_line(data: bytes) -> None:
    """Words are options, or a usage error."""
    words = data.decode(errors="surrogateescape").split("\0")
    with contextlib.suppress(UsageError):
        parse_command_line(words)


@target(
    [
        b'[nodes.disk]\ndriver = "file"\nfilename = "x"\n[exports.disk]\nnode-name = "disk"\n',
        b'[nbd]\ntcp = "localhost:10809"\nmax-connections = 5\n[qmp]\npretty = true\n',
        b'[throttle-groups.t]\niops-total = 5\n[secrets.s]\nfile = "f"\n[log]\nlevel = "debug"\n',
    ]
)
def config(data: bytes) -> None:
    """A configuration file is read, or everything that is wrong with it is told."""
    reading = read_config(data.decode(errors="replace"))
    for problem in reading.problems:
        assert str(problem)


# Images

_IMAGE: Final = CreateOptions(size=64 * 1024, cluster_size=512)


class _SmallFile(LoggedFile):
    """A file that can grow no further than its file system: images lie about where things are."""

    async def _put(self, offset: int, data: bytes) -> None:
        if offset + len(data) > 1 << 20:
            raise NodeError(errno.EFBIG)
        await super()._put(offset, data)

    async def _truncate(self, size: int) -> None:
        if size > 1 << 20:
            raise NodeError(errno.EFBIG)
        await super()._truncate(size)


async def _written_image() -> bytes:
    file = LoggedFile(empty_image(_IMAGE))
    async with opened(file) as device:
        await device.pwrite(512, memoryview(b"x" * 700))
    return bytes(file.content[:LONGEST])


@target([bytes(empty_image(_IMAGE)), asyncio.run(_written_image())])
def qcow2(data: bytes) -> None:
    """An image is opened, read and written, or refused; who only reads changes nothing."""
    file = _SmallFile(data)
    asyncio.run(_use(file, read_only=True))
    assert file.content == data
    asyncio.run(_use(file))


_VOLUME: Final = new_volume(b"x")[0]


@target([_VOLUME.header.pack(), LuksHeader.new(SPEC, _VOLUME.header.hash_name).pack()])
def luks(data: bytes) -> None:
    """A header of an encrypted volume is refused, or written as it was read."""
    with contextlib.suppress(CommandError):
        header = LuksHeader.parse(data)
        assert LuksHeader.parse(header.pack()) == header
        assert header.material_length <= header.payload_offset
        header.spec.cipher(bytes(header.key_length))


async def _use(file: LoggedFile, *, read_only: bool = False) -> None:
    with contextlib.suppress(CommandError, NodeError):
        async with opened(file, backing=Null.NULL, read_only=read_only) as device:
            for offset in (0, device.size // 2, max(device.size - 4096, 0)):
                length = min(device.size - offset, 4096)
                buffer = memoryview(bytearray(length))
                await _ask(device.pread(offset, buffer))
                await _ask(device.block_status(offset, length))
                if not read_only:
                    await _ask(device.pwrite(offset, buffer))
                    await _ask(device.pwrite_zeroes(offset, length // 2))
                    await _ask(device.pdiscard(offset, length // 4))
                    await _ask(device.flush())


async def _ask(request: Coroutine[Any, Any, object]) -> None:
    with contextlib.suppress(NodeError):
        await request
