# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Which clusters hold metadata: data must never be written there, whatever a damaged table says.

Source: QEMU `block/qcow2.h` (QCOW2_OL_*) for the kinds, qapi/block-core.json
(Qcow2OverlapCheckFlags) for the options.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Final, NamedTuple

from nbdjobs.nodes.qcow2.errors import CorruptionError
from nbdjobs.nodes.qcow2.mapping import Words


class Metadata(StrEnum):
    """Kinds of metadata, as messages call them."""

    HEADER = "qcow2_header"
    ACTIVE_L1 = "active L1 table"
    ACTIVE_L2 = "active L2 table"
    REFCOUNT_TABLE = "refcount table"
    REFCOUNT_BLOCK = "refcount block"
    SNAPSHOT_TABLE = "snapshot table"
    INACTIVE_L1 = "inactive L1 table"
    BITMAP_DIRECTORY = "bitmap directory"


MOST_TABLES: Final = 256 * 1024
"""L2 tables or refcount blocks that are remembered; with clusters of 64 KiB, for 128 TiB of data.
The tables of images with more of them are not looked for: that would take more memory than the
caches."""


def tables_in(words: Words, cluster_bits: int, mask: int) -> set[int]:
    """The clusters that the entries of an L1 or refcount table point at, if not too many."""
    if len(words) - words.count(0) > MOST_TABLES:
        return set()
    return {(entry & mask) >> cluster_bits for entry in words if entry}


class _Area(NamedTuple):
    first: int
    end: int
    kind: Metadata


class MetadataMap:
    """The metadata of one image.

    Attributes:
        l2_tables: Host clusters of L2 tables in use.
        refcount_blocks: Host clusters of refcount blocks.
    """

    def __init__(self, cluster_bits: int, checked: Iterable[Metadata]):
        self.l2_tables: set[int] = set()
        self.refcount_blocks: set[int] = set()
        self._cluster_bits = cluster_bits
        self._checked = frozenset(checked)
        self._areas: dict[tuple[Metadata, int], _Area] = {}

    def set_area(self, kind: Metadata, offset: int, length: int, number: int = 0) -> None:
        """Take note where a structure of one piece is now, in bytes; a length of 0 is nowhere."""
        first = offset >> self._cluster_bits
        end = (offset + length + (1 << self._cluster_bits) - 1) >> self._cluster_bits
        if length:
            self._areas[kind, number] = _Area(first, end, kind)
        else:
            self._areas.pop((kind, number), None)

    def kind_at(self, cluster: int) -> Metadata | None:
        """What kind of metadata a host cluster holds, as far as that is checked."""
        kind = None
        if cluster in self.l2_tables:
            kind = Metadata.ACTIVE_L2
        elif cluster in self.refcount_blocks:
            kind = Metadata.REFCOUNT_BLOCK
        else:
            for area in self._areas.values():
                if area.first <= cluster < area.end:
                    kind = area.kind
        return kind if kind in self._checked else None

    def check(self, offset: int, length: int) -> None:
        """Refuse to write data to a range that holds metadata.

        Raises:
            CorruptionError: One of them does.
        """
        bits = self._cluster_bits
        for cluster in range(offset >> bits, ((offset + length - 1) >> bits) + 1):
            kind = self.kind_at(cluster)
            if kind is not None:
                raise CorruptionError(
                    f"Preventing invalid write on metadata (overlaps with {kind})",
                    offset=offset,
                    size=length,
                )
