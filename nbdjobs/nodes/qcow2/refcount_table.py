# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Refcount blocks: counters of 1 to 64 bits, as they are in the file and as they are used.

Widths from 8 bits on are arrays, in which C code finds the next zero. Narrower counters stay
packed as in the file, least significant bits first; there a regular expression finds the next
byte that has a zero in it.
"""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from typing import Final, TypeAlias

Words: TypeAlias = "array[int]"

_TYPE_CODES: Final = {3: "B", 4: "H", 5: "I", 6: "Q"}


class RefcountBlock(ABC):
    """The counters of one block, or of a longer piece of the file."""

    @abstractmethod
    def __len__(self) -> int:
        """How many counters there are."""

    @abstractmethod
    def __getitem__(self, index: int) -> int:
        """One counter."""

    @abstractmethod
    def __setitem__(self, index: int, value: int) -> None:
        """Set one counter; the value fits its width."""

    @abstractmethod
    def find_zero(self, start: int) -> int:
        """Index of the first counter from `start` on that is zero, or -1."""

    @abstractmethod
    def pack(self) -> bytes:
        """The counters as they are in the file."""

    @abstractmethod
    def holds(self, start: int, wanted: Words) -> bool:
        """Whether the counters from `start` on are those in `wanted`, an array of type "I"."""

    @abstractmethod
    def used(self) -> Iterator[tuple[int, int]]:
        """Index and value of every counter that is not zero."""


class _WideBlock(RefcountBlock):
    """Counters of whole bytes."""

    def __init__(self, data: bytes, order: int):
        self._counters = array(_TYPE_CODES[order], data)
        if sys.byteorder == "little":
            self._counters.byteswap()

    def __len__(self) -> int:
        return len(self._counters)

    def __getitem__(self, index: int) -> int:
        return self._counters[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._counters[index] = value

    def find_zero(self, start: int) -> int:
        try:
            return self._counters.index(0, start)
        except ValueError:
            return -1

    def holds(self, start: int, wanted: Words) -> bool:
        return self._counters[start : start + len(wanted)] == wanted

    def pack(self) -> bytes:
        if sys.byteorder == "big":
            return self._counters.tobytes()
        swapped = self._counters[:]
        swapped.byteswap()
        return swapped.tobytes()

    def used(self) -> Iterator[tuple[int, int]]:
        return ((index, value) for index, value in enumerate(self._counters) if value)


class _NarrowBlock(RefcountBlock):
    """Counters of 1, 2 or 4 bits."""

    def __init__(self, data: bytes, order: int):
        self._data = bytearray(data)
        self._width = 1 << order
        self._per_byte = 8 >> order
        self._mask = (1 << self._width) - 1
        self._with_zero = _WITH_ZERO[order]

    def __len__(self) -> int:
        return len(self._data) * self._per_byte

    def __getitem__(self, index: int) -> int:
        place, part = divmod(index, self._per_byte)
        return self._data[place] >> (part * self._width) & self._mask

    def __setitem__(self, index: int, value: int) -> None:
        place, part = divmod(index, self._per_byte)
        shift = part * self._width
        self._data[place] = self._data[place] & ~(self._mask << shift) | value << shift

    def find_zero(self, start: int) -> int:
        # The first byte may have its only zero before `start`.
        end = min(start + -start % self._per_byte, len(self))
        for index in range(start, end):
            if not self[index]:
                return index
        found = self._with_zero.search(self._data, end // self._per_byte)
        if found is None:
            return -1
        first = found.start() * self._per_byte
        return next(index for index in range(first, first + self._per_byte) if not self[index])

    def holds(self, start: int, wanted: Words) -> bool:
        return all(self[index] == value for index, value in enumerate(wanted, start))

    def pack(self) -> bytes:
        return bytes(self._data)

    def used(self) -> Iterator[tuple[int, int]]:
        for place in re.finditer(rb"[^\0]", self._data):
            first = place.start() * self._per_byte
            for index in range(first, first + self._per_byte):
                if self[index]:
                    yield index, self[index]


def _bytes_with_zero(order: int) -> re.Pattern[bytes]:
    """Matches a byte that has a counter of that width which is zero."""
    width, mask = 1 << order, (1 << (1 << order)) - 1
    found = [
        byte for byte in range(256) if any(not byte >> shift & mask for shift in range(0, 8, width))
    ]
    return re.compile(b"[" + b"".join(b"\\x%02x" % byte for byte in found) + b"]")


_WITH_ZERO: Final = {order: _bytes_with_zero(order) for order in range(3)}


def unpack_block(data: bytes, order: int) -> RefcountBlock:
    """Read counters of `1 << order` bits, 0 to 6."""
    return _NarrowBlock(data, order) if order < 3 else _WideBlock(data, order)
