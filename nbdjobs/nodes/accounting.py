# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The account of what the user of a device did (QAPI `BlockDeviceStats`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter

from nbdjobs.nodes.latency import Histogram


@dataclass(slots=True)
class Account:
    """What was done of one kind of request: how often, how much, how long, how often in vain.

    Attributes:
        last_end_s: When the last one ended, by `perf_counter`; 0 if there was none.
        histogram: How long they took, failed ones included, if somebody wants to know.
    """

    operations: int = 0
    length: int = 0
    total_time_s: float = 0.0
    failed: int = 0
    invalid: int = 0
    last_end_s: float = 0.0
    histogram: Histogram | None = None

    @property
    def total_time_ns(self) -> int:
        """The time in the unit of QAPI; seconds are kept, as adding up floats is cheaper."""
        return round(self.total_time_s * 1e9)

    def note_time(self, begun: float) -> None:
        """Take account of the time of a request that began at `begun` and ends now."""
        self.note_duration(perf_counter() - begun)

    def note_duration(self, duration_s: float) -> None:
        """Take account of the time of a request that ends now."""
        self.last_end_s = perf_counter()
        self.total_time_s += duration_s
        if self.histogram is not None:
            self.histogram.count(duration_s)


@dataclass(slots=True)
class Accounting:
    """A device's accounts (QAPI `BlockDeviceStats`)."""

    read: Account = field(default_factory=Account)
    write: Account = field(default_factory=Account)
    unmap: Account = field(default_factory=Account)
    flush: Account = field(default_factory=Account)
    highest_offset_written: int = 0

    @property
    def idle_time_ns(self) -> int | None:
        """Nanoseconds since the last request ended; None if there was none."""
        last_s = max(each.last_end_s for each in (self.read, self.write, self.unmap, self.flush))
        return round((perf_counter() - last_s) * 1e9) if last_s else None
