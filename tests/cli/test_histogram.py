# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Percentiles from the counts of a histogram."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.cli.histogram import BOUNDARIES_NS, Histogram


def test_a_server_without_histograms_is_none() -> None:
    assert Histogram.from_qmp(None) is None
    assert Histogram.from_qmp({"boundaries": [1, 2], "bins": [3, 4, 5]}) == Histogram(
        (1, 2), (3, 4, 5)
    )


@pytest.mark.parametrize(
    ("bins", "share", "expected"),
    [
        ((10, 0, 0), 0.5, 50.0),
        ((10, 0, 0), 1.0, 100.0),
        ((0, 10, 0), 0.5, 150.0),
        ((5, 5, 0), 0.5, 100.0),
        ((5, 5, 0), 0.9, 180.0),
        ((0, 0, 1), 0.5, 200.0),
        ((99, 0, 1), 0.999, 200.0),
        ((0, 0, 0), 0.5, None),
    ],
)
def test_percentiles_lie_in_their_bin_by_their_rank(
    bins: tuple[int, ...], share: float, expected: float | None
) -> None:
    assert Histogram((100, 200), bins).percentile(share) == expected


@given(
    latencies=st.lists(st.integers(0, BOUNDARIES_NS[-1] - 1), min_size=1),
    share=st.floats(0.01, 1.0),
)
def test_a_percentile_is_in_the_bin_of_the_request_it_speaks_of(
    latencies: list[int], share: float
) -> None:
    bins = [0] * (len(BOUNDARIES_NS) + 1)
    for latency in latencies:
        bins[sum(latency >= boundary for boundary in BOUNDARIES_NS)] += 1
    found = Histogram(BOUNDARIES_NS, tuple(bins)).percentile(share)
    ranked = sorted(latencies)
    true = ranked[max(0, -int(-share * len(ranked) // 1) - 1)]
    low, high = next(each for each in pairwise((0, *BOUNDARIES_NS)) if each[0] <= true < each[1])
    assert found is not None
    assert low <= found <= high


def test_the_boundaries_grow_and_are_what_a_server_accepts() -> None:
    assert all(low < high for low, high in pairwise(BOUNDARIES_NS))
    assert (BOUNDARIES_NS[0], BOUNDARIES_NS[-1]) == (1000, 1000 * 2**24)


def test_what_happened_between_two_looks_is_the_difference() -> None:
    earlier, later = Histogram((1, 2), (1, 5, 0)), Histogram((1, 2), (4, 5, 6))
    assert later.since(earlier) == Histogram((1, 2), (3, 0, 6))


@pytest.mark.parametrize(
    "earlier", [None, Histogram((1, 3), (0, 0, 0)), Histogram((1, 2), (9, 0, 0))]
)
def test_what_cannot_be_compared_was_begun_since(earlier: Histogram | None) -> None:
    later = Histogram((1, 2), (4, 5, 6))
    assert later.since(earlier) == later
