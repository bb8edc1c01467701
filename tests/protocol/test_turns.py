# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A greedy client gets no more than its turn, however much it has sent."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import pytest
import uvloop

from nbdjobs.protocol.buffers import BufferPool, ReceiveBuffer
from nbdjobs.protocol.constants import REQUEST_MAGIC, Command, HeaderStyle
from nbdjobs.protocol.export import Export
from nbdjobs.protocol.negotiation import Chosen
from nbdjobs.protocol.session import Session
from nbdjobs.protocol.turns import (
    ALONE,
    CHANGE_COST,
    READ_COST,
    REMEMBERED,
    SHARED,
    Turns,
)
from tests.protocol.client import Client
from tests.protocol.rig import MemoryDisk, running

KIB = 1024
MIB = 1024 * KIB

#: Where only the modest client reads.
MODEST_OFFSET = 512 * KIB
MODEST_LENGTH = 512
MODEST_REQUESTS = 20


@dataclass(frozen=True)
class Greed:
    """What a greedy client asks for, a thousand times in advance."""

    command: Command
    length: int

    @property
    def per_turn(self) -> int:
        """Requests in a turn that is shared."""
        cost = READ_COST if self.command is Command.READ else CHANGE_COST
        return -(-SHARED // (cost + self.length))


GREED = [
    Greed(Command.READ, 4 * KIB),
    Greed(Command.READ, 64 * KIB),
    Greed(Command.READ, 512 * KIB),
    Greed(Command.WRITE, 4 * KIB),
    Greed(Command.WRITE, 64 * KIB),
]


class Company:
    """Clients that take turns."""

    def __init__(self) -> None:
        self.turns = Turns()

    def serve(self, client: object, batch: int) -> int:
        """Serve a client from whom so many requests came; what that may cost."""
        allowance = self.turns.allowance(client)
        self.turns.batch = batch
        return allowance


def test_turns_are_short_while_a_modest_client_is_about() -> None:
    company = Company()
    greedy, modest = object(), object()
    assert [company.serve(greedy, 100) for _ in range(3)] == [ALONE] * 3
    for _ in range(3):
        company.serve(modest, 1)
        assert company.serve(greedy, 100) == SHARED
    rest = [company.serve(greedy, 100) for _ in range(REMEMBERED)]
    assert rest == [SHARED] * (REMEMBERED - 1) + [ALONE]


def test_turns_are_long_among_clients_that_send_much() -> None:
    company = Company()
    one, other = object(), object()
    for _ in range(3):
        assert company.serve(one, 16) == ALONE
        assert company.serve(other, 16) == ALONE


def test_a_modest_client_alone_is_no_company_for_itself() -> None:
    company = Company()
    one, newcomer = object(), object()
    assert [company.serve(one, 1) for _ in range(3)] == [ALONE] * 3
    company.turns.left(one)
    assert company.serve(newcomer, 100) == ALONE
    company.turns.left(one)
    assert company.serve(newcomer, 100) == ALONE


def test_what_does_not_fit_into_a_turn_waits_for_the_next() -> None:
    async def main() -> None:
        disk = MemoryDisk()
        session = Session(
            Chosen(Export(name="", backend=disk), HeaderStyle.SIMPLE, {}),
            pool=BufferPool(0),
            flush=lambda: None,
            notify=lambda: None,
        )
        buffer = ReceiveBuffer(BufferPool(0), 64 * KIB)
        count = 100
        for cookie in range(count):
            buffer.append(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, Command.READ, cookie, 0, 512))
        turns: list[int] = []
        while not turns or session.is_turn_over:
            session.spent = 0
            session.consume(buffer, 10 * (READ_COST + 512))
            turns.append(session.batch)
        assert turns == [10] * 10 + [0]
        assert buffer.start == buffer.end
        cookies = [
            struct.unpack(">IIQ", header)[2]  # type: ignore[arg-type]  # no ranges of files
            for header in session.out[::2]
        ]
        assert cookies == list(range(count))

    asyncio.run(main())


def test_a_turn_goes_on_when_more_bytes_come_within_it() -> None:
    async def main() -> None:
        session = Session(
            Chosen(Export(name="", backend=MemoryDisk()), HeaderStyle.SIMPLE, {}),
            pool=BufferPool(0),
            flush=lambda: None,
            notify=lambda: None,
        )
        buffer = ReceiveBuffer(BufferPool(0), 64 * KIB)
        request = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, Command.READ, 0, 0, 512)
        begun = []
        for _ in range(4):
            buffer.append(request * 3)
            session.consume(buffer, 5 * (READ_COST + 512))
            begun.append(session.batch)
        assert begun == [3, 2, 0, 0]

    asyncio.run(main())


@pytest.mark.parametrize("greed", GREED, ids=str)
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_between_two_requests_of_a_modest_client_a_greedy_one_has_a_few_turns(
    loop: Callable[[], asyncio.AbstractEventLoop], greed: Greed
) -> None:
    """The modest client hears of its answer in the next round of the loop and asks in the one
    after that; in each, the greedy one goes on where it had to stop, and may be read from."""

    async def main() -> None:
        async with running() as rig:
            rig.disk.is_data_known = True
            greedy, modest = await Client.attach(rig.path), await Client.attach(rig.path)
            await modest.read(MODEST_OFFSET, MODEST_LENGTH)
            rig.disk.calls.clear()
            payload = bytes(greed.length) if greed.command is Command.WRITE else b""
            for _ in range(1000):
                greedy.send(greed.command, 0, greed.length, payload=payload)
            answered = asyncio.ensure_future(take_replies(greedy, 1000))
            for _ in range(MODEST_REQUESTS):
                await modest.read(MODEST_OFFSET, MODEST_LENGTH)
            assert not answered.done(), "the greedy client has to be at work all the time"
            served = runs_of_greedy_requests(rig.disk)
            assert sum(served) >= MODEST_REQUESTS
            assert max(served) <= 4 * greed.per_turn
            await answered
            for client in (greedy, modest):
                await client.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


async def take_replies(client: Client, count: int) -> None:
    for _ in range(count):
        assert not (await client.reply())[-1].error


def runs_of_greedy_requests(disk: MemoryDisk) -> list[int]:
    """How many requests of the greedy client were begun before each of the modest one."""
    is_modest = [call[1] == MODEST_OFFSET for call in disk.calls]
    runs = [(kind, len(list(run))) for kind, run in groupby(is_modest)]
    last = max(number for number, (kind, _) in enumerate(runs) if kind)
    return [length for kind, length in runs[:last] if not kind]
