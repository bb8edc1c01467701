# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Searching for extents on behalf of one client, without holding up the others.

In a disk full of holes, a search that finds all that a reply may hold takes a quarter of a second.
So it goes in steps with turns for everybody else between them, and a client has one such search
under way at a time, however many it has asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from nbdjobs.protocol.constants import BASE_ALLOCATION, AllocationState, HeaderStyle
from nbdjobs.protocol.export import Extent, MetaContext
from nbdjobs.protocol.negotiation import Chosen

MAX_EXTENTS: Final = 16 * 1024
"""Extents in one reply; the specification allows 2**20, the client asks again for the rest."""

MAX_READ_EXTENTS: Final = 32
"""Extents looked up for one sparse read; behind them a read is all data."""

EXTENTS_AT_ONCE: Final = 16
"""Extents looked up before others have their turn: about 300 us in a file full of holes."""

_ZERO: Final = int(AllocationState.ZERO)


class ExtentSearch:
    """The searches of one client."""

    def __init__(self) -> None:
        self._is_searching = asyncio.Lock()

    async def find(
        self, context: MetaContext, offset: int, length: int, limit: int
    ) -> Sequence[Extent]:
        """Look up extents, a few at a time, and only for one request of the client at a time."""
        found = await context.extents(offset, length, min(limit, EXTENTS_AT_ONCE))
        if len(found) < EXTENTS_AT_ONCE or limit <= EXTENTS_AT_ONCE:
            return found
        extents = list(found)
        position = offset + sum(extent.length for extent in found)
        end = offset + length
        async with self._is_searching:
            while position < end and len(extents) < limit:
                await asyncio.sleep(0)
                wanted = min(limit - len(extents), EXTENTS_AT_ONCE)
                more = await context.extents(position, end - position, wanted)
                position += sum(extent.length for extent in more)
                if more[0].flags == extents[-1].flags:  # changed since, or cut off at the limit
                    extents[-1] = Extent(extents[-1].length + more[0].length, more[0].flags)
                    more = more[1:]
                extents += more
        return extents


def allocation_context(chosen: Chosen) -> MetaContext | None:
    """Find what tells holes from data; simple replies cannot describe holes."""
    if chosen.style is HeaderStyle.SIMPLE:
        return None
    found = (context for context in chosen.export.contexts if context.name == BASE_ALLOCATION)
    return next(found, None)


def runs_of(extents: Sequence[Extent], length: int) -> list[Extent]:
    """Merge extents into runs that read as zeroes (flags 1) or may not (0).

    They cover exactly `length` bytes; what the extents leave out counts as data.
    """
    runs: list[Extent] = []
    for run_length, flags in (*extents, (length - sum(extent.length for extent in extents), 0)):
        is_zero = 1 if flags & _ZERO else 0
        if runs and runs[-1].flags == is_zero:
            runs[-1] = Extent(runs[-1].length + run_length, is_zero)
        elif run_length:
            runs.append(Extent(run_length, is_zero))
    return runs
