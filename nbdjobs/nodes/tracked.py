# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
r"""The overlap table: which requests of a node are in flight, and who waits for whom.

Every request says at its beginning which bytes it touches and whether it serialises, and waits
only for conflicting requests that began before it, so no cycle of waiters can form:

    earlier \ this       ordinary        serialising
    ordinary            passes          waits
    serialising         waits           waits          (where the two overlap)

    time ──▶
    A  [0, 8)  write        ██████
    B  [4, 6)  serialising        ░░████          waits for A
    C  [5, 9)  read                 ░░░░██        waits for B, not for A
    D  [9,12)  write          ████                touches nobody

Finding the overlaps must cost the same with one request in flight and with a thousand, so the
table is an index and not a list. A request is filed in the level whose granules are at least as
long as itself, hence under one or two granules. Who looks for overlaps visits, in each level in
use, the granules under its own range, or every entry where those are fewer.

Source: QEMU `block/io.c` (tracked requests) and `block/reqlist.c` for the behaviour.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from enum import StrEnum
from types import TracebackType
from typing import Final

from nbdjobs.nodes.rounding import round_down, round_up

LEVEL_SHIFTS: Final = (12, 16, 20, 26, 34, 63)
"""Granule sizes of the levels, as powers of two; disks end at 2**63 bytes."""


_LEVEL_OF_BITS: Final = tuple(
    next(level for level, shift in enumerate(LEVEL_SHIFTS) if bits <= shift) for bits in range(64)
)


class Kind(StrEnum):
    """What a tracked request does."""

    READ = "read"
    WRITE = "write"
    DISCARD = "discard"
    TRUNCATE = "truncate"
    COPY = "copy"


class TrackedRequest:
    """One request in flight; an async context manager that waits on entry and ends on exit.

    Attributes:
        offset: First byte it touches, rounded down if it asked for alignment.
        end: First byte behind it, rounded up likewise.
        kind: What it does.
        is_serialising: Whether overlapping requests wait for it, and it for them.

    Cancelling the wait on entry leaves no trace in the table.
    """

    __slots__ = (
        "_blockers",
        "_level",
        "_table",
        "_waiters",
        "_wakeup",
        "end",
        "is_serialising",
        "kind",
        "offset",
    )

    def __init__(
        self, table: TrackedRequests, offset: int, end: int, kind: Kind, is_serialising: bool
    ):
        self.offset = offset
        self.end = end
        self.kind = kind
        self.is_serialising = is_serialising
        self._table = table
        self._level = 0
        self._blockers = 0
        self._waiters: list[TrackedRequest] = []
        self._wakeup: asyncio.Future[None] | None = None

    async def __aenter__(self) -> TrackedRequest:
        if self._table.begin(self):
            return self
        try:
            await self.unblocked()
        except BaseException:
            self._table.give_up(self)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._table.end(self)

    def overlaps(self, offset: int, end: int) -> bool:
        """Whether the request touches `[offset, end)`."""
        return self.offset < end and offset < self.end

    async def unblocked(self) -> None:
        """Wait until every earlier conflicting request has ended."""
        if self._blockers:
            self._wakeup = asyncio.get_running_loop().create_future()
            await self._wakeup

    def blocked_by(self, earlier: TrackedRequest) -> None:
        """Note that `earlier` has to end first."""
        earlier._waiters.append(self)
        self._blockers += 1

    def not_blocked_by(self, earlier: TrackedRequest) -> None:
        """Forget about waiting for `earlier`."""
        if self in earlier._waiters:
            earlier._waiters.remove(self)

    def release_waiters(self) -> None:
        """Count this request off at everyone who waits for it."""
        for waiter in self._waiters:
            waiter._blockers -= 1
            wakeup = waiter._wakeup
            if not waiter._blockers and wakeup is not None and not wakeup.done():
                wakeup.set_result(None)


class TrackedRequests:
    """The requests in flight on one node, in the order in which they began."""

    def __init__(self) -> None:
        self._levels: tuple[dict[int, dict[TrackedRequest, None]], ...] = tuple(
            {} for _ in LEVEL_SHIFTS
        )
        self._counts = [0] * len(LEVEL_SHIFTS)
        self._serialising = 0

    def __len__(self) -> int:
        """How many requests are in flight."""
        return sum(self._counts)

    def request(
        self, offset: int, length: int, kind: Kind, *, is_serialising: bool, alignment: int = 1
    ) -> TrackedRequest:
        """Prepare a request; `async with` begins it, waits for its turn and ends it.

        Args:
            offset: First byte it touches.
            length: Bytes it touches, at least 1.
            kind: What it does.
            is_serialising: Whether overlapping requests have to wait for it.
            alignment: Widen the range to multiples of this many bytes.
        """
        begin = round_down(offset, alignment)
        end = round_up(offset + length, alignment)
        return TrackedRequest(self, begin, end, kind, is_serialising)

    def overlapping(self, offset: int, end: int) -> Iterator[TrackedRequest]:
        """Every request in flight that touches `[offset, end)`, each once."""
        for level, shift in enumerate(LEVEL_SHIFTS):
            if self._counts[level]:
                yield from self._overlapping_in(self._levels[level], shift, offset, end)

    @staticmethod
    def _overlapping_in(
        index: dict[int, dict[TrackedRequest, None]], shift: int, offset: int, end: int
    ) -> Iterator[TrackedRequest]:
        first, last = offset >> shift, (end - 1) >> shift
        granules = range(first, last + 1) if last - first < len(index) else index
        for granule in granules:
            for request in index.get(granule, ()):
                # A request is filed under its first and its last granule: count it at the
                # first of them that lies in the range searched.
                if granule == max(first, request.offset >> shift) and request.overlaps(offset, end):
                    yield request

    def begin(self, request: TrackedRequest) -> bool:
        """Enter a request; returns whether it may go on at once."""
        if self._serialising or request.is_serialising:
            for earlier in self.overlapping(request.offset, request.end):
                if earlier.is_serialising or request.is_serialising:
                    request.blocked_by(earlier)
        self._enter(request)
        return not request._blockers

    def _enter(self, request: TrackedRequest) -> None:
        length = request.end - request.offset
        level = _LEVEL_OF_BITS[(length - 1).bit_length()]
        request._level = level
        self._counts[level] += 1
        self._serialising += request.is_serialising
        for granule in self._granules(request):
            self._levels[level].setdefault(granule, {})[request] = None

    def end(self, request: TrackedRequest) -> None:
        """Take a request out and let those go on who waited for it."""
        index = self._levels[request._level]
        self._counts[request._level] -= 1
        self._serialising -= request.is_serialising
        for granule in self._granules(request):
            entries = index[granule]
            del entries[request]
            if not entries:
                del index[granule]
        request.release_waiters()

    def give_up(self, request: TrackedRequest) -> None:
        """Take out a request that does not want to wait any longer."""
        for earlier in self.overlapping(request.offset, request.end):
            request.not_blocked_by(earlier)
        self.end(request)

    @staticmethod
    def _granules(request: TrackedRequest) -> tuple[int, ...]:
        shift = LEVEL_SHIFTS[request._level]
        first, last = request.offset >> shift, (request.end - 1) >> shift
        return (first,) if first == last else (first, last)
