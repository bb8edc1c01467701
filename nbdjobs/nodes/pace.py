# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Where calls are made: at once in the event loop while they prove fast, else in a thread.

A call into the page cache takes microseconds, a hop to a thread and back takes fifty. So calls
start out inline, and the first slow one sends those that follow to threads, until enough of
them in a row were fast again. One slow disk then costs everybody else one slow call.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns
from typing import Final, TypeVar

T = TypeVar("T")

SLOW_NS: Final = 2_000_000
"""A call that takes longer is too slow for the event loop."""

TRIAL: Final = 16
"""Fast calls in a row, made in threads, that bring the next one back into the event loop."""


class Pace:
    """How fast one kind of call on one node is.

    Attributes:
        is_fast: Make the next call inline.
    """

    __slots__ = ("_fast_in_a_row", "is_fast")

    def __init__(self) -> None:
        self.is_fast = True
        self._fast_in_a_row = 0

    def note(self, elapsed_ns: int) -> None:
        """Take note of how long a call took."""
        if elapsed_ns > SLOW_NS:
            self.is_fast = False
            self._fast_in_a_row = 0
        elif not self.is_fast:
            self._fast_in_a_row += 1
            self.is_fast = self._fast_in_a_row >= TRIAL

    def timed(self, call: Callable[[], T]) -> T:
        """Make a call and note how long it took."""
        begun = perf_counter_ns()
        try:
            return call()
        finally:
            self.note(perf_counter_ns() - begun)
