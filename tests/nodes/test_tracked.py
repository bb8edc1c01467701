# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The overlap table against a model that is a plain list."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdjobs.nodes.tracked import LEVEL_SHIFTS, Kind, TrackedRequest, TrackedRequests


@dataclass(eq=False)
class Entry:
    """What the model knows of one request."""

    offset: int
    end: int
    is_serialising: bool
    request: TrackedRequest
    blockers: set[Entry] = field(default_factory=set)
    has_begun: bool = False
    task: asyncio.Task[None] | None = None
    leave: asyncio.Event = field(default_factory=asyncio.Event)

    def overlaps(self, other: Entry) -> bool:
        return self.offset < other.end and other.offset < self.end

    def conflicts(self, earlier: Entry) -> bool:
        return (self.is_serialising or earlier.is_serialising) and self.overlaps(earlier)


class Model:
    """A list of the requests in flight; a newcomer notes every earlier one that conflicts."""

    def __init__(self) -> None:
        self.table = TrackedRequests()
        self.in_flight: list[Entry] = []

    async def enter(self, offset: int, length: int, is_serialising: bool, alignment: int) -> Entry:
        request = self.table.request(
            offset, length, Kind.WRITE, is_serialising=is_serialising, alignment=alignment
        )
        entry = Entry(
            offset // alignment * alignment,
            -(-(offset + length) // alignment) * alignment,
            is_serialising,
            request,
        )
        entry.blockers = {earlier for earlier in self.in_flight if entry.conflicts(earlier)}
        self.in_flight.append(entry)
        entry.task = asyncio.create_task(self._live(entry))
        await settle()
        return entry

    async def _live(self, entry: Entry) -> None:
        async with entry.request:
            entry.has_begun = True
            await entry.leave.wait()

    async def end(self, entry: Entry) -> None:
        assert entry.task is not None
        if entry.has_begun:
            entry.leave.set()
        else:
            entry.task.cancel()
        await asyncio.wait([entry.task])
        self.in_flight.remove(entry)
        for other in self.in_flight:
            other.blockers.discard(entry)
        await settle()

    def check(self) -> None:
        """Exactly those run that the model lets run, and the table holds nothing else."""
        for entry in self.in_flight:
            assert entry.has_begun is (not entry.blockers)
        running = [entry for entry in self.in_flight if entry.has_begun]
        for entry in running:
            for other in running:
                assert entry is other or not entry.conflicts(other)
        assert len(self.table) == len(self.in_flight)
        for entry in self.in_flight:
            found = list(self.table.overlapping(entry.offset, entry.end))
            expected = [other.request for other in self.in_flight if entry.overlaps(other)]
            assert len(found) == len(expected)
            assert set(found) == set(expected)


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


near = st.integers(0, 200_000)
far = st.sampled_from([1 << shift for shift in LEVEL_SHIFTS[:-1]]).flatmap(
    lambda base: st.integers(base - 2, base + 2)
)
lengths = st.one_of(st.integers(1, 9000), far, st.integers(1, 1 << 40))


@dataclass(frozen=True)
class Enter:
    offset: int
    length: int
    is_serialising: bool
    alignment: int


enters = st.builds(
    Enter,
    offset=st.one_of(near, near, far),
    length=lengths,
    is_serialising=st.booleans(),
    alignment=st.sampled_from([1, 512, 65536]),
)
ends = st.integers(0, 30)
Step = Enter | int


@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(enters, enters, ends), max_size=40), st.integers(0, 10_000))
def test_random_schedules_agree_with_a_plain_list(steps: Sequence[Step], seed: int) -> None:
    async def main() -> None:
        model = Model()
        for step in steps:
            if isinstance(step, Enter):
                await model.enter(step.offset, step.length, step.is_serialising, step.alignment)
            elif model.in_flight:
                # One that runs ends; one that waits is cancelled: neither may leave a trace.
                await model.end(model.in_flight[step % len(model.in_flight)])
            model.check()
        # No deadlock: somebody always runs, until nobody is left.
        while model.in_flight:
            running = [entry for entry in model.in_flight if entry.has_begun]
            await model.end(running[seed % len(running)])
            model.check()
        assert len(model.table) == 0
        assert not any(model.table._levels)

    asyncio.run(main())


async def started(model: Model, *ranges: tuple[int, int, bool]) -> list[Entry]:
    return [await model.enter(offset, end - offset, hard, 1) for offset, end, hard in ranges]


def test_the_picture_in_the_module() -> None:
    async def main() -> None:
        model = Model()
        a, b, c, d = await started(
            model, (0, 8, False), (4, 6, True), (5, 9, False), (9, 12, False)
        )
        assert [e.has_begun for e in (a, b, c, d)] == [True, False, False, True]
        await model.end(a)
        assert [e.has_begun for e in (b, c)] == [True, False]
        await model.end(b)
        assert c.has_begun
        await model.end(c)
        await model.end(d)

    asyncio.run(main())


def test_each_byte_is_first_come_first_served() -> None:
    async def main() -> None:
        model = Model()
        entries = await started(model, *[(0, 10, True)] * 5)
        for entry in entries:
            assert [e for e in model.in_flight if e.has_begun] == [entry]
            await model.end(entry)

    asyncio.run(main())


def test_ordinary_requests_do_not_overtake_a_serialising_one_that_waits() -> None:
    async def main() -> None:
        model = Model()
        first, hard, late = await started(model, (0, 10, False), (0, 10, True), (0, 10, False))
        assert not late.has_begun
        await model.end(hard)  # it gives up waiting
        assert not first.request._waiters
        assert late.has_begun
        await model.end(first)
        await model.end(late)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
def test_a_request_that_does_not_end_well_still_lets_the_next_one_go(
    how: Literal["fails", "is cancelled"],
) -> None:
    async def main() -> None:
        table = TrackedRequests()
        begun = asyncio.Event()

        async def first() -> None:
            async with table.request(0, 10, Kind.WRITE, is_serialising=True):
                begun.set()
                await settle()
                if how == "fails":
                    raise ZeroDivisionError
                await asyncio.Event().wait()

        async def second() -> None:
            async with table.request(5, 10, Kind.READ, is_serialising=False):
                pass

        one = asyncio.create_task(first())
        await begun.wait()
        two = asyncio.create_task(second())
        await settle()
        if how == "is cancelled":
            one.cancel()
        await two
        await asyncio.wait([one])
        assert one.cancelled() or isinstance(one.exception(), ZeroDivisionError)
        assert len(table) == 0

    asyncio.run(main())


def test_cancelling_a_waiter_in_the_turn_in_which_it_is_woken_leaves_no_trace() -> None:
    async def main() -> None:
        model = Model()
        first, second, third = await started(model, *[(0, 10, True)] * 3)
        assert first.task is not None
        assert second.task is not None
        first.leave.set()
        await asyncio.wait([first.task])  # its end has woken the second one, which has not run
        second.task.cancel()
        await settle()
        assert third.has_begun
        third.leave.set()
        await settle()
        assert len(model.table) == 0

    asyncio.run(main())


def test_alignment_widens_a_request_to_whole_units() -> None:
    request = TrackedRequests().request(
        70_000, 10, Kind.COPY, is_serialising=True, alignment=65_536
    )
    assert (request.offset, request.end) == (65_536, 131_072)
    assert request.overlaps(131_071, 131_072)
    assert not request.overlaps(131_072, 131_073)
    assert not request.overlaps(0, 65_536)
