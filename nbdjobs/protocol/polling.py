# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""When to look for the next request instead of sleeping until it comes.

A client that sends one request, waits for the answer and sends the next has every request pay
for waking the server up, which costs more than the request itself. So while requests of one
client follow each other closely, the server looks at the socket for a moment before it sleeps.

The moment grows while a longer one would have been enough, and falls to nothing as soon as a
request takes its time or another client is at work: then looking would only keep others
waiting, or take the processor from the very client it waits for.

Source: QEMU `util/aio-posix.c` (adaptive polling) for the idea.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from time import perf_counter_ns
from typing import Final

FIRST_NS: Final = 8_000
LONGEST_NS: Final = 96_000
"""A look takes at most so long; the server does nothing else meanwhile."""

TURN_NS: Final = 1_000_000
"""However many requests are found, after so long it is everybody's turn."""


class Polling:
    """How long to look for the next request; one for all clients of a server.

    Args:
        clock_ns: Time in nanoseconds.
        processors: How many processors there are: on a single one, looking is in vain, since
            the client cannot run meanwhile.

    Attributes:
        budget_ns: How long to look now, 0 for not at all.
    """

    def __init__(
        self,
        clock_ns: Callable[[], int] = perf_counter_ns,
        processors: int | None = None,
    ):
        found = len(os.sched_getaffinity(0)) if processors is None else processors
        self.budget_ns = 0
        self.clock_ns = clock_ns
        self._is_useful = found > 1
        self._client: object = None
        self._idle_since_ns = 0

    def woken(self, client: object) -> None:
        """Take note that the event loop has brought bytes of a client."""
        if not self._is_useful:
            return
        gap_ns = self.clock_ns() - self._idle_since_ns
        if client is not self._client or gap_ns > LONGEST_NS:
            self._client = client
            self.budget_ns = 0
        elif gap_ns > self.budget_ns:
            self.budget_ns = min(max(2 * self.budget_ns, FIRST_NS), LONGEST_NS)

    def idle(self) -> None:
        """Take note that all that came has been answered."""
        self._idle_since_ns = self.clock_ns()
