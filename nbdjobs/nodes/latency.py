# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Latency histograms: how many requests took how long.

      0      10      50     100        boundaries, in microseconds for example
      [ bin 0 | bin 1 | bin 2 | bin 3 ...

Nobody pays for a histogram that nobody has asked for; one that is kept costs a binary search per
request.

Source: QEMU qapi/block-core.json (BlockLatencyHistogramInfo), `block/accounting.c`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

_NS: int = 1_000_000_000


class Histogram:
    """Counts requests by the time they took.

    Attributes:
        boundaries: Where one bin ends and the next begins, in nanoseconds; strictly ascending,
            and the first is above 0.
        bins: Requests of each interval; one more than there are boundaries.
    """

    def __init__(self, boundaries: Sequence[int]):
        """Begin with empty bins; `ValueError` where the boundaries do not ascend from above 0."""
        if any(here <= before for before, here in zip([0, *boundaries], boundaries, strict=False)):
            raise ValueError("boundaries of a histogram have to ascend")
        self.boundaries = tuple(boundaries)
        self.bins = [0] * (len(boundaries) + 1)
        # Requests are timed in seconds: better to convert the boundaries once than each of them.
        self._boundaries_s = [boundary / _NS for boundary in boundaries]

    def count(self, duration_s: float) -> None:
        """Take account of one request."""
        self.bins[bisect_right(self._boundaries_s, duration_s)] += 1
