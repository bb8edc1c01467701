# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What a node is set up with: options common to all drivers, and limits of one request."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from nbdjobs.nodes.rounding import round_down

SECTOR: Final = 512
"""Sizes of nodes are multiples of this, as in QEMU: a shorter file reads as zeroes at its end."""

MAX_SIZE: Final = (1 << 63) - (1 << 30)
"""Largest size of a node, so that rounding up never overflows a file offset, as in QEMU."""


class DetectZeroes(StrEnum):
    """What becomes of writes of nothing but zeroes (QAPI `BlockdevDetectZeroesOptions`)."""

    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a driver's storage can take in one request; all in bytes, 0 means no limit.

    Attributes:
        request_alignment: Offsets and lengths must be multiples of this power of two.
        max_transfer: Longest read or write.
        opt_transfer: Length from which on reads and writes are efficient.
        min_io: Unit below which a write is read, changed and written back by the storage.
        max_pdiscard: Longest discard.
        pdiscard_alignment: Discards work in multiples of this; ragged ends are left alone.
        max_pwrite_zeroes: Longest write of zeroes.
        pwrite_zeroes_alignment: Zero writes work in multiples of this; ragged ends are written.
    """

    request_alignment: int = 1
    max_transfer: int = 0
    opt_transfer: int = 0
    min_io: int = 0
    max_pdiscard: int = 0
    pdiscard_alignment: int = 0
    max_pwrite_zeroes: int = 0
    pwrite_zeroes_alignment: int = 0

    def in_whole_units(self) -> Limits:
        """The same with maxima that are multiples of their alignment.

        A range that begins aligned and is cut at the maximum then has aligned pieces only.
        """
        unit = self.request_alignment
        return replace(
            self,
            max_transfer=_whole_units(self.max_transfer, unit),
            max_pdiscard=_whole_units(self.max_pdiscard, max(unit, self.pdiscard_alignment)),
            max_pwrite_zeroes=_whole_units(
                self.max_pwrite_zeroes, max(unit, self.pwrite_zeroes_alignment)
            ),
        )


def _whole_units(maximum: int, unit: int) -> int:
    """Round a maximum down, but keep it a maximum: 0 would mean that there is none."""
    return max(round_down(maximum, unit), unit) if maximum else 0


NO_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class CacheMode:
    """How a node treats caches (QAPI `BlockdevCacheInfo`)."""

    is_writeback: bool = True
    is_direct: bool = False
    is_no_flush: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """What every node has, whatever its driver (the common part of QAPI `BlockdevOptions`)."""

    is_read_only: bool = False
    is_auto_read_only: bool = False
    can_unmap: bool = False
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    cache: CacheMode = CacheMode()
    is_share_forced: bool = False
    is_active: bool = True
