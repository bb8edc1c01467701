# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Throttle groups: shares, order, and what remains of those who give up; with time by hand."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from nbdjobs.nodes.leaky_bucket import BucketConfig, BucketName, Direction, ThrottleConfig
from nbdjobs.nodes.throttle_group import Member, ThrottleGroup
from tests.jobs.rig import ManualClock

READ, WRITE = Direction.READ, Direction.WRITE
BPS, IOPS = BucketName.BPS_TOTAL, BucketName.IOPS_TOTAL


def limited(**limits: int) -> ThrottleConfig:
    """Limits by the names of buckets, `_` standing for `-`."""
    buckets = {BucketName(name.replace("_", "-")): BucketConfig(n) for name, n in limits.items()}
    return ThrottleConfig(buckets)


class LateClock(ManualClock):
    """A clock whose timers may ring late, as an event loop's do."""

    def pass_unnoticed(self, seconds: float) -> None:
        """Let time pass without making the calls that fall due."""
        self._now += seconds


class Rig:
    """A group and its members, and what they have begun, in order.

    Attributes:
        begun: For each request that began, the time and how the test called it.
    """

    def __init__(self, config: ThrottleConfig, members: int = 1):
        self.clock = LateClock()
        self.group = ThrottleGroup(config, self.clock)
        self.members = [self.group.join() for _ in range(members)]
        self.begun: list[tuple[float, object]] = []
        self.tasks: list[asyncio.Task[None]] = []

    def send(
        self,
        label: object,
        *,
        member: int = 0,
        direction: Direction = READ,
        length: int = 1,
    ) -> asyncio.Task[None]:
        """Begin a request, or let it wait."""
        coroutine = self._request(self.members[member], label, direction, length)
        task = asyncio.get_running_loop().create_task(coroutine)
        self.tasks.append(task)
        return task

    async def _request(
        self, member: Member, label: object, direction: Direction, length: int
    ) -> None:
        if member.is_free(direction):
            member.account(direction, length)
        else:
            await member.wait_turn(direction, length)
        self.begun.append((self.clock.now(), label))

    async def settle(self) -> None:
        """Let tasks do what they can without time passing."""
        for _ in range(4):
            await asyncio.sleep(0)

    async def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        await self.settle()

    async def finish(self) -> None:
        """Let time pass until nothing waits; a group that forgets somebody fails here."""
        await self.settle()
        for _ in range(10_000):
            if all(task.done() for task in self.tasks):
                return
            assert self.clock.pending, "somebody waits, and nobody will look at it again"
            await self.advance(0.05)
        raise AssertionError("somebody starves")

    @property
    def labels(self) -> list[object]:
        return [label for _, label in self.begun]


def run(
    scenario: Callable[[Rig], Awaitable[None]], config: ThrottleConfig, members: int = 1
) -> None:
    async def go() -> None:
        await scenario(Rig(config, members))

    asyncio.run(go())


def test_requests_begin_in_the_order_in_which_they_came() -> None:
    async def scenario(rig: Rig) -> None:
        for number in range(5):
            rig.send(number)
        await rig.finish()
        assert rig.labels == [0, 1, 2, 3, 4]
        assert [time for time, _ in rig.begun] == sorted(time for time, _ in rig.begun)
        assert rig.begun[-1][0] >= 3.9

    run(scenario, limited(iops_total=1))


def test_members_get_equal_shares_however_many_requests_they_have_waiting() -> None:
    async def scenario(rig: Rig) -> None:
        for _ in range(200):
            rig.send("many", member=0)
        for _ in range(50):
            rig.send("some", member=1)
        one = rig.send("one", member=2)
        for _ in range(1000):
            await rig.advance(0.01)
            if one.done():  # sends the next when it has its answer
                one = rig.send("one", member=2)
        shares = [rig.labels.count(label) for label in ("many", "some", "one")]
        assert sum(shares) > 90
        assert max(shares) - min(shares) <= 2
        await rig.finish()

    run(scenario, limited(iops_total=10), members=3)


def test_reads_and_writes_under_one_limit_do_not_starve_each_other() -> None:
    async def scenario(rig: Rig) -> None:
        for _ in range(50):
            rig.send("read", direction=READ)
            rig.send("write", direction=WRITE)
        await rig.advance(3.0)
        shares = Counter(rig.labels)
        assert abs(shares["read"] - shares["write"]) <= 2
        await rig.finish()

    run(scenario, limited(iops_total=10))


def test_a_read_waiting_for_its_own_limit_is_not_starved_by_writes() -> None:
    """Writes may go on while it waits, but not before it once both limits allow it."""

    async def scenario(rig: Rig) -> None:
        rig.send("first read", length=100)
        await rig.settle()
        rig.send("read", length=1)
        for _ in range(100):
            rig.send("write", direction=WRITE)
        await rig.finish()
        time = {label: time for time, label in rig.begun if label != "write"}["read"]
        writes = [time for time, label in rig.begun if label == "write"]
        assert time <= 10.2
        assert writes[0] < 1
        assert writes[-1] > time

    run(scenario, limited(iops_total=5, bps_read=10))


def test_a_newcomer_does_not_overtake() -> None:
    """Even if it comes when a request may begin, and the timer has not rung yet."""

    async def scenario(rig: Rig) -> None:
        rig.send("first")
        await rig.settle()
        rig.send("waiting")
        await rig.settle()
        rig.clock.pass_unnoticed(2.0)
        rig.send("newcomer", member=1)
        await rig.finish()
        assert rig.labels == ["first", "waiting", "newcomer"]

    run(scenario, limited(iops_total=1), members=2)


