# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Leaky buckets: what they let begin in any time, and which limits go together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.errors import CommandError
from nbdjobs.nodes.leaky_bucket import (
    MAX_VALUE,
    BucketConfig,
    BucketName,
    Direction,
    Throttle,
    ThrottleConfig,
)

READ, WRITE = Direction.READ, Direction.WRITE
BPS, IOPS = BucketName.BPS_TOTAL, BucketName.IOPS_TOTAL
BPS_READ, IOPS_WRITE = BucketName.BPS_READ, BucketName.IOPS_WRITE

Begun = list[tuple[float, int]]

rates = st.integers(1, 10**9)
lengths = st.lists(st.integers(1, 10**7), min_size=1, max_size=40)
pauses = st.lists(st.just(0.0) | st.floats(0, 5), min_size=40, max_size=40)


def only(name: BucketName, *limit: int, iops_size: int = 0) -> ThrottleConfig:
    return ThrottleConfig({name: BucketConfig(*limit)}, iops_size)


def begin_all(
    throttle: Throttle, requests: list[int], pauses: list[float], direction: Direction = READ
) -> Begun:
    """Begin each request as early as allowed, but not before a pause; what began when."""
    now = 1000.0
    begun = []
    for length, pause in zip(requests, pauses, strict=False):
        now += pause
        now += throttle.wait(direction, now)
        assert throttle.wait(direction, now) == 0
        throttle.account(direction, length, now)
        begun.append((now, length))
    return begun


def begin_until(throttle: Throttle, length: int, end: float) -> Begun:
    """Begin requests one after another up to a time, counted from 0."""
    now = 0.0
    begun = []
    while now + throttle.wait(READ, now) < end:
        now += throttle.wait(READ, now)
        throttle.account(READ, length, now)
        begun.append((now, length))
    return begun


def amount(begun: Begun, begin: float, end: float) -> int:
    return sum(length for time, length in begun if begin <= time < end)


def assert_never_above(begun: Begun, size: float, rate: float) -> None:
    """In any time, no more begins than the bucket holds and leaks, and one request."""
    for first in range(len(begun)):
        total = 0
        for time, length in begun[first:]:
            passed = time - begun[first][0]
            assert total <= size + rate * (passed + 2e-6) + 1e-6 * total
            total += length


@given(rates, lengths, pauses)
def test_the_rate_is_never_above_the_limit(
    rate: int, requests: list[int], pauses: list[float]
) -> None:
    begun = begin_all(Throttle(only(BPS, rate)), requests, pauses)
    assert_never_above(begun, rate / 10, rate)


@given(rates, st.integers(1, 10), st.integers(1, 20), lengths, pauses)
def test_bursts_are_never_above_their_rate_nor_longer_than_allowed(
    rate: int, factor: int, burst_length: int, requests: list[int], pauses: list[float]
) -> None:
    burst = rate * factor
    begun = begin_all(Throttle(only(BPS, rate, burst, burst_length)), requests, pauses)
    assert_never_above(begun, burst * burst_length, rate)
    if burst_length > 1:
        assert_never_above(begun, burst / 10, burst)


@given(rates, lengths)
def test_nobody_waits_longer_than_the_limit_demands(rate: int, requests: list[int]) -> None:
    """Whatever is short of the limit was not asked for: the last begins as soon as it may."""
    begun = begin_all(Throttle(only(BPS, rate)), requests, [0.0] * len(requests))
    passed = begun[-1][0] - begun[0][0]
    assert passed <= max(sum(requests[:-1]) - rate / 10, 0) / rate * (1 + 1e-6) + 1e-5


def test_in_the_long_run_the_rate_is_the_limit() -> None:
    begun = begin_until(Throttle(only(BPS, 1_000_000)), 4096, 100.0)
    assert amount(begun, 10, 100) == pytest.approx(90_000_000, rel=0.001)


def test_a_burst_goes_on_at_its_rate_for_its_length() -> None:
    begun = begin_until(Throttle(only(BPS, 1000, 10_000, 3)), 10, 60.0)
    assert amount(begun, 0, 1) == pytest.approx(10_000 + 1000, rel=0.05)
    assert amount(begun, 1, 3) == pytest.approx(20_000, rel=0.05)
    assert amount(begun, 10, 60) == pytest.approx(50_000, rel=0.05)


def test_a_burst_can_be_had_again_after_as_much_rest() -> None:
    throttle = Throttle(only(IOPS, 10, 100))
    for _ in range(100):
        throttle.account(READ, 1, 0.0)
    assert throttle.wait(READ, 0.0) == 0
    throttle.account(READ, 1, 0.0)
    assert throttle.wait(READ, 0.0) == pytest.approx(0.1)
    assert throttle.wait(READ, 0.1) == 0


