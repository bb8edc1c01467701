# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Where calls are made: at once in the event loop while they prove fast, else in a thread.

A call into the page cache takes microseconds, a hop to a thread and back takes fifty. So calls
start out inline. One slow call is not yet a slow disk: on a busy machine the process may just
have been set aside for a while. It only puts the node under watch, and what tells the two apart
is whether the call itself went to sleep:

    fast ──a slow call──▶ watched ──a slow call that slept──▶ threads
      ▲                      │  ▲                                │
      └── 64 calls in a row ─┘  └── after a pause, if a thread ──┘
                                    has come back meanwhile

A disk that hangs keeps its threads and is never tried inline again until one of them returns. A
disk that stays slow costs the loop one call per pause, and the pauses grow.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from enum import Enum
from time import perf_counter_ns
from typing import Final, TypeVar

T = TypeVar("T")

SLOW_NS: Final = 2_000_000
"""A call that takes longer is too slow for the event loop."""

TRIAL: Final = 64
"""Watched calls in a row, none of them slow, that end the watch."""

FIRST_PAUSE_NS: Final = 20_000_000
LONGEST_PAUSE_NS: Final = 2_560_000_000
"""How long calls go to threads before one is tried inline again; doubled each time in vain."""


class _State(Enum):
    FAST = "fast"
    WATCHED = "watched"
    THREADS = "threads"


def _sleeps() -> int:
    """How often this thread has given the processor up to wait for something."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


class Pace:
    """How fast one kind of call on one node is.

    Args:
        clock_ns: Time in nanoseconds.
        sleeps: Counts how often this thread had to wait.

    Attributes:
        is_fast: Make calls inline, and tell only of slow ones, through `strike`.
    """

    __slots__ = (
        "_clock_ns",
        "_has_returned",
        "_in_a_row",
        "_pause_ns",
        "_retry_at_ns",
        "_sleeps",
        "_state",
        "is_fast",
    )

    def __init__(
        self,
        clock_ns: Callable[[], int] = perf_counter_ns,
        sleeps: Callable[[], int] = _sleeps,
    ) -> None:
        self.is_fast = True
        self._clock_ns = clock_ns
        self._sleeps = sleeps
        self._state = _State.FAST
        self._in_a_row = 0
        self._has_returned = False
        self._pause_ns = FIRST_PAUSE_NS
        self._retry_at_ns = 0

    def strike(self) -> None:
        """Take note of a slow inline call that nobody watched."""
        self._watch()

    def may_run_inline(self) -> bool:
        """Whether the next call may be made in the event loop, under watch."""
        if self._state is not _State.THREADS:
            return True
        return self._has_returned and self._clock_ns() >= self._retry_at_ns

    def watch(self, call: Callable[[], T]) -> T:
        """Make a call inline and see how it does."""
        if self._state is _State.THREADS:
            self._watch()
        sleeps = self._sleeps()
        begun = self._clock_ns()
        try:
            return call()
        finally:
            is_slow = self._clock_ns() - begun > SLOW_NS
            self._judge(is_slow=is_slow and self._sleeps() > sleeps)

    def thread_returned(self) -> None:
        """Take note that a call made in a thread has come back: the disk does not hang."""
        self._has_returned = True

    def _watch(self) -> None:
        self.is_fast = False
        self._state = _State.WATCHED
        self._in_a_row = 0

    def _judge(self, *, is_slow: bool) -> None:
        now = self._clock_ns()
        if is_slow:
            # A pause is only longer than the one before if that one was in vain.
            was_quiet = now - self._retry_at_ns > LONGEST_PAUSE_NS
            self._pause_ns = (
                FIRST_PAUSE_NS if was_quiet else min(2 * self._pause_ns, LONGEST_PAUSE_NS)
            )
            self._retry_at_ns = now + self._pause_ns
            self._has_returned = False
            self.is_fast = False
            self._state = _State.THREADS
            return
        self._in_a_row += 1
        if self._state is _State.WATCHED and self._in_a_row >= TRIAL:
            self._state = _State.FAST
            self.is_fast = True
