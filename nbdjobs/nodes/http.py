# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`http` and `https`: a disk in a file on a web server, to be read.

Small reads are answered out of blocks of `readahead` bytes, of which the last few are kept; who
reads one after another, or the same again, asks the server once for each block. Reads of at least
a block are passed on as they are.

Source: QEMU qapi/block-core.json (BlockdevOptionsCurlHttp, BlockdevOptionsCurlHttps), and the
behaviour and error texts of its storage daemon.
"""

from __future__ import annotations

import asyncio
import errno
import importlib
from collections import OrderedDict
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self, TypeVar

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.config import SECTOR, NodeConfig
from nbdjobs.nodes.driver import DriverNode
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.nodes.rounding import round_up
from nbdjobs.nodes.secrets import Secrets
from nbdjobs.nodes.workers import Workers
from nbdjobs.qapi.visitor import to_qapi

if TYPE_CHECKING:
    from nbdjobs.nodes.http_source import HttpSource

T = TypeVar("T")

READAHEAD: Final = 256 * 1024
MAX_READAHEAD: Final = 16 * 1024 * 1024
KEPT_BLOCKS: Final = 8
"""Memory of a node at most: so many blocks of `readahead` bytes."""

TIMEOUT_S: Final = 5
MAX_TIMEOUT_S: Final = 10_000

_NAMES_THE_CONTENT: Final = frozenset(
    {
        "url",
        "sslverify",
        "username",
        "password-secret",
        "proxy-username",
        "proxy-password-secret",
        "cookie",
        "cookie-secret",
    }
)
"""Options that may decide what is read; the others only decide how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions(BlockdevOptions):
    """Options of `http` (QAPI `BlockdevOptionsCurlHttp`).

    Attributes:
        url: Where the file is.
        readahead: Bytes read at a time for small reads, a multiple of 512; 0 for none.
        timeout: Seconds that a request may take; 0 for no limit.
        username: For the server.
        password_secret: Name of the secret with the password.
        proxy_username: For the proxy.
        proxy_password_secret: Name of the secret with the proxy's password.
        cookie: Sent with every request.
        cookie_secret: Name of the secret with the cookie.
    """

    url: str
    readahead: int | None = None
    timeout: int | None = None
    username: str | None = None
    password_secret: str | None = None
    proxy_username: str | None = None
    proxy_password_secret: str | None = None
    cookie: str | None = None
    cookie_secret: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpsOptions(HttpOptions):
    """Options of `https` (QAPI `BlockdevOptionsCurlHttps`).

    Attributes:
        sslverify: Whether the server has to prove who it is.
    """

    sslverify: bool | None = None


