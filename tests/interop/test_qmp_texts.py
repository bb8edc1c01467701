# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Our QMP session answers any input as the real program does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdjobs.qmp.session import Session
from tests.interop.oracle import END, END_ID, Oracle, Reply
from tests.qmp.schema_shape import differences
from tests.qmp.toy import TOY_REGISTRY, ToyContext
from tests.qmp.wire_cases import BEFORE_NEGOTIATION, MESSAGES, OUT_OF_BAND

Oracles = pytest.TempPathFactory


def started(factory: Oracles, capabilities: list[str] | None) -> Oracle:
    return Oracle(factory.mktemp("oracle"), capabilities=capabilities)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: Oracles) -> Iterator[Oracle]:
    with started(tmp_path_factory, []) as running:
        yield running


@pytest.fixture(scope="module")
def new_oracle(tmp_path_factory: Oracles) -> Iterator[Oracle]:
    with started(tmp_path_factory, None) as running:
        yield running


@pytest.fixture(scope="module")
def oob_oracle(tmp_path_factory: Oracles) -> Iterator[Oracle]:
    with started(tmp_path_factory, ["oob"]) as running:
        yield running


def exchange(data: bytes, capabilities: list[str] | None) -> list[Reply]:
    """What our session answers, as `Oracle.exchange` does."""

    async def run() -> list[Reply]:
        session = Session(TOY_REGISTRY)
        context = ToyContext()
        replies: list[Reply] = []
        if capabilities is not None:
            enable = {"enable": capabilities}
            request = {"execute": "qmp_capabilities", "arguments": enable}
            for message in session.receive(json.dumps(request).encode()):
                await session.answer(message, context)
        for message in session.receive(data + END):
            replies.append(json.loads(await session.answer(message, context)))
        end = replies.pop()
        assert end["id"] == END_ID
        return replies

    return asyncio.run(run())


@pytest.mark.parametrize("data", BEFORE_NEGOTIATION)
def test_before_negotiation(new_oracle: Oracle, data: bytes) -> None:
    assert exchange(data, None) == new_oracle.exchange(data)


@pytest.mark.parametrize("data", OUT_OF_BAND)
def test_out_of_band(oob_oracle: Oracle, data: bytes) -> None:
    assert exchange(data, ["oob"]) == oob_oracle.exchange(data)


@pytest.mark.parametrize("data", MESSAGES)
def test_messages(oracle: Oracle, data: bytes) -> None:
    assert exchange(data, []) == oracle.exchange(data)


PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"'",
    b"\\",
    b"\\u12aB",
    b"\\ud834",
    b"\\udd1e",
    b"\n",
    b" ",
    b"0",
    b"-1",
    b"2.5",
    b"1e3",
    b".",
    b"true",
    b"x",
    b"@",
    b"\x01",
    b"\xc3\xa9",
    b"\xff",
    b'"execute"',
    b'"id"',
    b'"foo"',
    b'{"execute": "foo"}',
]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=12))
def test_any_input(oracle: Oracle, pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    assert exchange(data, []) == oracle.exchange(data)


@pytest.mark.parametrize(
    "name", ["qmp_capabilities", "query-version", "query-commands", "query-qmp-schema", "quit"]
)
def test_the_schema_of_the_core_commands_is_the_same(oracle: Oracle, name: str) -> None:
    ours: list[dict[str, Any]] = asyncio.run(schema())
    theirs = oracle.execute("query-qmp-schema")["return"]
    assert differences(ours, theirs, frozenset({name})) == []


async def schema() -> list[dict[str, Any]]:
    session = Session(TOY_REGISTRY)
    session.negotiate([])
    [message] = session.receive(b'{"execute": "query-qmp-schema"}')
    result: list[dict[str, Any]] = json.loads(await session.answer(message, ToyContext()))["return"]
    return result


def test_the_greeting_has_the_same_form(oracle: Oracle) -> None:
    ours = json.loads(Session(TOY_REGISTRY).greeting())["QMP"]
    theirs = oracle.greeting["QMP"]
    assert ours["capabilities"] == theirs["capabilities"]
    assert ours["version"].keys() == theirs["version"].keys()
    assert ours["version"]["qemu"].keys() == theirs["version"]["qemu"].keys()