def test_who_gives_up_leaves_nothing_behind() -> None:
    async def scenario(rig: Rig) -> None:
        rig.send("first")
        await rig.settle()
        for task in [rig.send("waiting") for _ in range(3)]:
            await rig.settle()
            task.cancel()
        await rig.settle()
        assert not rig.clock.pending
        rig.send("next")
        await rig.advance(0.95)
        assert rig.labels == ["first", "next"]

    run(scenario, limited(iops_total=1))


def test_who_gives_up_when_the_turn_comes_does_not_keep_it_from_others() -> None:
    async def scenario(rig: Rig) -> None:
        rig.send("first")
        await rig.settle()
        waiting = rig.send("waiting")
        other = rig.send("other", member=1)
        await rig.settle()
        waiting.cancel()  # it has not been told when the timer rings
        await rig.advance(0.95)
        assert waiting.cancelled()
        assert other.done()
        assert not rig.clock.pending

    run(scenario, limited(iops_total=1), members=2)


def test_new_limits_hold_at_once() -> None:
    async def scenario(rig: Rig) -> None:
        for number in range(20):
            rig.send(number)
        await rig.settle()
        assert len(rig.begun) == 1
        rig.group.set_config(limited(iops_total=100))
        await rig.settle()
        assert len(rig.begun) == 12  # the tenth of a second that begins at once, and one
        rig.group.set_config(ThrottleConfig())
        await rig.settle()
        assert rig.labels == list(range(20))
        assert not rig.clock.pending

    run(scenario, limited(iops_total=1))


def test_a_drained_member_waits_for_nothing_and_what_it_does_counts() -> None:
    async def scenario(rig: Rig) -> None:
        for number in range(5):
            rig.send(number)
        other = rig.send("other", member=1)
        await rig.settle()
        rig.members[0].begin_drain()
        rig.send("more")
        await rig.settle()
        assert rig.labels == [0, 1, 2, 3, 4, "more"]
        rig.members[0].end_drain()
        rig.send("after")
        await rig.advance(5.8)
        assert not other.done()
        await rig.advance(0.2)
        assert other.done()
        await rig.finish()
        assert rig.labels[-1] == "after"

    run(scenario, limited(iops_total=1), members=2)


def test_a_group_knows_whether_it_has_members() -> None:
    async def scenario(rig: Rig) -> None:
        assert rig.group.is_used
        for member in rig.members:
            member.leave()
        assert not rig.group.is_used

    run(scenario, ThrottleConfig(), members=2)


def test_what_waits_when_a_member_leaves_begins_and_counts_for_nobody() -> None:
    async def scenario(rig: Rig) -> None:
        for number in range(50):
            rig.send(number)
        other = rig.send("other", member=1)
        await rig.settle()
        rig.tasks[20].cancel()
        rig.members[0].leave()
        await rig.settle()
        assert rig.labels == [0, *(number for number in range(1, 50) if number != 20)]
        await rig.advance(2)
        assert other.done()
        assert not rig.clock.pending

    run(scenario, limited(iops_total=1), members=2)


def test_a_group_tells_when_its_last_member_has_left() -> None:
    told: list[bool] = []
    group = ThrottleGroup(ThrottleConfig(), on_unused=lambda: told.append(group.is_used))
    members = [group.join() for _ in range(2)]
    members[0].leave()
    assert not told
    members[1].leave()
    assert told == [False]


@dataclass(frozen=True)
class Send:
    """A request comes."""

    member: int
    direction: Direction
    length: int


@dataclass(frozen=True)
class Pause:
    """Time passes."""

    seconds: float


@dataclass(frozen=True)
class GiveUp:
    """One of the requests is cancelled, wherever it is."""

    number: int


schedules = st.lists(
    st.builds(Send, st.integers(0, 2), st.sampled_from(Direction), st.integers(1, 300))
    | st.builds(Pause, st.floats(0.001, 2.0))
    | st.builds(GiveUp, st.integers(0, 20)),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(
    schedules,
    st.integers(50, 500),
    st.sampled_from([BPS, BucketName.BPS_READ, BucketName.BPS_WRITE]),
    st.integers(2, 20),
)
def test_any_schedule_keeps_to_the_limits_and_starves_nobody(
    schedule: list[Send | Pause | GiveUp], bps: int, name: BucketName, iops: int
) -> None:
    async def scenario(rig: Rig) -> None:
        for step in schedule:
            match step:
                case Send(member, direction, length):
                    rig.send(step, member=member, direction=direction, length=length)
                    await rig.settle()
                case Pause(seconds):
                    await rig.advance(seconds)
                case GiveUp(number):
                    if rig.tasks:
                        rig.tasks[number % len(rig.tasks)].cancel()
        await rig.finish()
        given_up = sum(task.cancelled() for task in rig.tasks)
        assert len(rig.begun) == len(rig.tasks) - given_up
        assert not rig.clock.pending

        begun = [(time, sent) for time, sent in rig.begun if isinstance(sent, Send)]
        assert_never_above([(time, 1) for time, _ in begun], iops)
        assert_never_above(
            [(time, sent.length) for time, sent in begun if name.concerns(sent.direction)], bps
        )

    config = ThrottleConfig({name: BucketConfig(bps), IOPS: BucketConfig(iops)})
    run(scenario, config, members=3)


def assert_never_above(begun: list[tuple[float, int]], rate: float) -> None:
    """In any time, no more begins than a tenth of a second's worth, the rate, and one request."""
    for first in range(len(begun)):
        total = 0
        for time, units in begun[first:]:
            assert total <= rate * (time - begun[first][0] + 0.1 + 1e-5)
            total += units