class HttpNode(DriverNode[HttpOptions]):
    """The driver `http`."""

    driver: ClassVar[str] = "http"
    options_type: ClassVar[type[BlockdevOptions]] = HttpOptions

    def __init__(self, name: str, config: NodeConfig, options: HttpOptions):
        super().__init__(name, config)
        self._options = options
        self._readahead = READAHEAD if options.readahead is None else options.readahead
        self._source: HttpSource | None = None
        self._blocks: OrderedDict[int, asyncio.Task[bytearray]] = OrderedDict()

    @classmethod
    async def open(
        cls, name: str, config: NodeConfig, options: HttpOptions, children: Mapping[str, Node]
    ) -> Self:
        """Check the options."""
        if not (config.is_read_only or config.is_auto_read_only):
            raise CommandError("curl driver does not support writes")
        _check_numbers(options)
        if options.cookie is not None and options.cookie_secret is not None:
            raise CommandError("curl driver cannot handle both cookie and cookie secret")
        return cls(name, config, options)

    def bind(self, graph: Graph) -> None:
        """Find the secrets; `CommandError` if there are none of these names."""
        options, secrets = self._options, graph.secrets
        cookie = _find(secrets, options.cookie_secret)
        if not options.url.startswith(f"{self.driver}://"):
            raise CommandError(
                f"{self.driver} curl driver cannot handle the URL '{options.url}' (does not start"
                f" with '{self.driver}://')"
            )
        self._password = _find(secrets, options.password_secret)
        self._proxy_password = _find(secrets, options.proxy_password_secret)
        self._cookie = options.cookie if cookie is None else cookie

    async def start(self) -> None:
        """Ask the server how large the file is."""
        await _load_library(self.driver)
        from nbdjobs.nodes.http_source import HttpAccess, HttpSource

        options = self._options
        access = HttpAccess(
            url=options.url,
            timeout_s=TIMEOUT_S if options.timeout is None else options.timeout,
            is_tls_verified=self._is_tls_verified,
            username=options.username,
            password=self._password or "",
            proxy_username=options.proxy_username,
            proxy_password=self._proxy_password or "",
            cookie=self._cookie,
        )
        try:
            self._source = await _in_task(HttpSource.open(access))
        except NodeError as error:
            raise CommandError(f"CURL: Error opening file: {error}") from error

    async def close(self) -> None:
        """End what is under way, and all connections."""
        for task in self._blocks.values():
            task.cancel()
        await asyncio.gather(*self._blocks.values(), return_exceptions=True)
        if self._source is not None:
            await self._source.close()

    # What it is

    @property
    def _opened(self) -> HttpSource:
        assert self._source is not None, "started before anyone uses it"
        return self._source

    @property
    def _is_tls_verified(self) -> bool:
        return True

    @property
    def size(self) -> int:
        """Bytes of the file, rounded up to 512."""
        return round_up(self._opened.size, SECTOR)

    @property
    def allocated_size(self) -> int | None:
        """Only the server knows."""
        return None

    @property
    def is_read_only(self) -> bool:
        """Always, whatever the options."""
        return True

    @property
    def filename(self) -> str:
        """The URL, unless it is not all that decides what is read."""
        is_plain = self.content_options.keys() == {"driver", "url"} and self._is_tls_verified
        return self._options.url if is_plain else self.json_filename

    @property
    def content_options(self) -> dict[str, object]:
        """Driver, URL, and what was given to get at the file."""
        given: dict[str, object] = to_qapi(self._options)
        named = {name: value for name, value in given.items() if name in _NAMES_THE_CONTENT}
        return {"driver": self.driver, **named}

    def is_known_data(self, offset: int, length: int) -> bool:
        """Yes: a server knows nothing of holes."""
        return True

    # Requests

    def pread_now(self, offset: int, buffer: memoryview, data_only: bool) -> bool:
        """Read from a block that is there."""
        length = len(buffer)
        if not 0 < length < self._readahead:
            return False
        number, begin = divmod(offset, self._readahead)
        task = self._blocks.get(number)
        if task is None or not task.done() or task.cancelled() or task.exception():
            return False
        data = task.result()
        if begin + length > len(data):
            return False
        self._blocks.move_to_end(number)
        buffer[:] = data[begin : begin + length]
        return True

    async def _pread(self, offset: int, buffer: memoryview) -> None:
        inside = min(max(self._opened.size - offset, 0), len(buffer))
        buffer[inside:] = bytes(len(buffer) - inside)
        while inside:
            done = await self._read_some(offset, buffer[:inside])
            offset, buffer, inside = offset + done, buffer[done:], inside - done

    async def _read_some(self, offset: int, buffer: memoryview) -> int:
        """Read from one block, or else everything; the answer is how much that was."""
        if len(buffer) < self._readahead:
            number, begin = divmod(offset, self._readahead)
            task = self._block(number)
            if task is not None:
                # Others may want it, too: it goes on without a reader that is cancelled.
                data = (await asyncio.shield(task))[begin : begin + len(buffer)]
                buffer[: len(data)] = data
                return len(data)
        await _in_task(self._opened.read(offset, buffer))
        return len(buffer)

    def _block(self, number: int) -> asyncio.Task[bytearray] | None:
        """A block that is there, or under way from now on; None if there is no place for it."""
        task = self._blocks.get(number)
        if task is None:
            if not self._make_place():
                return None
            task = asyncio.get_running_loop().create_task(self._fetch(number))
            self._blocks[number] = task
            task.add_done_callback(lambda ended: self._drop_failed(number, ended))
        self._blocks.move_to_end(number)
        return task

    def _make_place(self) -> bool:
        """Let go of the block not used for longest, if there is none to spare."""
        if len(self._blocks) < KEPT_BLOCKS:
            return True
        oldest = next((number for number, task in self._blocks.items() if task.done()), None)
        if oldest is None:
            return False
        del self._blocks[oldest]
        return True

    async def _fetch(self, number: int) -> bytearray:
        begin = number * self._readahead
        data = bytearray(min(self._readahead, self._opened.size - begin))
        await self._opened.read(begin, memoryview(data))
        return data

    def _drop_failed(self, number: int, task: asyncio.Task[bytearray]) -> None:
        """Who asks again gets another attempt."""
        if (task.cancelled() or task.exception()) and self._blocks.get(number) is task:
            del self._blocks[number]

    async def _pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        raise NodeError(errno.EROFS)


class HttpsNode(HttpNode):
    """The driver `https`."""

    driver: ClassVar[str] = "https"
    options_type: ClassVar[type[BlockdevOptions]] = HttpsOptions

    @property
    def _is_tls_verified(self) -> bool:
        assert isinstance(self._options, HttpsOptions)
        return self._options.sslverify is not False


def _check_numbers(options: HttpOptions) -> None:
    """Refuse what is out of range, in QEMU's words where it has any."""
    readahead = READAHEAD if options.readahead is None else options.readahead
    if readahead < 0:
        raise CommandError("Parameter 'readahead' expects a non-negative number below 2^64")
    if readahead % SECTOR:
        raise CommandError(f"HTTP_READAHEAD_SIZE {readahead} is not a multiple of {SECTOR}")
    if readahead > MAX_READAHEAD:
        raise CommandError(f"readahead is too large: {readahead} > {MAX_READAHEAD}")
    if options.timeout is not None and not 0 <= options.timeout <= MAX_TIMEOUT_S:
        raise CommandError("timeout parameter is too large or negative")


def _find(secrets: Secrets, name: str | None) -> str | None:
    return None if name is None else secrets.find_password(name).decode()


async def _in_task(work: Coroutine[Any, Any, T]) -> T:
    """Do some work in a task of its own, as the library wants it (see `nbdjobs.eager`)."""
    return await asyncio.get_running_loop().create_task(work)


async def _load_library(driver: str) -> None:
    """Import the client library, which takes a while; `CommandError` if it is not installed."""
    workers = Workers(driver)
    try:
        await workers.run(lambda: importlib.import_module("nbdjobs.nodes.http_source"))
    except ImportError as error:
        raise CommandError(
            f"The driver '{driver}' needs the Python package aiohttp, which comes with"
            " nbdjobs[http]"
        ) from error
    finally:
        workers.close()
