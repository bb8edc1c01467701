# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The data map against a model, and its bounds of memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.nodes.data_map import MAX_BITS, MIN_GRANULE, DataMap

SIZE = 10 * MIN_GRANULE + 512

ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(
    lambda pair: (pair[0], min(pair[0] + pair[1], SIZE))
)


@given(st.lists(st.tuples(st.booleans(), ranges), max_size=20), ranges)
def test_it_never_claims_more_than_it_was_told(
    changes: list[tuple[bool, tuple[int, int]]], asked: tuple[int, int]
) -> None:
    data_map = DataMap(SIZE)
    is_data = bytearray(SIZE // 512)
    for is_added, (begin, end) in changes:
        begin, end = begin // 512 * 512, end // 512 * 512
        if begin == end:
            continue
        (data_map.add if is_added else data_map.remove)(begin, end)
        is_data[begin // 512 : end // 512] = bytes([is_added]) * ((end - begin) // 512)
    begin, end = asked
    if data_map.knows(begin, end - begin):
        assert all(is_data[begin // 512 : -(-end // 512)])


def test_it_knows_whole_granules_and_the_ragged_end() -> None:
    data_map = DataMap(SIZE)
    data_map.add(0, SIZE)
    assert data_map.knows(0, SIZE)
    data_map.remove(SIZE - 1, SIZE)
    assert not data_map.knows(SIZE - 512, 512)
    assert data_map.knows(0, 10 * MIN_GRANULE)


def test_it_takes_at_most_a_mebibyte() -> None:
    huge = DataMap(1 << 50)
    assert (1 << 50) // huge.granule <= MAX_BITS
    huge.add(0, 1 << 50)
    assert huge.knows(1 << 49, 1 << 20)
