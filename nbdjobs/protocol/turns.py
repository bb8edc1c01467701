# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""How much one client may have done before it is everybody's turn.

All clients share one event loop, which serves those who have sent something one after the other.
A client that has sent a thousand requests would have all of them done in its turn, so a turn has
an end: what a turn may cost is set here, and what does not fit waits for the next one, behind a
round of the loop in which everyone else is served.

Turns are short while a client that sends little at a time is about, so that it is served nearly as
often as if those beside it were like itself. Otherwise they are long: going round the loop costs
a little, and among clients that all send much, long turns are as fair as short ones.

Costs are in bytes: those of the payload, and what takes as long for the request itself.
"""

from __future__ import annotations

from typing import Final, NamedTuple

READ_COST: Final = 24 * 1024
"""What a read costs beside its payload: about 5 us, in which a payload of so much is copied."""

CHANGE_COST: Final = 128 * 1024
"""What any other request costs beside its payload; a write into the page cache takes 25 us."""

STATUS_COST: Final = 1024 * 1024
"""What a block status costs: in a file full of holes the first of its steps takes 300 us."""


class Allowance(NamedTuple):
    """What a client may have.

    Attributes:
        cost: What the requests of its turn may cost; the last one may cost more.
        waiting: Its requests that may wait for the disk at a time.
    """

    cost: int
    waiting: int


SHARED: Final = Allowance(cost=256 * 1024, waiting=16)
"""In modest company: turns of about 50 us, or of one request that costs more. A disk that takes
its time is busy with 16 requests, and another client's waits behind no more than that."""

ALONE: Final = Allowance(cost=4 * 1024 * 1024, waiting=128)
"""Otherwise: turns of about 1 ms, so that newcomers and QMP need not wait for long; and eight times
as many requests that wait as QEMU takes."""

MODEST: Final = 2
"""A client from whom so many requests come at a time is modest."""

REMEMBERED: Final = 64
"""Turns until a modest client that was not heard of again is forgotten."""


class Turns:
    """Knows whether a client has modest company; one for all clients of a server.

    Attributes:
        batch: Requests that came at a time from the client served last.
    """

    def __init__(self) -> None:
        self.batch = 0
        self._last: object = None
        self._company = 0

    def allowance(self, client: object) -> Allowance:
        """Take note of a client that is served now, and return what it may have."""
        if client is not self._last:
            if 0 < self.batch <= MODEST:
                self._company = REMEMBERED
            self._last = client
        if self._company:
            self._company -= 1
            return SHARED
        return ALONE

    def left(self, client: object) -> None:
        """Take note that a client is gone."""
        if client is self._last:
            self.batch = 0
            self._last = None
