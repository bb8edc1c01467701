# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Leaky buckets: how long a request has to wait so that limits on bytes and requests hold.

    level ──┐  a request pours its units in when it begins;
    ┌───────┤  they leak out at `avg` units per second
    │ size  │
    ├───────┤  the next request may begin once the level is not above the size
    │▒▒▒▒▒▒▒│
    └───┬───┘  so in any time T at most size + avg * T units begin, and one request
        ▼

Without a burst rate the size is a tenth of a second's worth. With `max` it is `max` times
`burst_length`, and when bursts last longer than a second, a second level that leaks at `max`
keeps the burst itself to that rate. Time is an argument everywhere, in seconds.

Source: QEMU `docs/throttle.txt` and the behaviour of its storage daemon.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Final

from nbdjobs.errors import CommandError

MAX_VALUE: Final = 10**15
"""Largest rate that QEMU takes."""

_DEFAULT_BURST_S: Final = 0.1
"""Seconds of traffic that may begin at once; otherwise every other request would wait."""

_NEGLIGIBLE_S: Final = 1e-6
"""Shorter waits are none: rounding may leave them behind, and no timer can measure them."""


class Direction(Enum):
    """What a request does as far as limits are concerned."""

    READ = "read"
    WRITE = "write"


class BucketName(StrEnum):
    """What there are limits on, in the order in which QEMU checks them."""

    BPS_TOTAL = "bps-total"
    BPS_READ = "bps-read"
    BPS_WRITE = "bps-write"
    IOPS_TOTAL = "iops-total"
    IOPS_READ = "iops-read"
    IOPS_WRITE = "iops-write"

    @property
    def counts_bytes(self) -> bool:
        """Whether its units are bytes; otherwise they are requests."""
        return self.startswith("bps")

    def concerns(self, direction: Direction) -> bool:
        """Whether requests in that direction pour into it."""
        return self.endswith(("total", direction.value))


@dataclass(frozen=True, slots=True)
class BucketConfig:
    """One limit.

    Attributes:
        avg: Units per second in the long run; 0 means no limit.
        max: Units per second in a burst; 0 means that there are no bursts.
        burst_length: Seconds that a burst may last.
    """

    avg: int = 0
    max: int = 0
    burst_length: int = 1

    def check(self) -> None:
        """Raise `CommandError` in QEMU's words unless the numbers go together."""
        if not (0 <= self.avg <= MAX_VALUE and 0 <= self.max <= MAX_VALUE):
            raise CommandError(f"bps/iops/max values must be within [0, {MAX_VALUE}]")
        if not self.burst_length:
            raise CommandError("the burst length cannot be 0")
        if self.burst_length > 1 and not self.max:
            raise CommandError("burst length set without burst rate")
        if self.max and self.burst_length > MAX_VALUE // self.max:
            raise CommandError("burst length too high for this burst rate")
        if self.max and not self.avg:
            raise CommandError("bps_max/iops_max require corresponding bps/iops values")
        if self.max and self.max < self.avg:
            raise CommandError("bps_max/iops_max cannot be lower than bps/iops")


NO_LIMIT: Final = BucketConfig()


@dataclass(frozen=True, slots=True)
class ThrottleConfig:
    """All limits of a throttle group.

    Attributes:
        buckets: The limits; what is not in there is not limited.
        iops_size: Bytes that count as one request; longer requests count as several. 0 or less
            means that every request counts as one.
    """

    buckets: Mapping[BucketName, BucketConfig] = field(default_factory=dict)
    iops_size: int = 0

    def bucket(self, name: BucketName) -> BucketConfig:
        """One limit."""
        return self.buckets.get(name, NO_LIMIT)

    def check(self) -> None:
        """Raise `CommandError` in QEMU's words unless the limits go together."""
        for unit in ("bps", "iops"):
            total, *parts = (
                self.bucket(BucketName(f"{unit}-{kind}")) for kind in ("total", "read", "write")
            )
            is_rate_twice = total.avg and any(part.avg for part in parts)
            is_burst_twice = total.max and any(part.max for part in parts)
            if is_rate_twice or is_burst_twice:
                raise CommandError(
                    "bps/iops/max total values and read/write values cannot be used at the same"
                    " time"
                )
        if self.iops_size and not any(
            bucket.avg for name, bucket in self.buckets.items() if not name.counts_bytes
        ):
            raise CommandError("iops size requires an iops value to be set")
        for name in BucketName:
            self.bucket(name).check()


class LeakyBucket:
    """One limit and how much of it is used up.

    Args:
        config: A checked limit whose `avg` is not 0.
    """

    def __init__(self, config: BucketConfig):
        self._avg = config.avg
        self._max = config.max
        self._size = (
            config.max * config.burst_length if config.max else config.avg * _DEFAULT_BURST_S
        )
        self._has_burst_level = config.burst_length > 1
        self._burst_size = config.max * _DEFAULT_BURST_S
        self._level = self._burst_level = 0.0

    def leak(self, elapsed: float) -> None:
        """Let `elapsed` seconds pass."""
        self._level = max(self._level - self._avg * elapsed, 0.0)
        if self._has_burst_level:
            self._burst_level = max(self._burst_level - self._max * elapsed, 0.0)

    def wait(self) -> float:
        """Seconds until the next request may begin, however long it is."""
        wait = (self._level - self._size) / self._avg
        if self._has_burst_level:
            wait = max(wait, (self._burst_level - self._burst_size) / self._max)
        return wait if wait > _NEGLIGIBLE_S else 0.0

    def pour(self, units: float) -> None:
        """Count a request that begins."""
        self._level += units
        if self._has_burst_level:
            self._burst_level += units


class Throttle:
    """The buckets of a throttle group, empty at first.

    Args:
        config: Checked limits.
    """

    def __init__(self, config: ThrottleConfig):
        self._iops_size = config.iops_size
        buckets = {
            name: LeakyBucket(bucket) for name, bucket in config.buckets.items() if bucket.avg
        }
        self._buckets = tuple(buckets.values())
        self._bytes = {each: _concerned(buckets, each, True) for each in Direction}
        self._requests = {each: _concerned(buckets, each, False) for each in Direction}
        self._leaked_at = -math.inf

    def wait(self, direction: Direction, now: float) -> float:
        """Seconds until a request in that direction may begin; 0 if it may now."""
        self._leak(now)
        waits = (
            bucket.wait()
            for concerned in (self._bytes[direction], self._requests[direction])
            for bucket in concerned
        )
        return max(waits, default=0.0)

    def account(self, direction: Direction, length: int, now: float) -> None:
        """Count a request of `length` bytes that begins."""
        self._leak(now)
        for bucket in self._bytes[direction]:
            bucket.pour(length)
        for bucket in self._requests[direction]:
            bucket.pour(self._requests_in(length))

    def _requests_in(self, length: int) -> float:
        return length / self._iops_size if 0 < self._iops_size < length else 1.0

    def _leak(self, now: float) -> None:
        elapsed = now - self._leaked_at
        if elapsed <= 0:
            return
        self._leaked_at = now
        for bucket in self._buckets:
            bucket.leak(elapsed)


def _concerned(
    buckets: Mapping[BucketName, LeakyBucket], direction: Direction, counts_bytes: bool
) -> tuple[LeakyBucket, ...]:
    return tuple(
        bucket
        for name, bucket in buckets.items()
        if name.concerns(direction) and name.counts_bytes is counts_bytes
    )
