# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""http: the bytes of the file as it was when it was opened, or an error, from any server."""

from __future__ import annotations

import asyncio
import base64
import errno
import random
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.http import KEPT_BLOCKS, HttpNode, HttpOptions, HttpsOptions
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.permissions import Permission
from tests.interop.tools import require
from tests.jobs.rig import turns
from tests.nodes.web_server import (
    Answer,
    Request,
    Site,
    answer_with,
    hang_up,
    raw,
    web_server,
)

pytest.importorskip("aiohttp", reason="needs the Python package aiohttp")
source = pytest.importorskip("nbdjobs.nodes.http_source")

BLOCK = 4096
CONTENT = random.Random(4).randbytes(10 * BLOCK + 100)
FIRST = (0, 1)
"""The range that opening asks for."""


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def options_for(url: str, **more: Any) -> HttpOptions:
    more = {"read_only": True, "readahead": BLOCK, "node_name": "disk", **more}
    if url.startswith("https"):
        return HttpsOptions(driver="https", url=url, **more)
    return HttpOptions(driver="http", url=url, **more)


class Disk:
    """The opened node, with a reader."""

    def __init__(self, graph: Graph, node: HttpNode):
        self.node = node
        self.device = Device(graph, node, needed=Permission.CONSISTENT_READ)

    async def read(self, offset: int, length: int) -> bytes:
        buffer = memoryview(bytearray(b"\xaa" * length))
        await self.device.pread(offset, buffer)
        return bytes(buffer)

    async def assert_right(self, offset: int, length: int) -> None:
        expected = CONTENT[offset : offset + length].ljust(length, b"\0")
        assert await self.read(offset, length) == expected

    async def failure(self, offset: int = 0, length: int = 100) -> str:
        with pytest.raises(NodeError) as caught:
            await self.read(offset, length)
        assert caught.value.errno == errno.EIO
        return caught.value.message


@asynccontextmanager
async def opened(site: Site, graph: Graph | None = None, **more: Any) -> AsyncIterator[Disk]:
    graph = graph or Graph()
    node = await open_node(graph, options_for(site.url, **more))
    assert isinstance(node, HttpNode)
    disk = Disk(graph, node)
    try:
        yield disk
    finally:
        node.is_owned_by_user = False
        await disk.device.close()
    assert not graph.nodes
    assert not node._blocks or all(task.done() for task in node._blocks.values())


def run(scenario: Callable[[Site], Awaitable[None]], content: bytes = CONTENT) -> None:
    async def main() -> None:
        async with web_server(content) as site:
            await scenario(site)

    asyncio.run(main())


async def refusal(site: Site, **more: Any) -> str:
    graph = Graph()
    with pytest.raises(CommandError) as caught:
        await open_node(graph, options_for(**{"url": site.url, **more}))
    assert not graph.nodes
    return str(caught.value).removeprefix("CURL: Error opening file: ")


# What it is


def test_the_disk_is_the_file() -> None:
    async def scenario(site: Site) -> None:
        async with opened(site) as disk:
            assert disk.node.size == 10 * BLOCK + 512
            assert disk.node.is_read_only
            assert disk.node.filename == site.url
            assert disk.node.allocated_size is None
            assert disk.node.is_known_data(0, BLOCK)
            await disk.assert_right(0, 10 * BLOCK + 512)
            await disk.assert_right(10 * BLOCK + 90, 20)
            await disk.assert_right(10 * BLOCK + 200, 20)
            with pytest.raises(CommandError, match="Block node is read-only"):
                Device(Graph(), disk.node, needed=Permission.WRITE)
            with pytest.raises(NodeError):
                await disk.node.pwrite(0, memoryview(b"x"))

    run(scenario)


def test_an_empty_file_is_an_empty_disk() -> None:
    async def scenario(site: Site) -> None:
        async with opened(site) as disk:
            assert disk.node.size == 0

    run(scenario, b"")


def test_names_that_decide_what_is_read_are_part_of_its_name() -> None:
    async def scenario(site: Site) -> None:
        graph = Graph()
        graph.secrets.add("secret", b"word")
        async with opened(site, graph, username="ann", password_secret="secret") as disk:
            assert disk.node.filename == (
                f'json:{{"driver": "http", "url": "{site.url}", "username": "ann",'
                ' "password-secret": "secret"}'
            )
        async with opened(site, timeout=7, readahead=512) as disk:
            assert disk.node.filename == site.url

    run(scenario)


