# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A small NBD client that says exactly what a test tells it to, right or wrong."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from nbdjobs.protocol.constants import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    CommandFlag,
    HeaderStyle,
    Option,
    OptionReplyType,
    ReplyType,
)
from nbdjobs.protocol.messages import (
    ExportQuery,
    Greeting,
    MetaContextQuery,
    OptionHeader,
    OptionReply,
)


@dataclass(frozen=True)
class Chunk:
    """One reply, or one chunk of it; `kind` is None for a simple reply."""

    cookie: int
    kind: ReplyType | None
    is_last: bool
    payload: bytes = b""
    error: int = 0

    @property
    def text(self) -> str:
        length = struct.unpack_from(">H", self.payload, 4)[0]
        return self.payload[6 : 6 + length].decode()

    @property
    def error_offset(self) -> int:
        return int(struct.unpack(">Q", self.payload[-8:])[0])


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader = reader
        self.writer = writer
        self.style = HeaderStyle.SIMPLE
        self._cookie = 0
        self.reads: dict[int, int] = {}

    @classmethod
    async def connect(cls, path: str, *, flags: int = 3) -> Client:
        """Connect, take the greeting and answer it."""
        client = cls(*await asyncio.open_unix_connection(path))
        Greeting.unpack(await client.reader.readexactly(Greeting.LAYOUT.size))
        client.writer.write(struct.pack(">I", flags))
        return client

    @classmethod
    async def attach(
        cls,
        path: str,
        *,
        name: str = "",
        style: HeaderStyle = HeaderStyle.STRUCTURED,
        contexts: Sequence[str] = (),
    ) -> Client:
        """Negotiate up to the transmission phase."""
        client = await cls.connect(path)
        if style is HeaderStyle.STRUCTURED:
            await client.option(Option.STRUCTURED_REPLY)
        if style is HeaderStyle.EXTENDED:
            await client.option(Option.EXTENDED_HEADERS)
        if contexts:
            data = MetaContextQuery(name, tuple(contexts)).pack()
            await client.option(Option.SET_META_CONTEXT, data)
        replies = await client.option(Option.GO, ExportQuery(name, ()).pack())
        assert replies[-1].kind is OptionReplyType.ACK, replies
        client.style = style
        return client

    async def option(self, option: int, data: bytes = b"") -> list[OptionReply]:
        """Send an option and return its replies, the final one last."""
        self.writer.write(OptionHeader(option, len(data)).pack() + data)
        replies: list[OptionReply] = []
        while not replies or not (
            replies[-1].kind is OptionReplyType.ACK or replies[-1].kind >= 2**31
        ):
            header = await self.reader.readexactly(OptionReply.LAYOUT.size)
            payload = await self.reader.readexactly(OptionReply.LAYOUT.unpack(header)[3])
            replies.append(OptionReply.unpack(header + payload))
        return replies

    def pack(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
        magic: int | None = None,
    ) -> bytes:
        """Return a request; `payload` sets length and, if extended, its flag."""
        self._cookie += 1
        if command == Command.READ:
            self.reads[self._cookie] = length
        length = len(payload) or length
        if self.style is HeaderStyle.EXTENDED:
            if payload or command == Command.WRITE:
                flags |= CommandFlag.PAYLOAD_LEN
            layout, own_magic = ">IHHQQQ", EXTENDED_REQUEST_MAGIC
        else:
            layout, own_magic = ">IHHQQI", REQUEST_MAGIC
        used = own_magic if magic is None else magic
        return struct.pack(layout, used, flags, command, self._cookie, offset, length) + payload

    def send(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
    ) -> int:
        """Send a request and return its cookie."""
        self.writer.write(self.pack(command, offset, length, flags=flags, payload=payload))
        return self._cookie

    async def chunk(self) -> Chunk:
        """Take one reply or chunk."""
        (magic,) = struct.unpack(">I", await self.reader.readexactly(4))
        if magic == SIMPLE_REPLY_MAGIC:
            assert self.style is not HeaderStyle.EXTENDED
            error, cookie = struct.unpack(">IQ", await self.reader.readexactly(12))
            length = self.reads.get(cookie, 0)
            assert self.style is HeaderStyle.SIMPLE or not length
            payload = b"" if error else await self.reader.readexactly(length)
            return Chunk(cookie, None, True, payload, error)
        if self.style is HeaderStyle.EXTENDED:
            assert magic == EXTENDED_REPLY_MAGIC
            fields = struct.unpack(">HHQQQ", await self.reader.readexactly(28))
            flags, kind, cookie, _, length = fields
        else:
            assert magic == STRUCTURED_REPLY_MAGIC
            fields = struct.unpack(">HHQI", await self.reader.readexactly(16))
            flags, kind, cookie, length = fields
        payload = await self.reader.readexactly(length)
        error = struct.unpack_from(">I", payload)[0] if kind & 2**15 else 0
        return Chunk(cookie, ReplyType(kind), bool(flags & 1), payload, error)

    async def reply(self) -> list[Chunk]:
        """Take chunks up to the last of a request."""
        chunks = [await self.chunk()]
        while not chunks[-1].is_last:
            chunks.append(await self.chunk())
        return chunks

    async def ask(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
    ) -> list[Chunk]:
        """Send a request and take its reply."""
        cookie = self.send(command, offset, length, flags=flags, payload=payload)
        chunks = await self.reply()
        assert {chunk.cookie for chunk in chunks} == {cookie}
        return chunks

    async def error(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
    ) -> int:
        """Return the error that a request ends with, 0 for success."""
        chunks = await self.ask(command, offset, length, flags=flags, payload=payload)
        return chunks[-1].error

    async def read(self, offset: int, length: int, *, flags: int = 0) -> bytes:
        """Read, and put the chunks together."""
        chunks = await self.ask(Command.READ, offset, length, flags=flags)
        return assemble(chunks, offset, length)

    async def write(self, offset: int, data: bytes, *, flags: int = 0) -> None:
        assert await self.error(Command.WRITE, offset, flags=flags, payload=data) == 0

    async def is_closed_by_server(self) -> bool:
        try:
            return await self.reader.read() == b""
        except ConnectionError:
            return True

    async def close(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except ConnectionError:
            return


def assemble(chunks: Sequence[Chunk], offset: int, length: int) -> bytes:
    """Build what a read returned; every byte must be told exactly once."""
    assert not chunks[-1].error, chunks[-1]
    if chunks[0].kind is None:
        return chunks[0].payload
    content: dict[int, bytes] = {}
    for chunk in chunks:
        if chunk.kind is ReplyType.OFFSET_DATA:
            content[struct.unpack_from(">Q", chunk.payload)[0]] = chunk.payload[8:]
        elif chunk.kind is ReplyType.OFFSET_HOLE:
            start, size = struct.unpack(">QI", chunk.payload)
            content[start] = bytes(size)
    position = offset
    for start in sorted(content):
        assert start == position
        position += len(content[start])
    assert position == offset + length
    return b"".join(content[start] for start in sorted(content))
