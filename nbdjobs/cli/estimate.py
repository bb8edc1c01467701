# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""How long a job may still take, as a range. Pure: the time is an argument.

One number would pretend to know what nobody knows: rates of a live backup swing with the
clients. So recent progress is cut into slices, each slice has a rate, and the range is what is
left divided by the mean rate plus and minus the spread of the slices, never beyond the fastest
and the slowest slice seen. A steady job shows a narrow range, a jumpy one says so honestly.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

#: Seconds that one slice covers at least: shorter ones measure the server's own time slices
#: (rate limits act in steps of 100 ms) instead of the disk.
SLICE_S: Final = 0.5

#: Slices that count as recent.
SLICES: Final = 20


@dataclass(frozen=True, slots=True)
class Remaining:
    """A range of time.

    Attributes:
        low: Seconds at least, 0 or more.
        high: Seconds at most, not below `low`; None when a recent slice made no progress at all
            and so nothing bounds the end.
    """

    low: float
    high: float | None


class Estimator:
    """Learns from samples of a job's offset; answers with a rate and a range."""

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None
        self._latest: tuple[float, int] | None = None
        self._rates: deque[float] = deque(maxlen=SLICES)

    def add(self, now: float, offset: int) -> None:
        """Take one sample.

        Args:
            now: Seconds on any clock that never goes back.
            offset: Bytes done so far.
        """
        if self._start is None:
            self._start = self._latest = (now, offset)
            return
        self._latest = (now, offset)
        began, first = self._start
        if now - began < SLICE_S:
            return
        self._rates.append(max(0, offset - first) / (now - began))
        self._start = self._latest

    def rate(self) -> float | None:
        """Bytes per second lately; None before the first slice is full."""
        return math.fsum(self._rates) / len(self._rates) if self._rates else None

    def remaining(self, total: int) -> Remaining | None:
        """How long the rest may take.

        Args:
            total: Bytes to do in all.

        Returns:
            None when nothing is known: before the first slice is full, or while no slice of the
            window has made progress.
        """
        mean = self.rate()
        if self._latest is None or not mean:
            return None
        left = max(0, total - self._latest[1])
        variance = math.fsum((rate - mean) ** 2 for rate in self._rates) / len(self._rates)
        spread = math.sqrt(variance)
        fast = min(max(self._rates), mean + spread)
        slow = max(min(self._rates), mean - spread)
        return Remaining(left / fast, left / slow if slow > 0 else None)