def test_options_that_cannot_be_are_refused() -> None:
    async def scenario(site: Site) -> None:
        refusals: dict[str, dict[str, Any]] = {
            "curl driver does not support writes": {"read_only": False},
            "HTTP_READAHEAD_SIZE 100 is not a multiple of 512": {"readahead": 100},
            "Parameter 'readahead' expects a non-negative number below 2^64": {"readahead": -512},
            "readahead is too large: 16777728 > 16777216": {"readahead": (1 << 24) + 512},
            "timeout parameter is too large or negative": {"timeout": -1},
            "curl driver cannot handle both cookie and cookie secret": {
                "cookie": "a=b",
                "cookie_secret": "s",
            },
            "No secret with id 's'": {"password_secret": "s"},
            "http curl driver cannot handle the URL 'x' (does not start with 'http://')": {
                "url": "x"
            },
            "No host part in the URL": {"url": "http:///x"},
            "Not a URL: Port out of range 0-65535": {"url": "http://x:99999/"},
        }
        for text, options in refusals.items():
            assert await refusal(site, **options) == text
        assert await refusal(site, timeout=10001) == "timeout parameter is too large or negative"
        assert not site.requests
        graph = Graph()
        options = {"read_only": None, "auto_read_only": True}
        async with opened(site, graph, **options) as disk:
            assert disk.node.is_read_only

    run(scenario)


def test_without_the_library_the_driver_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "nbdjobs.nodes.http_source", None)

    async def scenario(site: Site) -> None:
        assert await refusal(site) == (
            "The driver 'http' needs the Python package aiohttp, which comes with nbdjobs[http]"
        )

    run(scenario)


# Getting at it


def test_what_is_confidential_goes_to_the_server_and_nobody_else() -> None:
    async def scenario(site: Site) -> None:
        async with web_server(CONTENT) as other:
            graph = Graph()
            graph.secrets.add("password", "wörd".encode())
            graph.secrets.add("cookies", b"id=7; x=y")
            site.answers.append(answer_with(302, Location=other.url))
            options = {"username": "ann", "password_secret": "password", "cookie_secret": "cookies"}
            async with opened(site, graph, **options) as disk:
                await disk.assert_right(0, 100)
            login = base64.b64encode("ann:wörd".encode()).decode()
            for request in site.requests:
                assert request.headers["Authorization"] == f"Basic {login}"
                assert request.headers["Cookie"] == "id=7; x=y"
            (redirected,) = other.requests
            assert not redirected.headers.keys() & {"Authorization", "Cookie"}

    run(scenario)


def test_a_name_in_the_options_goes_before_one_in_the_url() -> None:
    async def scenario(site: Site) -> None:
        url = site.url.replace("//", "//eve:word@")
        for options, login in (({}, "eve:word"), ({"username": "ann"}, "ann:")):
            graph = Graph()
            node = await open_node(graph, options_for(url, **options))
            assert site.requests[-1].headers["Authorization"] == (
                f"Basic {base64.b64encode(login.encode()).decode()}"
            )
            node.is_owned_by_user = False
            await graph.drop_if_unused(node)

    run(scenario)


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(proxy: Site) -> None:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        graph = Graph()
        graph.secrets.add("word", b"secret")
        options = options_for(
            "http://disks.example/a.img", proxy_username="pat", proxy_password_secret="word"
        )
        node = await open_node(graph, options)
        disk = Disk(graph, node)  # type: ignore[arg-type]
        await disk.assert_right(0, 100)
        login = base64.b64encode(b"pat:secret").decode()
        for request in proxy.requests:
            assert request.path == "http://disks.example/a.img"
            assert request.headers["Proxy-Authorization"] == f"Basic {login}"
        node.is_owned_by_user = False
        await disk.device.close()
        monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
        assert await refusal(proxy) == "Unsupported proxy: socks5"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        async with opened(proxy) as disk:
            await disk.assert_right(0, 100)
        assert proxy.requests[-1].path == "/disk.img"

    run(scenario)


def test_redirects_are_followed_so_far() -> None:
    async def scenario(site: Site) -> None:
        site.answers += [answer_with(302, Location="/b"), answer_with(308, Location="c")]
        async with opened(site) as disk:
            assert [request.path for request in site.requests] == ["/disk.img", "/b", "/c"]
            site.answers.append(answer_with(307, b"body", Location=site.url))
            await disk.assert_right(0, 100)
        refusals: list[tuple[Answer, str]] = [
            (answer_with(302), "The server redirects to nowhere"),
            (
                answer_with(302, Location="http://x:99999/"),
                "Not a URL: Port out of range 0-65535",
            ),
            (
                answer_with(302, Location="file:///etc/passwd"),
                "The server redirects to a URL that is not of the web: file:///etc/passwd",
            ),
        ]
        for answer, text in refusals:
            site.answers = [answer]
            assert await refusal(site) == text
        site.answers = [answer_with(302, Location="/again")] * 11
        assert await refusal(site) == "Maximum (10) redirects followed"

    run(scenario)


