# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Memory for payloads: what a connection receives into, and large buffers that are used again.

Both take anonymous mappings rather than `bytearray`: their pages cost nothing before they are
touched, so a hundred idle connections stay small, and they are not filled with zeroes first.
"""

from __future__ import annotations

from collections.abc import Callable
from mmap import mmap
from typing import Final, Protocol

from nbdjobs.protocol.constants import MAX_PAYLOAD


class Timer(Protocol):
    """What `call_later` returns."""

    def cancel(self) -> None:
        """Do not call any more."""
        ...


CallLater = Callable[[float, Callable[[], None]], Timer]
"""Calls a function after some seconds; tests put their own clock here."""

POOLED_FROM: Final = 64 * 1024
"""Bytes from which a buffer is worth keeping; below, a fresh `bytearray` is faster."""

KEEP_S: Final = 2.0
"""Seconds that unused buffers are kept for."""

MAX_RECEIVE: Final = MAX_PAYLOAD + 64 * 1024
"""Largest receive buffer: one request of the largest payload, with its header."""


class ReceiveBuffer:
    """Received bytes of one connection, `[start, end)` of them not yet parsed.

    Payloads are used where they lie. `pins` counts the requests that still use one: while it is
    not zero, nothing may be moved or overwritten before `end`.

    Args:
        pool: Where its memory comes from, and goes to once it is retired and has no pins.
        capacity: Bytes it can hold.
    """

    __slots__ = ("_is_retired", "_pool", "capacity", "end", "pins", "start", "view")

    def __init__(self, pool: BufferPool, capacity: int):
        self.view = pool.take(capacity)
        self.capacity = capacity
        self.start = 0
        self.end = 0
        self.pins = 0
        self._pool = pool
        self._is_retired = False

    def unpin(self) -> int:
        """Take note that a request does not use its payload any more.

        Returns:
            The bytes that this sets free: all, if it was retired and has no more pins.
        """
        self.pins -= 1
        if self._is_retired and not self.pins:
            self._pool.give_back(self.view)
            return self.capacity
        return 0

    def retire(self) -> int:
        """Receive no more into it.

        Returns:
            The bytes that remain in use: all, if it has pins.
        """
        if not self._is_retired:
            self._is_retired = True
            if not self.pins:
                self._pool.give_back(self.view)
        return self.capacity if self.pins else 0

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


SCRATCH: Final = 512 * 1024
"""Bytes of small reads in one batch that share one mapping."""


class BufferPool:
    """Buffers for receiving and for reads, shared by all connections of a server.

    Large ones are kept for the next who wants one, up to a total of bytes, and let go when nobody
    has wanted one for a while. Small ones are cut from one
    scratch mapping, which is free again as soon as the batch of requests that used it is sent:
    the same warm memory serves every batch. When something of a batch lives on, because a read
    had to wait or the client did not take the replies, the mapping is left to it.

    Args:
        limit: Most bytes of large buffers kept while unused.
        call_later: Timers; without, what is kept is kept for good.
    """

    def __init__(self, limit: int, call_later: CallLater | None = None):
        self._limit = limit
        self._call_later = call_later
        self._timer: Timer | None = None
        self._was_used = False
        self._kept = 0
        self._free: dict[int, list[memoryview]] = {}
        self._scratch = memoryview(mmap(-1, SCRATCH))
        self._scratch_used = 0
        self._is_scratch_needed = False

    def scratch(self, length: int) -> memoryview:
        """Return a small buffer with arbitrary content, to be used within this batch.

        `end_batch` has to follow before the event loop goes on.
        """
        start = self._scratch_used
        end = start + length
        if end > SCRATCH:
            self._scratch = memoryview(mmap(-1, SCRATCH))
            start, end = 0, length
        self._scratch_used = end
        return self._scratch[start:end]

    def keep_scratch(self) -> None:
        """Say that scratch buffers of this batch are used longer."""
        self._is_scratch_needed = True

    def end_batch(self) -> None:
        """Use scratch memory again from its start."""
        if self._is_scratch_needed:
            self._is_scratch_needed = False
            if self._scratch_used:
                self._scratch = memoryview(mmap(-1, SCRATCH))
        self._scratch_used = 0

    def take(self, length: int) -> memoryview:
        """Return a buffer of exactly `length` bytes with arbitrary content."""
        size = 1 << (length - 1).bit_length()
        free = self._free.get(size)
        if free:
            self._kept -= size
            self._was_used = True
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
            self._watch()

    def _watch(self) -> None:
        """Look after a while whether what is kept is still of use."""
        if self._call_later is not None and self._timer is None:
            self._was_used = False
            self._timer = self._call_later(KEEP_S, self._let_go_if_unused)

    def _let_go_if_unused(self) -> None:
        self._timer = None
        if self._was_used:
            self._watch()
        else:
            self._free.clear()
            self._kept = 0

    def close(self) -> None:
        """Keep nothing from now on."""
        self._limit = 0
        self._free.clear()
        self._kept = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
