# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Sizes and shifts that follow from an image's header, worked out once."""

from __future__ import annotations

from dataclasses import dataclass, field

from nbdjobs.nodes.qcow2.constants import (
    COMPRESSED,
    COPIED,
    ENTRY_SIZE,
    OFFSET_MASK,
    SECTOR,
    SUBCLUSTERS,
)
from nbdjobs.nodes.rounding import round_up


@dataclass(frozen=True)
class Geometry:
    """How an image is laid out.

    Attributes:
        version: 2 or 3.
        cluster_bits: Size of a cluster, as a power of two.
        refcount_order: Width of a refcount in bits, as a power of two.
        is_extended: L2 entries tell subclusters apart.
        has_data_file: Guest clusters are in another file.
        cluster_size: Bytes of a cluster.
        subclusters: Parts of a cluster that are told apart, 1 or 32.
        subcluster_bits: Size of one, as a power of two.
        subcluster_size: Bytes of one.
        stride: 64-bit words of an L2 entry.
        l2_entries: Entries of an L2 table.
        l2_bits: The same as a power of two.
        l1_shift: Guest offsets shifted by it are indexes into the L1 table.
        refcounts_per_block: Clusters that one refcount block counts.
        max_refcount: Most users that a cluster can have.
        host_mask: Bits of an L2 entry that hold an aligned host offset.
        not_plain: Bits of an L2 entry that must be clear for a plain allocated cluster.
        size_shift: Where the length stands in the entry of a compressed cluster.
    """

    version: int
    cluster_bits: int
    refcount_order: int = 4
    is_extended: bool = False
    has_data_file: bool = False
    cluster_size: int = field(init=False)
    subclusters: int = field(init=False)
    subcluster_bits: int = field(init=False)
    subcluster_size: int = field(init=False)
    stride: int = field(init=False)
    l2_entries: int = field(init=False)
    l2_bits: int = field(init=False)
    l1_shift: int = field(init=False)
    refcounts_per_block: int = field(init=False)
    max_refcount: int = field(init=False)
    host_mask: int = field(init=False)
    not_plain: int = field(init=False)
    size_shift: int = field(init=False)

    def __post_init__(self) -> None:
        """Work out what follows."""
        stride = 2 if self.is_extended else 1
        subclusters = SUBCLUSTERS if self.is_extended else 1
        cluster_size = 1 << self.cluster_bits
        l2_entries = cluster_size // (ENTRY_SIZE * stride)
        host_mask = OFFSET_MASK & ~(cluster_size - 1)
        derived = {
            "cluster_size": cluster_size,
            "subclusters": subclusters,
            "subcluster_bits": self.cluster_bits - (subclusters.bit_length() - 1),
            "subcluster_size": cluster_size // subclusters,
            "stride": stride,
            "l2_entries": l2_entries,
            "l2_bits": l2_entries.bit_length() - 1,
            "l1_shift": self.cluster_bits + l2_entries.bit_length() - 1,
            "refcounts_per_block": (cluster_size * 8) >> self.refcount_order,
            "max_refcount": (1 << (1 << self.refcount_order)) - 1,
            "host_mask": host_mask,
            "not_plain": ((1 << 64) - 1) & ~host_mask & ~COPIED,
            "size_shift": 62 - (self.cluster_bits - 8),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def clusters(self, length: int) -> int:
        """How many clusters hold that many bytes."""
        return (length + self.cluster_size - 1) >> self.cluster_bits

    def l1_entries(self, size: int) -> int:
        """How many entries the L1 table of a disk of `size` bytes needs."""
        return (size + (1 << self.l1_shift) - 1) >> self.l1_shift

    def pack_compressed(self, offset: int, length: int) -> int:
        """The L2 entry of a cluster whose compressed bytes are at `offset`.

        Args:
            offset: In the image file, anywhere; less than `1 << size_shift`.
            length: Bytes, at least 1 and less than a cluster.
        """
        last = (offset + length - 1) // SECTOR
        return COMPRESSED | (last - offset // SECTOR) << self.size_shift | offset

    def unpack_compressed(self, entry: int) -> tuple[int, int]:
        """Where compressed bytes are, and how many there are at most."""
        offset = entry & ((1 << self.size_shift) - 1)
        sectors = (entry & (COMPRESSED - 1)) >> self.size_shift
        return offset, round_up(offset + 1, SECTOR) + sectors * SECTOR - offset
