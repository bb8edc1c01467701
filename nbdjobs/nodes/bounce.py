# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Aligned memory for storage that reads and writes past the page cache."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

BOUNCE: Final = 1024 * 1024
_KEPT: Final = 4


class BounceBuffers:
    """Page-aligned buffers of 1 MiB; a few are kept for the next user. Threads may share it."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    @contextmanager
    def borrow(self) -> Iterator[memoryview]:
        """Lend a buffer with any content."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = mmap.mmap(-1, BOUNCE)
        try:
            with memoryview(memory) as view:
                yield view
        finally:
            if len(self._free) < _KEPT:
                self._free.append(memory)
