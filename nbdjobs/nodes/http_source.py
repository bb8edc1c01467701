# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A file on a web server, read in ranges: what was asked for, of the same file, or an error.

    open   GET, Range: bytes=0-0     206, Content-Range: bytes 0-0/SIZE, ETag, Last-Modified
    read   GET, Range: bytes=A-B     206, the same size and the same names of the version

A server's word is checked and not believed: a range other than the one that was asked for, a body
that is longer or shorter, another version of the file, all that is an error and never data. A
connection that was dropped is another matter: what is still missing is asked for again.

The client library is aiohttp, which needs no second event loop, gives bodies piece by piece, and is
well kept. It is an optional dependency, and so only `http` imports this module, when it needs it.

Source: RFC 9110, section 14 (range requests) and 8.8 (validators).
"""

from __future__ import annotations

import asyncio
import base64
import errno
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final, NamedTuple
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from nbdjobs.errors import NodeError
from nbdjobs.nodes.config import MAX_SIZE

MAX_PIECE: Final = 1024 * 1024
"""Bytes asked for at a time; the time limit is for one such piece."""

MAX_CONNECTIONS: Final = 8
"""Requests of one node under way at a time, as in QEMU; each may take a connection."""

MAX_ATTEMPTS: Final = 4
"""How often a piece is asked for, if the connection is dropped again and again."""

MAX_REDIRECTS: Final = 10

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", re.IGNORECASE)
_EMPTY: Final = "bytes */0"


class HttpError(NodeError):
    """The server, or the way there, failed."""

    def __init__(self, message: str):
        super().__init__(errno.EIO, message)


class _DroppedError(HttpError):
    """The connection ended too early: worth another attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpAccess:
    """How to reach the file.

    Attributes:
        url: Where it is.
        timeout_s: Seconds for one piece, to connect included; 0 for no limit.
        is_tls_verified: Whether the server has to prove who it is.
        username: For the server; None for nobody.
        password: Goes with it.
        proxy_username: For a proxy that the environment names; None for nobody.
        proxy_password: Goes with it.
        cookie: Sent as it is with every request.
    """

    url: str
    timeout_s: float = 0
    is_tls_verified: bool = True
    username: str | None = None
    password: str = ""
    proxy_username: str | None = None
    proxy_password: str = ""
    cookie: str | None = None


class _Version(NamedTuple):
    """What tells one version of the file from another."""

    size: int
    etag: str | None
    last_modified: str | None


@dataclass(slots=True)
class _Piece:
    """A part of the file on its way."""

    offset: int
    buffer: memoryview
    done: int = 0

    @property
    def missing(self) -> tuple[int, int]:
        """The range that has not come yet."""
        return self.offset + self.done, self.offset + len(self.buffer)

    async def receive(self, response: aiohttp.ClientResponse) -> None:
        """Take what is missing from a body, which has to hold just that."""
        async for data in response.content.iter_any():
            if len(data) > len(self.buffer) - self.done:
                raise HttpError("The server sent more than it was asked for")
            self.buffer[self.done : self.done + len(data)] = data
            self.done += len(data)
        if self.done < len(self.buffer):
            raise _DroppedError("The server sent less than it was asked for")