def test_one_long_request_is_let_in_and_the_next_pays_for_it() -> None:
    throttle = Throttle(only(BPS, 1000))
    assert throttle.wait(READ, 5.0) == 0
    throttle.account(READ, 10_000, 5.0)
    assert throttle.wait(READ, 5.0) == pytest.approx(9.9)


def test_without_limits_nothing_waits() -> None:
    throttle = Throttle(ThrottleConfig())
    throttle.account(READ, 1 << 40, 0.0)
    assert throttle.wait(READ, 0.0) == throttle.wait(WRITE, 0.0) == 0


@pytest.mark.parametrize(
    ("name", "waiting"),
    [
        (BPS, {READ, WRITE}),
        (IOPS, {READ, WRITE}),
        (BPS_READ, {READ}),
        (BucketName.IOPS_READ, {READ}),
        (BucketName.BPS_WRITE, {WRITE}),
        (IOPS_WRITE, {WRITE}),
    ],
)
def test_a_limit_concerns_its_directions(name: BucketName, waiting: set[Direction]) -> None:
    throttle = Throttle(only(name, 1))
    for direction in Direction:
        throttle.account(direction, 1, 0.0)
    assert {each for each in Direction if throttle.wait(each, 0.0)} == waiting


def test_the_strictest_limit_counts() -> None:
    throttle = Throttle(ThrottleConfig({BPS: BucketConfig(1000), IOPS: BucketConfig(10)}))
    throttle.account(READ, 100, 0.0)
    assert throttle.wait(READ, 0.0) == 0
    throttle.account(READ, 1, 0.0)
    assert throttle.wait(READ, 0.0) == pytest.approx(0.1)  # a request too many; the bytes are few
    throttle.account(READ, 1000, 0.0)
    assert throttle.wait(READ, 0.0) == pytest.approx(1.001)


@pytest.mark.parametrize(
    ("iops_size", "length", "counted"),
    [(0, 1 << 20, 1), (4096, 512, 1), (4096, 4096, 1), (4096, 6144, 1.5), (-1, 1 << 20, 1)],
)
def test_long_requests_count_as_several(iops_size: int, length: int, counted: float) -> None:
    throttle = Throttle(only(IOPS, 1, iops_size=iops_size))
    throttle.account(READ, length, 0.0)
    assert throttle.wait(READ, 0.0) == pytest.approx(counted - 0.1)


TOGETHER = "bps/iops/max total values and read/write values cannot be used at the same time"
RANGE = f"bps/iops/max values must be within [0, {MAX_VALUE}]"


@pytest.mark.parametrize(
    ("config", "refusal"),
    [
        (ThrottleConfig(), None),
        (only(BPS, MAX_VALUE), None),
        (only(BPS, 5, 5), None),
        (only(BPS, 5, 6, 7), None),
        (only(IOPS, 5, iops_size=512), None),
        (ThrottleConfig({BPS: BucketConfig(1), IOPS_WRITE: BucketConfig(1)}), None),
        (ThrottleConfig({BPS: BucketConfig(1), BPS_READ: BucketConfig(1)}), TOGETHER),
        (ThrottleConfig({IOPS: BucketConfig(1), IOPS_WRITE: BucketConfig(1)}), TOGETHER),
        (ThrottleConfig({IOPS: BucketConfig(0, 1), IOPS_WRITE: BucketConfig(0, 1)}), TOGETHER),
        (only(BPS, 5, iops_size=512), "iops size requires an iops value to be set"),
        (only(BPS, MAX_VALUE + 1), RANGE),
        (only(BPS, -1), RANGE),
        (only(BPS, 1, MAX_VALUE + 1), RANGE),
        (only(BPS, 5, 6, 0), "the burst length cannot be 0"),
        (only(BPS, 5, 0, 2), "burst length set without burst rate"),
        (only(BPS, 5, MAX_VALUE, 2), "burst length too high for this burst rate"),
        (only(BPS, 0, 5), "bps_max/iops_max require corresponding bps/iops values"),
        (only(BPS, 5, 4), "bps_max/iops_max cannot be lower than bps/iops"),
    ],
)
def test_limits_that_do_not_go_together_are_refused(
    config: ThrottleConfig, refusal: str | None
) -> None:
    if refusal is None:
        config.check()
        return
    with pytest.raises(CommandError) as caught:
        config.check()
    assert caught.value.description == refusal
