# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The remaining time: a range that is honest about how rates swing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.cli.estimate import SLICE_S, SLICES, Estimator, Remaining

TOTAL = 1 << 30
RATES = st.lists(st.integers(0, 1 << 24), min_size=1, max_size=3 * SLICES)
POSITIVE_RATES = st.lists(st.integers(1, 1 << 24), min_size=1, max_size=3 * SLICES)


def fed(rates: list[int]) -> Estimator:
    """An estimator that saw each rate for one second, in bytes per second."""
    estimator = Estimator()
    offset = 0
    estimator.add(0.0, offset)
    for second, rate in enumerate(rates, 1):
        offset += rate
        estimator.add(float(second), offset)
    return estimator


def test_nothing_is_known_at_first() -> None:
    estimator = Estimator()
    assert estimator.rate() is None
    assert estimator.remaining(TOTAL) is None
    estimator.add(5.0, 0)
    estimator.add(5.0 + SLICE_S / 2, 1000)
    assert estimator.rate() is None
    assert estimator.remaining(TOTAL) is None


def test_a_steady_job_has_a_narrow_range() -> None:
    remaining = fed([100] * 5).remaining(1500)
    assert remaining == Remaining(10.0, 10.0)


def test_a_jumpy_job_has_a_wide_range() -> None:
    remaining = fed([50, 150, 50, 150]).remaining(1900)
    assert remaining == Remaining(10.0, 30.0)


def test_a_pause_leaves_the_end_open() -> None:
    remaining = fed([100, 0, 100, 0]).remaining(1200)
    assert remaining == Remaining(10.0, None)


def test_a_stalled_job_has_no_estimate() -> None:
    estimator = fed([100] + [0] * SLICES)
    assert estimator.rate() == 0
    assert estimator.remaining(TOTAL) is None


def test_what_is_long_ago_does_not_count() -> None:
    assert fed([1] * SLICES + [100] * SLICES).rate() == 100


def test_steps_shorter_than_a_slice_do_not_widen_the_range() -> None:
    estimator = Estimator()
    for twentieth in range(101):
        estimator.add(twentieth / 20, twentieth // 2 * 10)  # ten bytes at once, ten times a second
    remaining = estimator.remaining(1000)
    assert remaining is not None
    assert remaining.low == pytest.approx(5, rel=0.1)
    assert remaining.high == pytest.approx(5, rel=0.1)


@given(RATES)
def test_the_range_is_ordered_and_never_negative(rates: list[int]) -> None:
    remaining = fed(rates).remaining(TOTAL)
    if remaining is not None:
        assert remaining.low >= 0
        assert remaining.high is None or remaining.high >= remaining.low


@given(POSITIVE_RATES)
def test_the_range_is_between_the_fastest_and_the_slowest_recent_rate(rates: list[int]) -> None:
    recent = rates[-SLICES:]
    left = TOTAL * 4 - sum(rates)
    remaining = fed(rates).remaining(TOTAL * 4)
    assert remaining is not None
    assert remaining.high is not None
    assert remaining.low >= left / max(recent) * (1 - 1e-9)
    assert remaining.high <= left / min(recent) * (1 + 1e-9)


@given(POSITIVE_RATES)
def test_the_range_holds_the_mean(rates: list[int]) -> None:
    estimator = fed(rates)
    mean = estimator.rate()
    remaining = estimator.remaining(TOTAL * 4)
    assert mean is not None
    assert remaining is not None
    assert remaining.high is not None
    left = TOTAL * 4 - sum(rates)
    assert remaining.low * (1 - 1e-9) <= left / mean <= remaining.high * (1 + 1e-9)


@given(POSITIVE_RATES, st.integers(0, TOTAL), st.integers(0, TOTAL))
def test_more_to_do_never_takes_less_time(rates: list[int], first: int, second: int) -> None:
    estimator = fed(rates)
    less = estimator.remaining(min(first, second))
    more = estimator.remaining(max(first, second))
    assert less is not None
    assert more is not None
    assert less.low <= more.low


@given(POSITIVE_RATES)
def test_a_job_that_is_done_takes_no_time(rates: list[int]) -> None:
    assert fed(rates).remaining(sum(rates)) == Remaining(0.0, 0.0)
