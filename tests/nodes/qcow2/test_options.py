# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Options of the driver: shares of memory, and what is refused in the words that users know."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.errors import CommandError
from nbdjobs.nodes.qcow2.constants import COPIED
from nbdjobs.nodes.qcow2.geometry import Geometry
from nbdjobs.nodes.qcow2.options import (
    DEFAULT_L2_CACHE,
    OverlapCheckFlags,
    OverlapCheckMode,
    Qcow2Options,
    cache_sizes,
    check_cache_options,
)
from nbdjobs.nodes.qcow2.overlap import Metadata

GEOMETRY = Geometry(version=3, cluster_bits=16)
MIB = 1 << 20


def options(**given: Any) -> Qcow2Options:
    return Qcow2Options(driver="qcow2", file="f", **given)


def use(wanted: Qcow2Options) -> None:
    check_cache_options(wanted)
    cache_sizes(wanted, GEOMETRY, MIB)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"cache_size": MIB, "l2_cache_size": MIB, "refcount_cache_size": MIB},
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
        ),
        ({"cache_size": 1000, "l2_cache_size": MIB}, "l2-cache-size may not exceed cache-size"),
        (
            {"cache_size": MIB, "refcount_cache_size": 2 * MIB},
            "refcount-cache-size may not exceed cache-size",
        ),
        *(
            (
                {"l2_cache_entry_size": size},
                r"L2 cache entry size must be a power of two between 512 and the cluster size"
                r" \(65536\)",
            )
            for size in (100, 1000, 128 * 1024)
        ),
        *(
            (
                {name: -1},
                f"Parameter '{name.replace('_', '-')}' expects a non-negative number below",
            )
            for name in ("cache_size", "l2_cache_size", "refcount_cache_size")
        ),
        ({"cache_clean_interval": -1}, "Cache clean interval too big"),
        ({"cache_clean_interval": 1 << 40}, "Cache clean interval too big"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    given: dict[str, int], message: str
) -> None:
    with pytest.raises(CommandError, match=f"^{message}"):
        use(options(**given))


def test_by_default_a_cache_holds_all_of_a_small_disk_and_is_bounded_for_a_large_one() -> None:
    small = cache_sizes(options(), GEOMETRY, 1 << 30)
    assert small.slices * small.slice_size == (1 << 30) // 65536 * 8
    large = cache_sizes(options(), GEOMETRY, 1 << 44)
    assert large.slices * large.slice_size == DEFAULT_L2_CACHE


sizes = st.none() | st.integers(0, 1 << 30)


@given(sizes, sizes, sizes, st.integers(9, 21), st.integers(0, 1 << 44))
def test_caches_take_what_they_are_given(
    total: int | None, l2: int | None, refcounts: int | None, bits: int, disk: int
) -> None:
    geometry = Geometry(version=3, cluster_bits=bits)
    wanted = options(cache_size=total, l2_cache_size=l2, refcount_cache_size=refcounts)
    try:
        found = cache_sizes(wanted, geometry, disk)
    except CommandError:
        assert total is not None
        return
    # A few are always needed.
    l2_bytes = found.slices * found.slice_size if found.slices > 4 else 0
    refcount_bytes = (
        found.refcount_blocks * geometry.cluster_size if found.refcount_blocks > 4 else 0
    )
    if total is not None:
        assert l2_bytes + refcount_bytes <= total
    if l2 is not None:
        assert l2_bytes <= l2
    if refcounts is not None:
        assert refcount_bytes <= refcounts


@pytest.mark.parametrize(
    ("chosen", "checked"),
    [
        (None, set(Metadata)),
        (OverlapCheckMode.NONE, set()),
        (OverlapCheckMode.ALL, set(Metadata)),
        (
            OverlapCheckMode.CONSTANT,
            set(Metadata) - {Metadata.ACTIVE_L2, Metadata.REFCOUNT_BLOCK, Metadata.INACTIVE_L1},
        ),
        (
            OverlapCheckFlags(template=OverlapCheckMode.NONE, active_l2=True),
            {Metadata.ACTIVE_L2},
        ),
        (OverlapCheckFlags(main_header=False), set(Metadata) - {Metadata.HEADER}),
    ],
)
def test_overlap_checks_are_chosen_by_template_and_flag(
    chosen: OverlapCheckMode | OverlapCheckFlags | None, checked: set[Metadata]
) -> None:
    assert options(overlap_check=chosen).checked_metadata == checked


def test_geometry_follows_from_the_cluster_size() -> None:
    assert (GEOMETRY.l2_entries, GEOMETRY.l1_shift) == (8192, 29)
    assert GEOMETRY.l1_entries((1 << 29) + 1) == 2
    assert GEOMETRY.not_plain & (COPIED | 65536) == 0
    extended = Geometry(version=3, cluster_bits=16, is_extended=True)
    assert (extended.l2_entries, extended.subcluster_size) == (4096, 2048)
