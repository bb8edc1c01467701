# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Throttle groups: limits that several nodes share, fairly.

Each member has two lanes of waiting requests, one for reads and one for writes. When the buckets
let a request begin, the lane that has waited longest for its turn sends one, and goes to the end
of the line. So members get equal shares, counted in requests, however many each has waiting, and
no request starves. A lane that its own bucket keeps back stays where it is in the line and does
not keep back the others.

Source: QEMU `docs/throttle.txt` and the comments of `block/throttle-groups.c`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from nbdjobs.nodes.clock import Clock, LoopClock, Timer
from nbdjobs.nodes.leaky_bucket import Direction, Throttle, ThrottleConfig

_TICK_S: Final = 0.001
"""The least that a timer is set to: event loops measure milliseconds. Requests that become due
meanwhile go together, and as the buckets count them, the rate stays what it is."""


class _Lane:
    """Waiting requests of one member in one direction, oldest first, with their lengths."""

    def __init__(self, direction: Direction):
        self.direction = direction
        self.waiting: dict[asyncio.Future[None], int] = {}


class ThrottleGroup:
    """A group's limits, and who waits because of them.

    Args:
        config: Checked limits.
        clock: For tests.
        on_unused: Called each time the last member has left.

    Attributes:
        config: The limits in force.
    """

    def __init__(
        self,
        config: ThrottleConfig,
        clock: Clock | None = None,
        *,
        on_unused: Callable[[], object] | None = None,
    ):
        self.config = config
        self._on_unused = on_unused
        self._throttle = Throttle(config)
        self._clock = clock or LoopClock()
        self._members: set[Member] = set()
        self._line: dict[_Lane, None] = {}
        self._timer: Timer | None = None
        self._due = 0.0

    @property
    def is_used(self) -> bool:
        """Whether there are members."""
        return bool(self._members)

    def join(self) -> Member:
        """Become a member."""
        member = Member(self)
        self._members.add(member)
        return member

    def set_config(self, config: ThrottleConfig) -> None:
        """Change the limits; the new buckets are empty, and who waits is looked at again."""
        self.config = config
        self._throttle = Throttle(config)
        self._stop_timer()
        self._advance()

    # For members

    def enter(self, member: Member) -> None:
        """Take in a member that has left another group."""
        self._members.add(member)

    def leave(self, member: Member) -> None:
        """Stop being a member, with no request waiting."""
        self._members.discard(member)
        if not self._members and self._on_unused is not None:
            self._on_unused()

    def is_free(self, direction: Direction) -> bool:
        """Whether a request that comes now may begin; those that wait go first."""
        if self._line:
            self._advance()
        return not self._throttle.wait(direction, self._clock.now())

    def account(self, direction: Direction, length: int) -> None:
        """Count a request that begins."""
        self._throttle.account(direction, length, self._clock.now())

    def enqueue(self, lane: _Lane, request: asyncio.Future[None], length: int) -> None:
        """Let a request wait; the future is done when it has been counted and may begin."""
        lane.waiting[request] = length
        self._line.setdefault(lane)
        self._set_timer()

    def withdraw(self, lane: _Lane, request: asyncio.Future[None]) -> None:
        """Forget a request; nothing happens if it no longer waits."""
        lane.waiting.pop(request, None)
        if not lane.waiting:
            self._line.pop(lane, None)
        if not self._line:
            self._stop_timer()

    def send_all(self, lane: _Lane) -> None:
        """Let all that wait in a lane begin, whatever the limits say."""
        while lane in self._line:
            self._send(lane)

    def dismiss_all(self, lane: _Lane) -> None:
        """Let all that wait in a lane begin, and count none of it."""
        for request in lane.waiting:
            if not request.done():
                request.set_result(None)
        lane.waiting.clear()
        self._line.pop(lane, None)
        self._set_timer()

    # Turns

    def _advance(self) -> None:
        """Let begin what may begin now, and see to it that the rest is looked at in time."""
        now = self._clock.now()
        while lane := self._next_lane(now):
            self._send(lane)
        self._set_timer()

    def _next_lane(self, now: float) -> _Lane | None:
        free = {each for each in Direction if not self._throttle.wait(each, now)}
        return next((lane for lane in self._line if lane.direction in free), None)

    def _send(self, lane: _Lane) -> None:
        """Let the oldest request of a lane begin, and put the lane at the end of the line."""
        request = next(iter(lane.waiting))
        length = lane.waiting.pop(request)
        del self._line[lane]
        if lane.waiting:
            self._line[lane] = None
        # One that was cancelled and has not been told yet is only forgotten.
        if not request.done():
            self.account(lane.direction, length)
            request.set_result(None)

    # The timer

    def _set_timer(self) -> None:
        """Look again when the first of those that wait may begin."""
        if not self._line:
            self._stop_timer()
            return
        now = self._clock.now()
        directions = {lane.direction for lane in self._line}
        wait = max(min(self._throttle.wait(each, now) for each in directions), _TICK_S)
        if self._timer is None or now + wait < self._due:
            self._stop_timer()
            self._due = now + wait
            self._timer = self._clock.call_later(wait, self._on_timer)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        self._timer = None
        self._advance()


class Member:
    """One node's or device's part in a group; `ThrottleGroup.join` makes it.

    Attributes:
        group: The group.
    """

    def __init__(self, group: ThrottleGroup):
        self.group = group
        self._lanes = {direction: _Lane(direction) for direction in Direction}
        self._drains = 0

    def leave(self) -> None:
        """Stop being a member; what still waits begins, and is no burden to the others."""
        for lane in self._lanes.values():
            self.group.dismiss_all(lane)
        self.group.leave(self)

    def move(self, group: ThrottleGroup) -> None:
        """Become a member of another group instead, with no request waiting."""
        left, self.group = self.group, group
        group.enter(self)
        if left is not group:
            left.leave(self)

    def is_free(self, direction: Direction) -> bool:
        """Whether a request may begin without waiting; if it does, call `account`."""
        return self._drains > 0 or self.group.is_free(direction)

    def account(self, direction: Direction, length: int) -> None:
        """Count a request of `length` bytes that begins without waiting."""
        self.group.account(direction, length)

    async def wait_turn(self, direction: Direction, length: int) -> None:
        """Wait until a request of `length` bytes may begin, and count it.

        Cancelling leaves nothing behind; if the turn has just come, it has been used up.
        """
        lane = self._lanes[direction]
        request = asyncio.get_running_loop().create_future()
        self.group.enqueue(lane, request, length)
        try:
            await request
        finally:
            self.group.withdraw(lane, request)

    def begin_drain(self) -> None:
        """Let what waits begin, and keep nothing waiting until as many `end_drain` have come.

        All of it counts, so the limits hold again afterwards.
        """
        self._drains += 1
        for lane in self._lanes.values():
            self.group.send_all(lane)

    def end_drain(self) -> None:
        """Take back one `begin_drain`."""
        self._drains -= 1
