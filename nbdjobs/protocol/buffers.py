# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Memory for payloads: what a connection receives into, and large buffers that are used again.

Both take anonymous mappings rather than `bytearray`: their pages cost nothing before they are
touched, so a hundred idle connections stay small, and they are not filled with zeroes first.
"""

from __future__ import annotations

from mmap import mmap
from typing import Final

from nbdjobs.protocol.constants import MAX_PAYLOAD

POOLED_FROM: Final = 64 * 1024
"""Bytes from which a buffer is worth keeping; below, a fresh `bytearray` is faster."""

MAX_RECEIVE: Final = MAX_PAYLOAD + 64 * 1024
"""Largest receive buffer: one request of the largest payload, with its header."""


class ReceiveBuffer:
    """Received bytes of one connection, `[start, end)` of them not yet parsed.

    Payloads are used where they lie. `pins` counts the requests that still use one: while it is
    not zero, nothing may be moved or overwritten before `end`.
    """

    __slots__ = ("capacity", "end", "pins", "start", "view")

    def __init__(self, capacity: int):
        self.view = memoryview(mmap(-1, capacity))
        self.capacity = capacity
        self.start = 0
        self.end = 0
        self.pins = 0

    def append(self, data: bytes | memoryview) -> None:
        """Copy bytes behind those present; the caller knows that they fit."""
        end = self.end + len(data)
        self.view[self.end : end] = data
        self.end = end

    def compact(self) -> None:
        """Move what is not parsed to the front; only without pins."""
        length = self.end - self.start
        self.view[:length] = self.view[self.start : self.end]
        self.start = 0
        self.end = length


def receive_capacity(needed: int, base: int) -> int:
    """Return the size of a receive buffer for a request of `needed` bytes: powers of two."""
    if needed <= base:
        return base
    return min(1 << (needed - 1).bit_length(), MAX_RECEIVE)


class BufferPool:
    """Large buffers for reads, kept for the next one up to a total of bytes.

    Args:
        limit: Most bytes kept while unused.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._kept = 0
        self._free: dict[int, list[memoryview]] = {}

    def take(self, length: int) -> memoryview:
        """Return a buffer of exactly `length` bytes with arbitrary content."""
        size = 1 << (length - 1).bit_length()
        free = self._free.get(size)
        if free:
            self._kept -= size
            whole = free.pop()
        else:
            whole = memoryview(mmap(-1, size))
        return whole if size == length else whole[:length]

    def give_back(self, buffer: memoryview) -> None:
        """Offer a buffer from `take` for use again; nobody may touch it any more."""
        whole = memoryview(buffer.obj)
        size = len(whole)
        if self._kept + size <= self._limit:
            self._kept += size
            self._free.setdefault(size, []).append(whole)
