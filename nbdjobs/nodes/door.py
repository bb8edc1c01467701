# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The door of a device: what keeps requests waiting before they begin.

    request ──▶ held? ──▶ limits? ──▶ in flight ──▶ node

A request is in flight from the moment it is let in; what waits, for whatever reason, is not, and
so nobody has to wait for it. A request that comes while the door is held waits, and `release` lets
all that wait in at once, whatever `hold` follows: so they keep their order, and none starves where
drained sections follow each other closely. Behind that, requests wait for their turn where there
are limits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nbdjobs.errors import NodeError
from nbdjobs.nodes.graph import Root
from nbdjobs.nodes.leaky_bucket import Direction
from nbdjobs.nodes.throttle_group import Member, ThrottleGroup


class Door(Root):
    """A root that can keep its requests waiting.

    Whoever derives from it counts requests in and out: with `_in_flight` where there are no
    obstacles, with `_enter` where there are, and with `_leave`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._in_flight = 0
        self._obstacles = 0
        """Holds, and one for limits: 0 where nothing can keep a request waiting."""

        self._holds = 0
        self._limits: Member | None = None
        self._is_stopped = False
        self._refusal = 0
        self._held_back: list[asyncio.Future[None]] = []
        self._awaiting_idle: list[Callable[[], None]] = []

    @property
    def in_flight(self) -> int:
        """Requests begun and not yet ended."""
        return self._in_flight

    def turn_away(self, error: int) -> None:
        """Fail the requests that wait to be let in, and all that come later, with an errno."""
        # It is held for good, so that requests need no check of their own for this.
        self.hold()
        self._refusal = self._refusal or error
        self._in_flight += _wake(self._held_back)
        self.limit_by(None)

    # Holding requests back

    def hold(self) -> None:
        """Keep new requests waiting until released."""
        self._holds += 1
        self._obstacles += 1

    def release(self) -> None:
        """Take back one `hold`; the last one lets the waiting requests in, in order."""
        self._holds -= 1
        self._obstacles -= 1
        if not self._holds:
            self._in_flight += _wake(self._held_back)

    def stop(self) -> None:
        """Hold requests back until `cont`; stopping twice is stopping once."""
        if not self._is_stopped:
            self._is_stopped = True
            self.hold()

    def cont(self) -> None:
        """Take back `stop`; nothing happens if it was not called."""
        if self._is_stopped:
            self._is_stopped = False
            self.release()

    async def idle(self) -> None:
        """Wait until no request is in flight."""
        while self._in_flight:
            await self._next_idle()

    def when_all_wait(self, callback: Callable[[], None]) -> None:
        """If requests are held back now, call when none is in flight: all that are there wait."""
        if self._in_flight and self._holds:
            self._awaiting_idle.append(callback)
        elif self._holds:
            callback()

    async def _next_idle(self) -> None:
        waiter = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        self._awaiting_idle.append(wake)
        try:
            await waiter
        except BaseException:
            if wake in self._awaiting_idle:
                self._awaiting_idle.remove(wake)
            raise

    # Limits

    @property
    def limiting_group(self) -> ThrottleGroup | None:
        """Whose limits requests keep to."""
        return self._limits.group if self._limits is not None else None

    def limit_by(self, group: ThrottleGroup | None) -> None:
        """Keep requests to the limits of a group, or to none; who waits for others begins."""
        before = self._limits
        self._limits = group.join() if group is not None else None
        self._obstacles += (self._limits is not None) - (before is not None)
        if before is not None:
            before.leave()

    # The door

    async def _enter(self, direction: Direction | None, length: int) -> None:
        """Wait until a request may begin, and count it as in flight.

        Args:
            direction: Which limits it is counted for; None for what is free.
            length: Its bytes.
        """
        await self._wait_while_held()
        limits = self._limits
        if limits is None or direction is None:
            return
        if limits.is_free(direction):
            limits.account(direction, length)
            return
        self._leave()
        await limits.wait_turn(direction, length)
        await self._wait_while_held()

    async def _wait_while_held(self) -> None:
        """Wait while held; whoever is woken here has been counted as in flight."""
        if self._refusal:
            raise NodeError(self._refusal)
        if not self._holds:
            self._in_flight += 1
            return
        await _wait_in(self._held_back, if_cancelled_late=self._leave)
        if self._refusal:
            self._leave()
            raise NodeError(self._refusal)

    def _leave(self) -> None:
        self._in_flight -= 1
        if self._awaiting_idle and not self._in_flight:
            self._tell_idle()

    def _tell_idle(self) -> None:
        waiting, self._awaiting_idle = self._awaiting_idle, []
        for wake in waiting:
            wake()


async def _wait_in(
    queue: list[asyncio.Future[None]], if_cancelled_late: Callable[[], None]
) -> None:
    """Wait until woken through `queue`; cancelling leaves nothing in it.

    Args:
        queue: Where `_wake` finds the waiters.
        if_cancelled_late: Called when the wait is cancelled after `_wake` has ended it.
    """
    future = asyncio.get_running_loop().create_future()
    queue.append(future)
    try:
        await future
    except BaseException:
        if future in queue:
            queue.remove(future)
        elif not future.cancelled():
            if_cancelled_late()
        raise


def _wake(queue: list[asyncio.Future[None]]) -> int:
    """End the wait of everyone in the queue; returns how many that were."""
    waiting = [future for future in queue if not future.done()]
    queue.clear()
    for future in waiting:
        future.set_result(None)
    return len(waiting)