def test_tls_servers_have_to_prove_who_they_are(tmp_path: Path) -> None:
    openssl = require("openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=nobody", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def main() -> None:
        async with web_server(CONTENT, context) as site:
            assert "certificate verify failed" in await refusal(site)
            assert not site.requests
            async with opened(site, sslverify=False) as disk:
                await disk.assert_right(0, 3 * BLOCK)
                assert '"sslverify": false' in disk.node.filename
            site.answers.append(answer_with(302, Location=site.url.replace("https", "http")))
            text = await refusal(site, sslverify=False)
            assert text == "The server redirects from https to http"

    asyncio.run(main())


# Servers that are no good


OPENING: dict[str, tuple[Callable[[Site], Answer], str]] = {
    "no such file": (lambda site: answer_with(404), "The requested URL returned error: 404"),
    "no permission": (lambda site: answer_with(401), "The requested URL returned error: 401"),
    "no ranges": (
        lambda site: answer_with(200, site.content),
        "Server does not support 'range' (byte ranges).",
    ),
    "no size": (
        lambda site: site.like_proper(Content_Range="bytes 0-0/*"),
        "Server didn't report file size.",
    ),
    "no range": (
        lambda site: site.like_proper(Content_Range=None),
        "Server didn't report file size.",
    ),
    "a range of something else": (
        lambda site: site.like_proper(Content_Range="items 0-0/9"),
        "Server didn't report file size.",
    ),
    "a size that cannot be": (
        lambda site: site.like_proper(Content_Range=f"bytes 0-0/{10**19 - 1}"),
        "The server reported a size that cannot be",
    ),
    "a size of no bytes": (
        lambda site: site.like_proper(Content_Range="bytes 0-0/0"),
        "The server reported a size that cannot be",
    ),
    "another range": (
        lambda site: site.like_proper(Content_Range="bytes 1-1/100"),
        "The server sent another range than it was asked for",
    ),
    "another length": (
        lambda site: site.like_proper(body=lambda body: body * 2),
        "The server sent another range than it was asked for",
    ),
    "an encoded body": (
        lambda site: site.like_proper(Content_Encoding="gzip"),
        "The server encodes what it sends, although it was told not to",
    ),
    "an endless body": (lambda site: site.endless, "The server sent more than it was asked for"),
    "no body": (
        lambda site: site.like_proper(status=204, body=lambda body: b"", Content_Length=None),
        "Server does not support 'range' (byte ranges).",
    ),
}


@pytest.mark.parametrize("name", OPENING)
def test_what_cannot_be_read_in_ranges_is_refused(name: str) -> None:
    make, text = OPENING[name]

    async def scenario(site: Site) -> None:
        site.answers.append(make(site))
        assert await refusal(site) == text

    run(scenario)


def test_a_server_that_speaks_something_else_is_refused() -> None:
    async def scenario(site: Site) -> None:
        site.answers = [raw(b"SSH-2.0-OpenSSH_9.2\r\n")] * source.MAX_ATTEMPTS
        assert (await refusal(site)).startswith("The server's answer cannot be understood: ")
        site.answers = [raw(b"HTTP/1.1 206 " + b"x" * 100_000)] * source.MAX_ATTEMPTS
        assert (await refusal(site)).startswith("The server's answer cannot be understood: ")
        port = site.port
        site.port = 1
        assert await refusal(site) == "Failed to connect to 127.0.0.1 port 1: Connection refused"
        site.port = port

    run(scenario)


READING: dict[str, tuple[Callable[[Site], Answer], str]] = {
    **{name: case for name, case in OPENING.items() if "size" not in name},
    "no size": (OPENING["no size"][0], OPENING["no size"][1]),
    "another version": (
        lambda site: site.like_proper(ETag='"two"'),
        "The file has changed on the server",
    ),
    "no version": (
        lambda site: site.like_proper(ETag=None),
        "The file has changed on the server",
    ),
    "another size": (
        lambda site: Site(site.content + b"x", site.version).answer,
        "The file has changed on the server",
    ),
    "another time": (
        lambda site: site.like_proper(Last_Modified="Thu, 01 Jan 1970 00:00:00 GMT"),
        "The file has changed on the server",
    ),
    "nothing left": (
        lambda site: answer_with(416, Content_Range="bytes */0"),
        "The file has changed on the server",
    ),
    "too small by now": (
        lambda site: answer_with(416, Content_Range="bytes */10"),
        "The requested URL returned error: 416",
    ),
}


@pytest.mark.parametrize("name", READING)
def test_what_is_not_the_file_as_it_was_is_an_error_and_never_data(name: str) -> None:
    make, text = READING[name]
    offset = BLOCK if name == "nothing left" else 0

    async def scenario(site: Site) -> None:
        async with opened(site) as disk:
            for length in (100, 2 * BLOCK):  # from a block, and past them
                site.answers.append(make(site))
                assert await disk.failure(offset, length) == text
                await disk.assert_right(offset, length)  # it is there again

    run(scenario)


def test_a_file_that_changed_for_good_is_never_read_again() -> None:
    async def scenario(site: Site) -> None:
        async with opened(site) as disk:
            await disk.assert_right(0, 100)
            site.content = bytes(len(CONTENT))
            site.version = {"ETag": '"two"'}
            assert await disk.failure(BLOCK) == "The file has changed on the server"
            assert await disk.failure(BLOCK, 3 * BLOCK) == "The file has changed on the server"
            await disk.assert_right(0, 100)  # what is known is known

    run(scenario)


@pytest.mark.parametrize("length", [100, 3 * BLOCK])
def test_a_connection_that_is_dropped_costs_nothing_but_time(length: int) -> None:
    async def scenario(site: Site) -> None:
        site.answers += [hang_up, site.cut_off_after(0)]
        async with opened(site) as disk:
            site.requests.clear()
            site.answers += [site.cut_off_after(1000), hang_up, site.cut_off_after(17)]
            await disk.assert_right(BLOCK, length)
            end = max(length, BLOCK) + BLOCK
            # aiohttp itself asks again, once, on a connection that was left over.
            assert list(dict.fromkeys(site.ranges)) == [
                (BLOCK, end),
                (BLOCK + 1000, end),
                (BLOCK + 1017, end),
            ]

    run(scenario)


def test_a_connection_that_is_dropped_behind_the_last_byte_costs_nothing() -> None:
    async def scenario(site: Site) -> None:
        whole = site.like_proper(
            Content_Length=None,
            Transfer_Encoding="chunked",
            body=lambda body: f"{len(body):x}\r\n".encode() + body + b"\r\n",
        )

        async def without_end(request: Request, writer: asyncio.StreamWriter) -> None:
            await whole(request, writer)
            writer.close()

        async with opened(site) as disk:
            site.requests.clear()
            site.answers.append(without_end)
            await disk.assert_right(0, 100)
            assert site.ranges == [(0, BLOCK)]

    run(scenario)


def test_a_connection_that_is_always_dropped_is_an_error() -> None:
    async def scenario(site: Site) -> None:
        async with opened(site) as disk:
            site.requests.clear()
            site.answers += [site.cut_off_after(1)] * source.MAX_ATTEMPTS
            assert await disk.failure(0, 100) == "The server closed the connection"
            assert len(site.requests) == source.MAX_ATTEMPTS
            site.answers += [hang_up] * 2 * source.MAX_ATTEMPTS
            assert await disk.failure(0, 100) == "The server closed the connection"

    run(scenario)


def test_a_chunked_body_that_ends_too_early_is_asked_for_again() -> None:
    async def scenario(site: Site) -> None:
        async with opened(site) as disk:
            site.requests.clear()
            chunk = b"a\r\n" + CONTENT[:10] + b"\r\n0\r\n\r\n"
            site.answers.append(
                site.like_proper(
                    Content_Length=None, Transfer_Encoding="chunked", body=lambda body: chunk
                )
            )
            await disk.assert_right(0, 100)
            assert site.ranges == [(0, BLOCK), (10, BLOCK)]

    run(scenario)


def test_a_server_that_takes_too_long_is_an_error() -> None:
    async def main() -> None:
        async with web_server(CONTENT) as site, site.hold() as arrived:
            access = source.HttpAccess(url=site.url, timeout_s=0.01)
            with pytest.raises(NodeError) as caught:
                await source.HttpSource.open(access)
            assert caught.value.message == "Operation timed out after 0.01 seconds"
            await arrived()

    asyncio.run(main())


# Reading ahead


def test_small_reads_ask_once_for_each_block() -> None:
    async def scenario(site: Site) -> None:
        async with opened(site) as disk:
            site.requests.clear()
            for offset in range(0, 3 * BLOCK, 256):
                await disk.assert_right(offset, 256)
            assert site.ranges == [(n * BLOCK, (n + 1) * BLOCK) for n in range(3)]
            await disk.assert_right(BLOCK - 10, 20)
            assert len(site.ranges) == 3
            assert site.connections == 1

    run(scenario)


def test_a_block_that_is_there_is_read_on_the_spot() -> None:
    async def scenario(site: Site) -> None:
        async with opened(site) as disk:
            buffer = memoryview(bytearray(100))
            assert not disk.node.pread_now(50, buffer, True)
            await disk.assert_right(0, 1)
            assert disk.node.pread_now(50, buffer, True)
            assert buffer == CONTENT[50:150]
            for offset, length in ((BLOCK - 50, 100), (BLOCK, 1), (0, BLOCK), (0, 0)):
                buffer = memoryview(bytearray(length))
                assert not disk.node.pread_now(offset, buffer, True)

    run(scenario)


def test_readers_of_one_block_share_it() -> None:
    async def scenario(site: Site) -> None:
        async with opened(site) as disk:
            site.requests.clear()
            async with site.hold() as arrived:
                first = asyncio.create_task(disk.read(0, 100))
                others = [asyncio.create_task(disk.read(n * 100, 100)) for n in range(1, 5)]
                await arrived()
                await turns()
                first.cancel()  # the others need the block all the same
                await turns()
            await asyncio.gather(*others)
            assert [task.result() for task in others] == [
                CONTENT[n * 100 : n * 100 + 100] for n in range(1, 5)
            ]
            assert first.cancelled()
            assert len(site.requests) == 1

    run(scenario)


def test_memory_is_bounded_whatever_is_in_flight() -> None:
    async def scenario(site: Site) -> None:
        async with opened(site, readahead=512) as disk:
            async with site.hold() as arrived:
                reads = [asyncio.create_task(disk.read(n * 512 + 5, 100)) for n in range(60)]
                for _ in range(source.MAX_CONNECTIONS):
                    await arrived()
                await turns()
                assert len(disk.node._blocks) == KEPT_BLOCKS
            for n, content in enumerate(await asyncio.gather(*reads)):
                assert content == CONTENT[n * 512 + 5 : n * 512 + 105]
            assert len(disk.node._blocks) == KEPT_BLOCKS
            assert site.connections <= source.MAX_CONNECTIONS + 1

    run(scenario)


def test_without_readahead_only_what_is_asked_for_is_read() -> None:
    async def scenario(site: Site) -> None:
        async with opened(site, readahead=0) as disk:
            site.requests.clear()
            await disk.assert_right(10, 20)
            assert site.ranges == [(10, 30)]

    run(scenario)


def test_long_reads_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_PIECE", 3000)

    async def scenario(site: Site) -> None:
        async with opened(site) as disk:
            site.requests.clear()
            await disk.assert_right(0, 2 * BLOCK)
            assert site.ranges == [(0, 3000), (3000, 6000), (6000, 2 * BLOCK)]

    run(scenario)


def test_closing_ends_what_is_under_way() -> None:
    async def scenario(site: Site) -> None:
        graph = Graph()
        node = await open_node(graph, options_for(site.url))
        async with site.hold() as arrived:
            reading = asyncio.create_task(node.pread(0, memoryview(bytearray(100))))
            await arrived()
            reading.cancel()
            await turns()
            node.is_owned_by_user = False
            await graph.drop_if_unused(node)
        assert not graph.nodes

    run(scenario)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from((0, 512, BLOCK)))
