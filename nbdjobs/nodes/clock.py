# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Time as the block layer sees it, so that tests can have one of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """A call that will be made later."""

    def cancel(self) -> None:
        """Do not make it; nothing happens if it was made."""
        ...


class Clock(Protocol):
    """Tells the time and calls back; all times in seconds."""

    def now(self) -> float:
        """Seconds since some fixed instant; never goes back."""
        ...

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` once, `delay` seconds from now."""
        ...


class LoopClock:
    """The clock of the running event loop."""

    def now(self) -> float:
        """Seconds on the loop's monotonic clock."""
        return asyncio.get_running_loop().time()

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Let the loop make the call."""
        return asyncio.get_running_loop().call_later(delay, callback)
