# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Latency histograms as servers keep them, and the percentiles that can be read from them. Pure.

A server counts requests per bin: below the first boundary, between two, and from the last one on.
The counts only grow, so what happened between two looks is their difference.

Source: QEMU qapi/block-core.json (BlockLatencyHistogramInfo).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

#: What `nbdjobs top` asks servers for, in nanoseconds: from 1 µs to 17 s, two bins per doubling,
#: so that a percentile is off by a few per cent where requests are spread evenly in a bin, and by
#: the width of the bin at most.
BOUNDARIES_NS: Final = tuple(round(1000 * 2 ** (step / 2)) for step in range(49))


@dataclass(frozen=True, slots=True)
class Histogram:
    """Requests by how long they took.

    Attributes:
        boundaries: Nanoseconds, growing.
        bins: Requests in each; one more than boundaries.
    """

    boundaries: tuple[int, ...]
    bins: tuple[int, ...]

    @classmethod
    def from_qmp(cls, info: Mapping[str, Any] | None) -> Histogram | None:
        """Read a QAPI `BlockLatencyHistogramInfo`; None is a server that keeps none."""
        if info is None:
            return None
        return cls(tuple(info["boundaries"]), tuple(info["bins"]))

    def since(self, earlier: Histogram | None) -> Histogram:
        """What was counted after an earlier look.

        Where the two cannot be compared, because the server kept no histogram then, or other
        boundaries, or counts began again from nothing, all of this one was counted since.
        """
        if earlier is None or earlier.boundaries != self.boundaries:
            return self
        bins = tuple(now - then for now, then in zip(self.bins, earlier.bins, strict=True))
        return self if min(bins) < 0 else Histogram(self.boundaries, bins)

    def percentile(self, share: float) -> float | None:
        """The time below which a share of the requests stayed, in nanoseconds.

        Args:
            share: 0 to 1; 0.5 for the median.

        Returns:
            None without any request. Beyond the last boundary nothing is known, so it is never
            more than that.
        """
        rank = share * sum(self.bins)
        if not rank:
            return None
        before = 0
        for (low, high), count in zip(pairwise((0, *self.boundaries)), self.bins, strict=False):
            if before + count >= rank:
                return low + (high - low) * (rank - before) / count
            before += count
        return float(self.boundaries[-1])
