# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.jobs.ratelimit import SLICE_S, RateLimit

lengths = st.lists(st.integers(1, 1_000_000), min_size=1, max_size=60)
speeds = st.integers(1, 10_000_000)


def begin_all(limit: RateLimit, pieces: list[int], now: float = 0.0) -> list[float]:
    """Begin each piece as early as allowed; the times at which they began."""
    times = []
    for piece in pieces:
        now += limit.delay(now)
        assert limit.delay(now) == 0 or math.isclose(limit.delay(now), 0, abs_tol=1e-9)
        limit.account(piece, now)
        times.append(now)
    return times


@given(lengths)
def test_without_a_limit_nothing_waits(pieces: list[int]) -> None:
    assert set(begin_all(RateLimit(), pieces)) == {0.0}


@given(speeds, lengths)
def test_the_speed_is_never_exceeded_by_more_than_a_slice_and_a_piece(
    speed: int, pieces: list[int]
) -> None:
    limit = RateLimit(speed)
    times = begin_all(limit, pieces)
    for first in range(len(pieces)):
        for last in range(first, len(pieces)):
            allowed = speed * (times[last] - times[first] + 2 * SLICE_S) + 2 * max(pieces)
            assert sum(pieces[first : last + 1]) <= allowed + 1


@given(speeds, lengths)
def test_the_speed_is_reached(speed: int, pieces: list[int]) -> None:
    last = begin_all(RateLimit(speed), pieces)[-1]
    assert last <= sum(pieces) / speed + SLICE_S * len(pieces)
    # Pieces as large as a slice leave no slack at all.
    quota = RateLimit(speed).quota
    times = begin_all(RateLimit(speed), [quota] * len(pieces))
    assert times[-1] <= (len(pieces) - 1) * max(quota / speed, SLICE_S) * 1.0001


@given(speeds, st.integers(1, 1_000_000), st.integers(0, 10_000_000))
def test_a_new_speed_counts_at_once(speed: int, piece: int, other: int) -> None:
    limit = RateLimit(speed)
    limit.account(piece, 0.0)
    limit.speed = other
    fresh = RateLimit(other)
    fresh.account(piece, 0.0)
    assert limit.delay(0.05) == fresh.delay(0.05)


def test_a_slice_takes_its_quota_at_once_and_then_lets_wait_for_the_next() -> None:
    limit = RateLimit(1000)
    for _ in range(10):
        assert limit.delay(5.0) == 0
        limit.account(10, 5.0)
    assert math.isclose(limit.delay(5.0), 0.1)
    assert math.isclose(limit.delay(5.04), 0.06)
    assert limit.delay(5.1) == 0


def test_a_piece_larger_than_a_slice_is_begun_and_then_paid_for() -> None:
    limit = RateLimit(1000)
    limit.account(5000, 0.0)
    assert limit.delay(0.0) == 5.0
    assert limit.delay(2.0) == 3.0
