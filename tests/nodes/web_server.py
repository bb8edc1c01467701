# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A web server for tests, as good or as bad as a test wants it.

async with web_server(b"content") as site:
    ...                                     # a sound server of ranges
    site.answers.append(cut_off_after(10))  # the next request is answered like this
    async with site.hold() as gate: ...     # requests wait from now on
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

END = b"\r\n\r\n"


@dataclass
class Request:
    """What a client asked for; `begin` and `end` are those of its range, as in Python."""

    path: str
    headers: dict[str, str]
    begin: int | None
    end: int


Answer = Callable[[Request, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Site:
    """One file, and how it is served.

    Attributes:
        content: What the file holds.
        version: Headers that name the version of the file.
        answers: How to answer the next requests; after them, properly.
        requests: What was asked for so far.
        connections: How many connections there were.
    """

    content: bytes
    version: dict[str, str] = field(default_factory=lambda: {"ETag": '"one"'})
    answers: list[Answer] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    port: int = 0
    scheme: str = "http"
    _is_open: asyncio.Event = field(default_factory=asyncio.Event)
    _held: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/disk.img"

    @property
    def ranges(self) -> list[tuple[int | None, int]]:
        """The ranges that were asked for."""
        return [(request.begin, request.end) for request in self.requests]

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[Callable[[], Awaitable[object]]]:
        """Hold requests; gives a function that waits for the next one to arrive."""
        self._is_open.clear()
        try:
            yield self._held.acquire
        finally:
            self._is_open.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with suppress(OSError, asyncio.IncompleteReadError):
            while not writer.is_closing():
                request = _parse((await reader.readuntil(END)).decode())
                self.requests.append(request)
                if not self._is_open.is_set():
                    self._held.release()
                    await self._is_open.wait()
                answer = self.answers.pop(0) if self.answers else self.answer
                await answer(request, writer)
                await writer.drain()
        writer.close()

    async def answer(self, request: Request, writer: asyncio.StreamWriter) -> None:
        """The proper answer."""
        assert request.begin is not None
        body = self.content[request.begin : request.end]
        if not body:
            empty = {"Content-Range": f"bytes */{len(self.content)}", "Content-Length": "0"}
            writer.write(head(416, empty))
            return
        writer.write(head(206, self.headers(request.begin, body)) + body)

    def headers(self, begin: int, body: bytes) -> dict[str, str]:
        return {
            **self.version,
            "Content-Range": f"bytes {begin}-{begin + len(body) - 1}/{len(self.content)}",
            "Content-Length": str(len(body)),
        }

    def like_proper(
        self,
        *,
        status: int = 206,
        body: Callable[[bytes], bytes] = lambda body: body,
        **changes: str | None,
    ) -> Answer:
        """The proper answer with another status, body, or headers (None for none)."""

        async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
            assert request.begin is not None
            content = self.content[request.begin : request.end]
            sent = body(content)
            headers = self.headers(request.begin, content) | {"Content-Length": str(len(sent))}
            for name, value in changes.items():
                headers.pop(name.replace("_", "-"), None)
                if value is not None:
                    headers[name.replace("_", "-")] = value
            writer.write(head(status, headers) + sent)

        return answer

    async def endless(self, request: Request, writer: asyncio.StreamWriter) -> None:
        """A body without end: it goes on until the client has had enough."""
        assert request.begin is not None
        headers = self.headers(request.begin, self.content[request.begin : request.end])
        del headers["Content-Length"]
        writer.write(head(206, {**headers, "Transfer-Encoding": "chunked"}))
        with suppress(OSError):
            while not writer.is_closing():
                writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
                await writer.drain()

    def cut_off_after(self, length: int) -> Answer:
        """The proper answer, of which only the first bytes of the body come."""

        async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
            assert request.begin is not None
            content = self.content[request.begin : request.end]
            writer.write(head(206, self.headers(request.begin, content)) + content[:length])
            writer.close()

        return answer


async def hang_up(request: Request, writer: asyncio.StreamWriter) -> None:
    """No answer at all."""
    writer.close()


def answer_with(status: int, body: bytes = b"", **headers: str) -> Answer:
    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        writer.write(head(status, {"Content-Length": str(len(body)), **named}) + body)

    return answer


def raw(data: bytes) -> Answer:
    """Bytes that need not be HTTP."""

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        writer.close()

    return answer


def head(status: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} Word", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + END


def _parse(text: str) -> Request:
    first, *lines = text.strip().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    found = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("Range", ""))
    begin, end = (int(found[1]), int(found[2]) + 1) if found else (None, 0)
    return Request(first.split()[1], headers, begin, end)


@asynccontextmanager
async def web_server(content: bytes, tls: ssl.SSLContext | None = None) -> AsyncIterator[Site]:
    site = Site(content, scheme="http" if tls is None else "https")
    site._is_open.set()
    connected: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connected[task] = writer
        try:
            await site.serve(reader, writer)
        finally:
            del connected[task]

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    site.port = server.sockets[0].getsockname()[1]
    try:
        yield site
    finally:
        server.close()
        for writer in connected.values():
            writer.transport.abort()
        if connected:
            await asyncio.wait(list(connected))
        await server.wait_closed()