def test_every_read_is_right_or_an_error(seed: int, readahead: int) -> None:
    chance = random.Random(seed)

    async def scenario(site: Site) -> None:
        faults: list[Answer] = [
            hang_up,
            site.cut_off_after(chance.randrange(600)),
            site.like_proper(ETag='"two"'),
            site.like_proper(
                body=lambda body: b"1\r\n" + body[:1] + b"\r\n0\r\n\r\n",
                Content_Length=None,
                Transfer_Encoding="chunked",
            ),
            answer_with(503),
        ]

        async def maybe_bad(request: Request, writer: asyncio.StreamWriter) -> None:
            answer = chance.choice(faults) if chance.random() < 0.3 else site.answer
            await answer(request, writer)

        async with opened(site, readahead=readahead) as disk:
            site.answers = [maybe_bad] * 10_000

            async def read() -> int:
                offset = chance.randrange(disk.node.size)
                length = chance.randint(1, min(3 * BLOCK, disk.node.size - offset))
                try:
                    content = await disk.read(offset, length)
                except NodeError as error:
                    return error.errno
                assert content == CONTENT[offset : offset + length].ljust(length, b"\0")
                return 0

            found = await asyncio.gather(*(read() for _ in range(30)))
            assert set(found) <= {0, errno.EIO}

    run(scenario)
