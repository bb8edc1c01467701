# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Histograms are on exactly while somebody looks at them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from nbdjobs.cli.histogram import BOUNDARIES_NS, Histogram
from nbdjobs.cli.latencies import COMMAND, keeping_latencies
from nbdjobs.cli.session import RefusedError, ServerGoneError, Session
from nbdjobs.cli.traffic import Count, Counts
from nbdjobs.errors import ErrorClass

ON = {"id": "e", "boundaries": [*BOUNDARIES_NS]}
OFF = {"id": "e"}


def counts(*, has_histogram: bool = False) -> dict[str, Counts]:
    histogram = Histogram((1,), (0, 0)) if has_histogram else None
    count = Count(operations=0, length=0, time_ns=0, histogram=histogram)
    return {"e": Counts(count, count)}


class Server(Session):
    """Writes down what it is asked for, and may refuse it."""

    def __init__(self, refusal: Exception | None = None):
        super().__init__(QMPClient("test"), Path("nowhere"))
        self.asked: list[object] = []
        self.refusal = refusal

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        assert command == COMMAND
        self.asked.append(arguments)
        if self.refusal is not None:
            raise self.refusal
        return {}


def refused(error_class: ErrorClass) -> RefusedError:
    return RefusedError(COMMAND, "no", error_class)


def test_they_are_switched_on_and_off_again() -> None:
    async def look(server: Server) -> None:
        async with keeping_latencies(server) as latencies:
            await latencies.switch_on(counts())
            await latencies.switch_on(counts(has_histogram=True))
            assert server.asked == [ON]

    server = Server()
    asyncio.run(look(server))
    assert server.asked == [ON, OFF]


def test_those_of_somebody_else_are_left_alone() -> None:
    async def look(server: Server) -> None:
        async with keeping_latencies(server) as latencies:
            await latencies.switch_on(counts(has_histogram=True))

    server = Server()
    asyncio.run(look(server))
    assert server.asked == []


def test_they_are_switched_on_again_when_somebody_else_took_them_away() -> None:
    async def look(server: Server) -> None:
        async with keeping_latencies(server) as latencies:
            await latencies.switch_on(counts(has_histogram=True))
            await latencies.switch_on(counts())

    server = Server()
    asyncio.run(look(server))
    assert server.asked == [ON, OFF]


def test_a_server_without_the_command_is_asked_once() -> None:
    async def look(server: Server) -> None:
        async with keeping_latencies(server) as latencies:
            await latencies.switch_on(counts())
            await latencies.switch_on(counts())

    server = Server(refused(ErrorClass.COMMAND_NOT_FOUND))
    asyncio.run(look(server))
    assert server.asked == [ON]


def test_an_export_that_has_just_gone_is_no_error() -> None:
    async def look(server: Server) -> None:
        async with keeping_latencies(server) as latencies:
            await latencies.switch_on(counts())
            await latencies.switch_on(counts())

    server = Server(refused(ErrorClass.GENERIC))
    asyncio.run(look(server))
    assert server.asked == [ON, ON]


def test_a_server_that_is_gone_does_not_hide_why() -> None:
    async def look(server: Server) -> None:
        async with keeping_latencies(server) as latencies:
            await latencies.switch_on(counts())
            server.refusal = ServerGoneError("at the end")
            raise ServerGoneError("at the first")

    with pytest.raises(ServerGoneError, match="at the first"):
        asyncio.run(look(Server()))
