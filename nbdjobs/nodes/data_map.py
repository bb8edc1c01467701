# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The data map: which parts of a file are known to be data, without a system call.

Only a hint: a granule whose bit is set has no hole as far as this process knows, so a reader
need not look for one. A hole that someone else punched meanwhile reads as zeroes all the same.
"""

from __future__ import annotations

from typing import Final

from bitarray import bitarray

from nbdjobs.nodes.rounding import round_down, round_up

MIN_GRANULE: Final = 64 * 1024
MAX_BITS: Final = 8 * 1024 * 1024
"""At most 1 MiB of memory; granules of larger disks are coarser."""


class DataMap:
    """One bit per granule of a disk of `size` bytes."""

    def __init__(self, size: int):
        self.granule = MIN_GRANULE
        while size > self.granule * MAX_BITS:
            self.granule *= 2
        self._size = size
        self._shift = self.granule.bit_length() - 1
        self._bits = bitarray(round_up(size, self.granule) >> self._shift)
        self._bits.setall(0)

    def grow(self, size: int) -> None:
        """Go on with a larger disk; when that takes coarser granules, all is forgotten."""
        if size > self.granule * MAX_BITS:
            self.__init__(2 * size)  # type: ignore[misc]  # it becomes a new one
            return
        more = (round_up(size, self.granule) >> self._shift) - len(self._bits)
        self._bits.extend([0] * max(more, 0))
        self._size = size

    def knows(self, offset: int, length: int) -> bool:
        """Whether the range, at least 1 byte, is known to be all data."""
        first = offset >> self._shift
        last = (offset + length - 1) >> self._shift
        if first == last:
            return bool(self._bits[first])
        return self._bits.find(0, first, last + 1) < 0

    def add(self, offset: int, end: int) -> None:
        """Take note that `[offset, end)` is data."""
        first = round_up(offset, self.granule) >> self._shift
        is_tail = end >= self._size
        last = len(self._bits) if is_tail else round_down(end, self.granule) >> self._shift
        if first < last:
            self._bits[first:last] = 1

    def remove(self, offset: int, end: int) -> None:
        """Forget what is known of `[offset, end)`."""
        first = offset >> self._shift
        last = round_up(end, self.granule) >> self._shift
        self._bits[first:last] = 0
