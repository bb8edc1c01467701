# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Pacing: how long to wait before the next piece of work, so that the average is a given speed.

Time is cut into slices of 100 ms. What a slice may hold may be begun at any moment in it; a
piece larger than that is begun as well, and the slice lasts as much longer. So the speed is
exact over time, and what goes beyond it at any moment is one slice and one piece.

Source: QEMU `include/qemu/ratelimit.h` for the behaviour.
"""

from __future__ import annotations

from typing import Final

SLICE_S: Final = 0.1
"""Seconds of one slice."""


class RateLimit:
    """Paces one stream of work; times are seconds on any clock that does not go back.

    Attributes:
        speed: Bytes per second; 0 means no limit.
    """

    def __init__(self, speed: int = 0):
        self.speed = speed
        self._slice_begin = float("-inf")
        self._dispatched = 0

    @property
    def quota(self) -> int:
        """Bytes of one slice, at least 1; only of use when there is a limit."""
        return max(int(self.speed * SLICE_S), 1)

    def delay(self, now: float) -> float:
        """Seconds to wait until the next piece may begin; 0 if it may begin now."""
        if not self.speed or self._dispatched < self.quota:
            return 0.0
        return max(self._slice_end() - now, 0.0)

    def account(self, length: int, now: float) -> None:
        """Note that a piece of `length` bytes begins now."""
        if now >= self._slice_end():
            self._slice_begin, self._dispatched = now, 0
        self._dispatched += length

    def _slice_end(self) -> float:
        """When the slice is over: later if more was begun than it may hold."""
        if not self.speed:
            return self._slice_begin
        return self._slice_begin + max(SLICE_S, self._dispatched / self.speed)
