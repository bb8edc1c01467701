# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A greedy client gets no more than its turn, however much it has sent."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import groupby

import pytest
import uvloop

from nbdjobs.protocol.buffers import BufferPool, ReceiveBuffer
from nbdjobs.protocol.constants import REQUEST_MAGIC, Command, CommandFlag, HeaderStyle
from nbdjobs.protocol.export import Export, Extent
from nbdjobs.protocol.extents import EXTENTS_AT_ONCE
from nbdjobs.protocol.memory import Budget
from nbdjobs.protocol.negotiation import Chosen
from nbdjobs.protocol.session import Session
from nbdjobs.protocol.turns import (
    ALONE,
    CHANGE_COST,
    READ_COST,
    REMEMBERED,
    SHARED,
    STATUS_COST,
    Allowance,
    Turns,
)
from tests.protocol.client import Client
from tests.protocol.rig import BLOCK, Allocation, MemoryDisk, Rig, running

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
        return -(-SHARED.cost // (cost + self.length))


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

    def serve(self, client: object, batch: int) -> Allowance:
        """Serve a client from whom so many requests came; what it may have."""
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
            budget=Budget(),
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
            session.consume(buffer, Allowance(10 * (READ_COST + 512), 16))
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
            budget=Budget(),
            flush=lambda: None,
            notify=lambda: None,
        )
        buffer = ReceiveBuffer(BufferPool(0), 64 * KIB)
        request = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, Command.READ, 0, 0, 512)
        begun = []
        for _ in range(4):
            buffer.append(request * 3)
            session.consume(buffer, Allowance(5 * (READ_COST + 512), 16))
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


class Logged(Allocation):
    """Notes every search for extents among the calls of its disk."""

    async def extents(self, offset: int, length: int, limit: int) -> Sequence[Extent]:
        found = await super().extents(offset, length, limit)
        self.disk.calls.append(("extents", len(found)))
        return found


@asynccontextmanager
async def full_of_holes() -> AsyncIterator[tuple[Rig, MemoryDisk]]:
    """A server with an export named "holes", of which every other block is one."""
    async with running() as rig:
        disk = MemoryDisk()
        for block in range(0, disk.size, 2 * BLOCK):
            disk.content[block] = 1
        contexts = (Logged(disk),)
        rig.server.add_export(replace(rig.export, name="holes", backend=disk, contexts=contexts))
        yield rig, disk


def test_a_long_search_for_extents_goes_in_steps_and_finds_all() -> None:
    async def main() -> None:
        async with full_of_holes() as (rig, disk):
            client = await Client.attach(rig.path, name="holes", contexts=["base:allocation"])
            (chunk,) = await client.ask(Command.BLOCK_STATUS, 0, disk.size)
            found = list(struct.iter_unpack(">II", chunk.payload[4:]))
            assert found == [(BLOCK, 3 if number % 2 else 0) for number in range(len(found))]
            assert len(found) == disk.size // BLOCK
            assert max(disk.calls) == ("extents", EXTENTS_AT_ONCE)
            await client.close()

    asyncio.run(main())


def test_extents_that_go_on_in_the_next_step_are_one() -> None:
    class Pieces:
        name = "base:allocation"

        async def extents(self, offset: int, length: int, limit: int) -> Sequence[Extent]:
            return [Extent(1, 7)] * min(length, limit)

    async def main() -> None:
        async with running() as rig:
            export = replace(rig.export, name="pieces", contexts=(Pieces(),))
            rig.server.add_export(export)
            client = await Client.attach(rig.path, name="pieces", contexts=["base:allocation"])
            (chunk,) = await client.ask(Command.BLOCK_STATUS, 0, 100)
            assert sum(length for length, _ in struct.iter_unpack(">II", chunk.payload[4:])) == 100
            await client.close()

    asyncio.run(main())


def test_searches_for_extents_leave_turns_to_others() -> None:
    async def main() -> None:
        async with full_of_holes() as (rig, disk):
            greedy = await Client.attach(rig.path, name="holes", contexts=["base:allocation"])
            modest = await Client.attach(rig.path, name="holes")
            for _ in range(100):
                greedy.send(Command.BLOCK_STATUS, 0, disk.size)
            answered = asyncio.ensure_future(take_replies(greedy, 100))
            searches = []
            for _ in range(MODEST_REQUESTS):
                disk.calls.clear()
                await modest.read(0, MODEST_LENGTH, flags=CommandFlag.DF)
                searches.append(sum(call[0] == "extents" for call in disk.calls))
            assert not answered.done()
            # One long search goes on, and in each turn a few others begin, up to 100 in all.
            begun = ALONE.cost // STATUS_COST
            assert max(searches) <= 4 * (begun + 1)
            assert sum(searches) >= MODEST_REQUESTS
            await answered
            for client in (greedy, modest):
                await client.close()

    asyncio.run(main())


@pytest.mark.parametrize("has_company", [True, False])
def test_in_modest_company_few_requests_wait_for_the_disk(has_company: bool) -> None:
    async def main() -> None:
        async with running() as rig:
            greedy, modest = await Client.attach(rig.path), await Client.attach(rig.path)
            if has_company:
                await modest.read(0, MODEST_LENGTH, flags=CommandFlag.DF)
            gate = rig.disk.hold("flush")
            greedy.writer.write(b"".join(greedy.pack(Command.FLUSH) for _ in range(200)))
            most = (SHARED if has_company else ALONE).waiting
            await gate.reached(most)
            for _ in range(10):
                await modest.read(0, MODEST_LENGTH, flags=CommandFlag.DF)
            assert gate.waiting == most
            rig.disk.unhold("flush")
            await take_replies(greedy, 200)
            for client in (greedy, modest):
                await client.close()

    asyncio.run(main())
