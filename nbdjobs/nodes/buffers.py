# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Recycled memory for copies: bounded in all, handed out in the order of asking."""

from __future__ import annotations

import asyncio
import mmap
from collections import deque
from typing import Final

BUFFER_SIZE: Final = 256 * 1024
"""Bytes of one buffer: as much as a copy transfers at a time.

What was read is written out of the processor's cache again; in pieces of 1 MiB it no longer is.
"""


class BufferPool:
    """Up to `count` page-aligned buffers (O_DIRECT wants that), made when first needed.

    Taking one when one is free costs no wait. Holding one and asking for another is forbidden:
    that is why waiting here cannot lock up.
    """

    def __init__(self, count: int):
        self._free: list[memoryview] = []
        self._to_make = count
        self._waiters: deque[asyncio.Future[memoryview]] = deque()

    def take_free(self) -> memoryview | None:
        """Get a buffer that is free and made, like `take`, or None."""
        return self._free.pop() if self._free else None

    async def take(self) -> memoryview:
        """Get a buffer of `BUFFER_SIZE` bytes, with anything in it; `give_back` is a must."""
        if self._free:
            return self._free.pop()
        if self._to_make:
            self._to_make -= 1
            return memoryview(mmap.mmap(-1, BUFFER_SIZE))
        waiter: asyncio.Future[memoryview] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.give_back(waiter.result())
            raise

    def give_back(self, buffer: memoryview) -> None:
        """Let the next one have it."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(buffer)
                return
        self._free.append(buffer)
