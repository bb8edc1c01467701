# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""How much memory clients may hold, each of them and all together.

What clients make a server keep is the data of requests that wait for a disk, and of replies that
they do not take. A client that holds its part is not served on until something of it ends. When
all together hold much, whoever holds more than a little waits until he holds little, or until
there is room again. So a client may always have one request served, whatever the others do, and
the most that can be held in all is

    the limit  +  clients * (SMALL + one request of the largest size)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

LIMIT: Final = 256 * 1024 * 1024
"""Bytes that all clients hold before those with much have to wait."""

SMALL: Final = 1024 * 1024
"""Bytes that a client may hold however much the others do: small requests go on as ever."""

MAX_WAITING: Final = 64 * 1024 * 1024
"""Bytes of data of one client's requests that wait for the disk: two of the largest."""

MAX_PINNED: Final = 2 * MAX_WAITING
"""Bytes of one client's receive buffers that such requests keep from being used again. A buffer
may be larger than what is waited for in it: twice as large, or for a request that was refused."""


class Budget:
    """What all clients of a server hold.

    Attributes:
        used: Bytes.
    """

    def __init__(self, limit: int = LIMIT):
        self.used = 0
        self._limit = limit
        self._waiting: dict[Callable[[], None], None] = {}

    @property
    def is_short(self) -> bool:
        """Whether those who hold more than a little have to wait."""
        return self.used >= self._limit

    def charge(self, difference: int) -> None:
        """Take note that a client holds so many bytes more, or less."""
        self.used += difference
        if self._waiting and not self.is_short:
            waiting, self._waiting = self._waiting, {}
            for go_on in waiting:
                go_on()

    def wait(self, go_on: Callable[[], None]) -> None:
        """Have `go_on` called when there is room again."""
        self._waiting[go_on] = None

    def forget(self, go_on: Callable[[], None]) -> None:
        """Call it no more."""
        self._waiting.pop(go_on, None)


class Holdings:
    """What one client holds, in bytes. After a change of the attributes call `recount`.

    Args:
        budget: That of all clients.
        go_on: Called when a client that had to wait for room need not any more.

    Attributes:
        waiting: Data of requests that wait for the disk.
        pinned: Receive buffers given up, of which such requests still use a part.
        receiving: The receive buffer, as far as it has grown for a large request.
        unsent: Data of replies that the client does not take.
    """

    def __init__(self, budget: Budget, go_on: Callable[[], None]):
        self.waiting = 0
        self.pinned = 0
        self.receiving = 0
        self.unsent = 0
        self._budget = budget
        self._go_on = go_on
        self._charged = 0

    def recount(self) -> bool:
        """Tell all clients' budget; returns whether this one has to wait.

        The receive buffer alone is no reason to wait: what is in it has to be received first.
        """
        held = self.waiting + self.pinned + self.unsent
        charge = held + self.receiving
        if charge != self._charged:
            self._charged, difference = charge, charge - self._charged
            self._budget.charge(difference)
        if self.waiting >= MAX_WAITING or self.pinned >= MAX_PINNED:
            return True
        if held > SMALL and self._budget.is_short:
            self._budget.wait(self._go_on)
            return True
        return False

    def close(self) -> None:
        """The client is gone, and all it held."""
        self._budget.forget(self._go_on)
        self._budget.charge(-self._charged)
        self._charged = 0
