# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Break points of `blkdebug`: requests are held at an event until somebody lets them go on.

A break point is an event and a tag. The next request that comes to the event is held, and the
break point is used up. A request that meets several at once is held until each tag is resumed.
Requests held are in flight: whoever waits for the node to be idle waits for them.

Source: QEMU `block/blkdebug.c` and `docs/devel/blkdebug.rst` for the behaviour.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field

from nbdjobs.nodes.events import DebugEvent


@dataclass(frozen=True, slots=True)
class _BreakPoint:
    event: DebugEvent
    tag: str


@dataclass(slots=True, eq=False)
class _Held:
    """A request held at one break point."""

    tag: str
    resumed: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class BreakPoints:
    """The break points of one node, and the requests held at them."""

    def __init__(self) -> None:
        self._points: list[_BreakPoint] = []
        self._held: list[_Held] = []
        self._waiting: dict[asyncio.Future[bool], str] = {}
        self._is_over = False

    def add(self, event: DebugEvent, tag: str) -> None:
        """Hold the next request that comes to the event, under that tag."""
        if not self._is_over:
            self._points.insert(0, _BreakPoint(event, tag))

    def remove(self, tag: str) -> bool:
        """Forget break points, and let go what is held at them; whether any was there to forget.

        Nobody waits for a request under the tag any more, either.
        """
        before = len(self._points)
        self._points = [point for point in self._points if point.tag != tag]
        self._wake(has_arrived=False, tags={tag})
        while self.resume(tag):
            pass
        return len(self._points) < before

    def resume(self, tag: str) -> bool:
        """Let the request go on that was held last under a tag; whether there was one."""
        for held in self._held:
            if held.tag == tag:
                self._held.remove(held)
                held.resumed.set_result(None)
                return True
        return False

    def is_holding(self, tag: str) -> bool:
        """Whether a request is held under the tag now."""
        return any(held.tag == tag for held in self._held)

    async def reached(self, tag: str) -> bool:
        """Wait until a request is held under the tag; False if that will not be any more."""
        while not self.is_holding(tag):
            if self._is_over:
                return False
            arrival = asyncio.get_running_loop().create_future()
            self._waiting[arrival] = tag
            try:
                if not await arrival:
                    return False
            finally:
                del self._waiting[arrival]
        return True

    def _wake(self, *, has_arrived: bool, tags: Collection[str]) -> None:
        for arrival, tag in self._waiting.items():
            if tag in tags and not arrival.done():
                arrival.set_result(has_arrived)

    def end(self) -> None:
        """Let everything go on, and hold nothing any more."""
        self._is_over = True
        self._points.clear()
        self._wake(has_arrived=False, tags=set(self._waiting.values()))
        while self._held:
            self.resume(self._held[0].tag)

    def stops(self, event: DebugEvent) -> bool:
        """Whether a request that comes to the event now has to be held."""
        return any(point.event is event for point in self._points)

    async def hold(self, event: DebugEvent) -> None:
        """Hold a request that has come to the event, until it is resumed or cancelled."""
        met = [point for point in self._points if point.event is event]
        held = [_Held(point.tag) for point in met]
        for point, each in zip(met, held, strict=True):
            self._points.remove(point)
            self._held.insert(0, each)
        self._wake(has_arrived=True, tags={point.tag for point in met})
        try:
            for each in held:
                await each.resumed
        finally:
            self._held = [other for other in self._held if other not in held]