class HttpSource:
    """The open file.

    Attributes:
        size: Bytes of the file.
    """

    def __init__(self, access: HttpAccess, url: URL):
        self._access = access
        self._url = url.with_user(None)
        self._own_headers = _own_headers(access, url)
        self._version = _Version(0, None, None)
        self._turns = asyncio.Semaphore(MAX_CONNECTIONS)
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=access.timeout_s or None),
            headers={"Accept": "*/*", "Accept-Encoding": "identity"},
        )

    @classmethod
    async def open(cls, access: HttpAccess) -> HttpSource:
        """Find out how large the file is, and which version of it there is.

        Raises:
            HttpError: It cannot be read, or not in ranges.
        """
        url = _parse(access.url)
        if not url.host:
            raise HttpError("No host part in the URL")
        source = cls(access, url)
        try:
            await source._find_version()
        except BaseException:
            await source.close()
            raise
        return source

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._version.size

    async def close(self) -> None:
        """End all connections."""
        await self._session.close()

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from the file; the range has to lie in it.

        Raises:
            HttpError: It could not be read, or is not what it was when the file was opened.
        """
        for begin in range(0, len(buffer), MAX_PIECE):
            await self._read_piece(offset + begin, buffer[begin : begin + MAX_PIECE])

    # One request

    async def _find_version(self) -> None:
        async def ask() -> None:
            first_byte = _Piece(0, memoryview(bytearray(1)))
            async with self._ask(0, 1) as response:
                self._version = _version_of(response, 0, 1)
                if self._version.size:
                    await first_byte.receive(response)

        await self._with_attempts(ask)

    async def _read_piece(self, offset: int, buffer: memoryview) -> None:
        piece = _Piece(offset, buffer)

        async def ask() -> None:
            begin, end = piece.missing
            if begin == end:
                return  # it was dropped behind the last byte
            async with self._ask(begin, end) as response:
                if _version_of(response, begin, end) != self._version:
                    raise HttpError("The file has changed on the server")
                await piece.receive(response)

        await self._with_attempts(ask)

    async def _with_attempts(self, ask: Callable[[], Awaitable[None]]) -> None:
        async with self._turns:
            for _ in range(MAX_ATTEMPTS - 1):
                with suppress(_DroppedError):
                    return await ask()
            return await ask()

    @asynccontextmanager
    async def _ask(self, begin: int, end: int) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask for a range, and give the answer, whatever it is; the body is still to be read."""
        try:
            response = await self._get({"Range": f"bytes={begin}-{end - 1}"})
            try:
                yield response
            except BaseException:
                response.close()  # nobody wants the rest, be it endless
                raise
            response.release()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._explain(error) from error

    async def _get(self, headers: dict[str, str]) -> aiohttp.ClientResponse:
        url = self._url
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._session.get(
                url,
                # What is confidential goes to the server that the user named, and to no other.
                headers=headers | (self._own_headers if url.origin() == self._url.origin() else {}),
                proxy=self._proxy_for(url),
                ssl=self._access.is_tls_verified,
                allow_redirects=False,
            )
            if response.status not in _REDIRECTS:
                return response
            response.close()
            url = _redirected(url, response.headers.get("Location"))
        raise HttpError(f"Maximum ({MAX_REDIRECTS}) redirects followed")

    def _proxy_for(self, url: URL) -> URL | None:
        """The proxy that the environment names, as for other programs."""
        proxies = getproxies()
        named = proxies.get(url.scheme) or proxies.get("all")
        if named is None or proxy_bypass(url.host or ""):
            return None
        proxy, access = _parse(named), self._access
        if proxy.scheme not in ("http", "https"):
            raise HttpError(f"Unsupported proxy: {proxy.scheme}")
        if access.proxy_username is None:
            return proxy
        return proxy.with_user(access.proxy_username).with_password(access.proxy_password)

    def _explain(self, error: Exception) -> HttpError:
        """Say what happened in a sentence without addresses of memory or class names."""
        match error:
            case TimeoutError():
                return HttpError(f"Operation timed out after {self._access.timeout_s:g} seconds")
            case aiohttp.ClientConnectorDNSError():
                return HttpError(f"Could not resolve host: {error.host}")
            case aiohttp.ClientSSLError():
                return HttpError(f"TLS with {error.host} port {error.port} failed: {error}")
            case aiohttp.ClientConnectorError():
                reason = os.strerror(error.errno) if error.errno else str(error.os_error)
                return HttpError(f"Failed to connect to {error.host} port {error.port}: {reason}")
            case aiohttp.ClientConnectionError() | aiohttp.ClientPayloadError():
                return _DroppedError("The server closed the connection")
            case aiohttp.ClientResponseError():
                reason = error.message.partition("\n")[0].rstrip(":")
                return HttpError(f"The server's answer cannot be understood: {reason}")
            case _:
                return HttpError(f"{error}")


def _parse(text: str) -> URL:
    try:
        url = URL(text, encoded=True)  # as it is: it may have been signed
        _ = url.port  # parsed only when somebody asks
    except ValueError as error:
        raise HttpError(f"Not a URL: {error}") from error
    return url


def _own_headers(access: HttpAccess, url: URL) -> dict[str, str]:
    """What tells the server who asks; a name in the options goes before one in the URL."""
    headers = {} if access.cookie is None else {"Cookie": access.cookie}
    username, password = access.username, access.password
    if username is None:
        username, password = url.user, url.password or ""
    if username is not None:
        login = base64.b64encode(f"{username}:{password}".encode()).decode()
        headers["Authorization"] = f"Basic {login}"
    return headers


def _redirected(url: URL, location: str | None) -> URL:
    if location is None:
        raise HttpError("The server redirects to nowhere")
    target = url.join(_parse(location))
    if target.scheme not in ("http", "https"):
        raise HttpError(f"The server redirects to a URL that is not of the web: {target}")
    if (url.scheme, target.scheme) == ("https", "http"):
        raise HttpError("The server redirects from https to http")
    return target


def _version_of(response: aiohttp.ClientResponse, begin: int, end: int) -> _Version:
    """The version that an answer is about, once it is sure to be the answer to the question.

    Raises:
        HttpError: It is not, or the server cannot answer it.
    """
    headers = response.headers
    found = headers.get("Content-Range", "")
    etag, last_modified = headers.get("ETag"), headers.get("Last-Modified")
    if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and found == _EMPTY:
        if begin == 0:
            return _Version(0, etag, last_modified)
        raise HttpError("The file has changed on the server")
    if response.status >= HTTPStatus.BAD_REQUEST:
        raise HttpError(f"The requested URL returned error: {response.status}")
    if response.status != HTTPStatus.PARTIAL_CONTENT:
        raise HttpError("Server does not support 'range' (byte ranges).")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise HttpError("The server encodes what it sends, although it was told not to")
    match = _CONTENT_RANGE.fullmatch(found)
    if match is None:
        raise HttpError("Server didn't report file size.")
    first, last, size = map(int, match.groups())
    if (first, last + 1) != (begin, end) or response.content_length not in (None, end - begin):
        raise HttpError("The server sent another range than it was asked for")
    if not end <= size <= MAX_SIZE:
        raise HttpError("The server reported a size that cannot be")
    return _Version(size, etag, last_modified)
