# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""L2 entries: runs are what the specification says of each unit by itself."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.nodes.qcow2.constants import COMPRESSED, COPIED, ZERO
from nbdjobs.nodes.qcow2.errors import CorruptionError
from nbdjobs.nodes.qcow2.geometry import Geometry
from nbdjobs.nodes.qcow2.mapping import ALL_ALLOCATED, Kind, Run, first_run, unit_mask

STANDARD = Geometry(version=3, cluster_bits=16)
EXTENDED = Geometry(version=3, cluster_bits=16, is_extended=True)
CLUSTER = 65536

entries = st.sampled_from(
    [
        0,
        ZERO,
        COPIED | CLUSTER,
        COPIED | 2 * CLUSTER,
        COPIED | 3 * CLUSTER,
        CLUSTER,
        2 * CLUSTER,
        COPIED | CLUSTER | ZERO,
        COPIED | 2 * CLUSTER | ZERO,
        COMPRESSED | 12345,
        COPIED | CLUSTER + 512,
    ]
)
bitmaps = st.sampled_from(
    [0, ALL_ALLOCATED, ALL_ALLOCATED << 32, 0xF, 0xF0 << 32 | 0xF, 1 << 31, 1 << 63, 1 << 32 | 1]
)


def alone(geometry: Geometry, words: array[int], unit: int) -> Run | None:
    """What one unit is by itself; None if it cannot be."""
    index, within = divmod(unit, geometry.subclusters)
    try:
        return first_run(geometry, words, index, within, 1)
    except CorruptionError:
        return None


@given(
    st.sampled_from([STANDARD, EXTENDED]),
    st.lists(st.tuples(entries, bitmaps), min_size=1, max_size=6),
    st.data(),
)
def test_a_run_is_as_long_as_its_units_follow_each_other(
    geometry: Geometry, table: list[tuple[int, int]], data: st.DataObject
) -> None:
    words = array("Q", [w for pair in table for w in pair[: geometry.stride]])
    units = len(table) * geometry.subclusters
    start = data.draw(st.integers(0, units - 1))
    index, within = divmod(start, geometry.subclusters)
    try:
        run = first_run(geometry, words, index, within, units - start)
    except CorruptionError:
        assert alone(geometry, words, start) is None
        return
    has_place = run.kind in (Kind.DATA, Kind.RESERVED, Kind.ZERO_RESERVED)
    step = geometry.subcluster_size if has_place else 0

    def nth(n: int) -> Run:
        return run._replace(units=1, host=run.host + n * step)

    assert 1 <= run.units <= units - start
    assert all(alone(geometry, words, start + n) == nth(n) for n in range(run.units))
    end = start + run.units
    ends_cluster = run.kind is Kind.COMPRESSED and end % geometry.subclusters == 0
    assert end == units or ends_cluster or alone(geometry, words, end) != nth(run.units)


@pytest.mark.parametrize(
    ("words", "unit", "kind", "host"),
    [
        ([0, 0], 0, Kind.UNALLOCATED, 0),
        ([COPIED | CLUSTER, 1 << 5], 5, Kind.DATA, CLUSTER + 5 * 2048),
        ([COPIED | CLUSTER, 1 << 5], 4, Kind.RESERVED, CLUSTER + 4 * 2048),
        ([COPIED | CLUSTER, 1 << 37], 5, Kind.ZERO_RESERVED, CLUSTER + 5 * 2048),
        ([0, 1 << 37], 5, Kind.ZERO, 0),
        ([COMPRESSED | 99, 0], 5, Kind.COMPRESSED, COMPRESSED | 99),
    ],
)
def test_subclusters_have_their_own_bits(
    words: list[int], unit: int, kind: Kind, host: int
) -> None:
    run = first_run(EXTENDED, array("Q", words), 0, unit, 1)
    assert (run.kind, run.host) == (kind, host)


@pytest.mark.parametrize(
    ("geometry", "words", "message"),
    [
        (STANDARD, [COPIED | 512], "Cluster allocation offset 0x200 unaligned"),
        (STANDARD, [COPIED | 512 | ZERO], "Preallocated zero cluster offset 0x200 unaligned"),
        (Geometry(version=2, cluster_bits=16), [ZERO], "Zero cluster entry found in pre-v3 image"),
        (
            Geometry(version=3, cluster_bits=16, has_data_file=True),
            [COMPRESSED | 5],
            "Compressed cluster entry found in image with external data file",
        ),
        (EXTENDED, [COPIED | CLUSTER, 1 << 32 | 1], "Invalid cluster entry found"),
        (EXTENDED, [0, 1], "Invalid cluster entry found"),
    ],
)
def test_what_cannot_be_is_corrupt(geometry: Geometry, words: list[int], message: str) -> None:
    with pytest.raises(CorruptionError, match=message):
        first_run(geometry, array("Q", words), 0, 0, 1)


def test_with_a_data_file_cluster_zero_is_at_offset_zero() -> None:
    geometry = Geometry(version=3, cluster_bits=16, has_data_file=True)
    assert first_run(geometry, array("Q", [COPIED]), 0, 0, 1) == Run(Kind.DATA, 1, 0, True)


@given(st.integers(9, 21), st.data())
def test_compressed_entries_tell_where_and_how_much(bits: int, data: st.DataObject) -> None:
    geometry = Geometry(version=3, cluster_bits=bits)
    offset = data.draw(st.integers(0, (1 << min(geometry.size_shift, 56)) - 1))
    length = data.draw(st.integers(1, geometry.cluster_size - 1))
    entry = geometry.pack_compressed(offset, length)
    found, room = geometry.unpack_compressed(entry)
    assert entry >> 62 == 1
    assert found == offset
    assert length <= room < length + 512
    assert (found + room) % 512 == 0


def test_masks_name_a_run_of_subclusters() -> None:
    assert unit_mask(3, 2) == 0b11000


@pytest.mark.parametrize("is_extended", [False, True])
@pytest.mark.parametrize("kind", [Kind.UNALLOCATED, Kind.ZERO, Kind.DATA])
@given(before=st.integers(0, 70), alike=st.integers(0, 200), cut=st.integers(1, 300))
def test_long_runs_end_where_the_next_entry_says_something_else(
    is_extended: bool, kind: Kind, before: int, alike: int, cut: int
) -> None:
    geometry = EXTENDED if is_extended else STANDARD
    size = geometry.cluster_size
    first = 5 * size | COPIED
    words = array("Q")
    for number in range(before + alike):
        if is_extended:
            entry = first + number * size if kind is Kind.DATA else 0
            bitmap = {Kind.DATA: ALL_ALLOCATED, Kind.ZERO: ALL_ALLOCATED << 32}.get(kind, 0)
            words.extend([entry, bitmap])
        else:
            entry = {Kind.DATA: first + number * size, Kind.ZERO: 1}.get(kind, 0)
            words.append(entry)
    words.extend([3 * size | COPIED, 1] if is_extended else [3 * size | COPIED])
    words.extend([0] * 200)
    units = geometry.subclusters
    index = min(before, before + alike - 1) if before + alike else 0
    run = first_run(geometry, words, index, 0, cut * units)
    expected = before + alike - index
    if not expected:  # nothing is before the odd entry
        return
    assert run.kind is kind
    assert run.units == min(expected, cut) * units
