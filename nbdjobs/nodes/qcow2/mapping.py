# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What L2 entries say: where the content of a piece of the disk is.

The smallest piece that is told apart is called a unit here: a subcluster where entries are
extended, else a cluster. Entries are arrays of 64-bit words, in the machine's order; an extended
entry has two: descriptor and bitmap.
"""

from __future__ import annotations

from array import array
from enum import Enum
from typing import Final, NamedTuple, TypeAlias

from nbdjobs.nodes.qcow2.constants import COMPRESSED, COPIED, OFFSET_MASK, SUBCLUSTERS, ZERO
from nbdjobs.nodes.qcow2.errors import CorruptionError, hexed
from nbdjobs.nodes.qcow2.geometry import Geometry

Words: TypeAlias = "array[int]"

ALL_ALLOCATED: Final = (1 << SUBCLUSTERS) - 1
"""Bitmap of a cluster all of whose subclusters are allocated."""

ALL_ZERO: Final = ALL_ALLOCATED << SUBCLUSTERS
"""Bitmap of a cluster all of whose subclusters read as zeroes."""

_GLANCE: Final = 64
"""Entries compared at a time."""


class Kind(Enum):
    """Where the content of a unit is."""

    UNALLOCATED = "unallocated"
    """In the backing file; zeroes where that has nothing."""

    RESERVED = "reserved"
    """As unallocated, but there is a host cluster for it (extended entries only)."""

    ZERO = "zero"
    """Nowhere: it reads as zeroes."""

    ZERO_RESERVED = "zero reserved"
    """Likewise, and there is a host cluster for it."""

    DATA = "data"
    """At the same place in its host cluster."""

    COMPRESSED = "compressed"
    """Somewhere in the image file, compressed with the rest of its cluster."""


class Run(NamedTuple):
    """Consecutive units of one kind.

    Attributes:
        kind: Where their content is.
        units: How many they are; of compressed ones, never more than a cluster.
        host: Of kinds that have a host cluster, where the first unit is in its file; the units
            follow each other there. Of compressed clusters, the entry. Otherwise 0.
        is_private: Whether the host clusters are this disk's alone: no snapshot has them.
    """

    kind: Kind
    units: int
    host: int
    is_private: bool


_WITH_HOST: Final = frozenset({Kind.RESERVED, Kind.ZERO_RESERVED, Kind.DATA})


def first_run(geometry: Geometry, words: Words, index: int, unit: int, most: int) -> Run:
    """Describe the first run.

    Args:
        geometry: Of the image.
        words: Part of an L2 table.
        index: Entry in it.
        unit: Unit in that cluster.
        most: Units to look at, at least 1; they may reach to the end of `words`.

    Raises:
        CorruptionError: The first entry cannot be true; `message` has no place yet.
    """
    kind, host, is_private, units = _in_cluster(geometry, words, index, unit)
    if kind is Kind.COMPRESSED:
        return Run(kind, min(units, most), host, False)
    step = geometry.subcluster_size if kind in _WITH_HOST else 0
    per_cluster = geometry.subclusters
    if units < most and unit + units == per_cluster:
        clusters = (most - units - 1) // per_cluster
        alike = _clusters_alike(geometry, words, index, step * per_cluster, clusters)
        index += alike
        units += alike * per_cluster
    while units < most and (unit + units) % per_cluster == 0:
        index += 1
        try:
            next_kind, next_host, next_private, more = _in_cluster(geometry, words, index, 0)
        except CorruptionError:
            break  # whoever comes there will hear of it
        expected = (kind, host + units * step, is_private)
        if (next_kind, next_host, next_private) != expected:
            break
        units += more
    return Run(kind, min(units, most), host, is_private)


def _clusters_alike(geometry: Geometry, words: Words, index: int, step: int, most: int) -> int:
    """Count the entries behind one that say the same of the clusters that follow, at a glance.

    Args:
        geometry: Of the image.
        words: Part of an L2 table.
        index: The entry that the others are compared with.
        step: Bytes from one host cluster to the next, or 0 without host clusters.
        most: Entries to look at; they are in `words`.

    Returns:
        At least so many: what differs in a bit that says nothing is left for a closer look.
    """
    width = 2 if geometry.is_extended else 1
    entry = words[index * width]
    pattern = words[index * width : (index + 1) * width]
    if geometry.is_extended and pattern[1] not in (0, ALL_ALLOCATED, ALL_ZERO):
        return 0
    found = 0
    while found < most:
        count = min(_GLANCE, most - found)
        expected = pattern * count
        if step:
            first = entry + (found + 1) * step
            expected[::width] = array("Q", range(first, first + count * step, step))
        start = (index + 1 + found) * width
        if words[start : start + count * width] != expected:
            break
        found += count
    return found


def _in_cluster(
    geometry: Geometry, words: Words, index: int, unit: int
) -> tuple[Kind, int, bool, int]:
    """Kind, host, privacy and number of units of one kind from `unit` on in one cluster."""
    if geometry.is_extended:
        return _extended(geometry, words[2 * index], words[2 * index + 1], unit)
    entry = words[index]
    host = entry & OFFSET_MASK
    is_private = bool(entry & COPIED)
    if entry & COMPRESSED:
        kind = _compressed(geometry)
        return kind, entry, False, 1
    if entry & ZERO:
        if geometry.version < 3:
            raise CorruptionError("Zero cluster entry found in pre-v3 image")
        has_host = host or (geometry.has_data_file and is_private)
        kind = Kind.ZERO_RESERVED if has_host else Kind.ZERO
    else:
        has_host = host or (geometry.has_data_file and is_private)
        kind = Kind.DATA if has_host else Kind.UNALLOCATED
    _check_aligned(geometry, host, kind)
    return kind, host, is_private and bool(has_host), 1


def _extended(
    geometry: Geometry, entry: int, bitmap: int, unit: int
) -> tuple[Kind, int, bool, int]:
    if entry & COMPRESSED:
        return _compressed(geometry), entry, False, geometry.subclusters - unit
    host = entry & OFFSET_MASK
    is_private = bool(entry & COPIED)
    has_host = bool(host or (geometry.has_data_file and is_private))
    allocated, zero = bitmap & ALL_ALLOCATED, bitmap >> SUBCLUSTERS
    if allocated & zero or (allocated and not has_host):
        raise CorruptionError("Invalid cluster entry found")
    if allocated >> unit & 1:
        kind, bits = Kind.DATA, allocated
    elif zero >> unit & 1:
        kind, bits = (Kind.ZERO_RESERVED if has_host else Kind.ZERO), zero
    else:
        kind = Kind.RESERVED if has_host else Kind.UNALLOCATED
        bits = ~(allocated | zero) & ALL_ALLOCATED
    _check_aligned(geometry, host, kind)
    units = _ones(bits >> unit)
    place = host + unit * geometry.subcluster_size if has_host else 0
    return kind, place, is_private and has_host, units


def _compressed(geometry: Geometry) -> Kind:
    if geometry.has_data_file:
        raise CorruptionError("Compressed cluster entry found in image with external data file")
    return Kind.COMPRESSED


def _check_aligned(geometry: Geometry, host: int, kind: Kind) -> None:
    if host % geometry.cluster_size:
        if kind in (Kind.ZERO, Kind.ZERO_RESERVED):
            raise CorruptionError(f"Preallocated zero cluster offset {hexed(host)} unaligned")
        raise CorruptionError(f"Cluster allocation offset {hexed(host)} unaligned")


def _ones(bits: int) -> int:
    """How many of the lowest bits are set without a gap."""
    return ((bits + 1) & ~bits).bit_length() - 1


def unit_mask(first: int, count: int) -> int:
    """Bits of a bitmap for `count` subclusters from `first` on."""
    return ((1 << count) - 1) << first
