# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Lets a server keep latency histograms of its exports for as long as somebody looks at them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Final

from nbdjobs.cli.exits import CliError
from nbdjobs.cli.histogram import BOUNDARIES_NS
from nbdjobs.cli.session import RefusedError, Session
from nbdjobs.cli.traffic import Counts
from nbdjobs.errors import ErrorClass

COMMAND: Final = "block-latency-histogram-set"

#: Seconds for a server to switch them off again: nobody waits longer for a screen to close.
_PATIENCE_S: Final = 2.0


class Latencies:
    """Switches histograms on where there are none, and off again those that it switched on."""

    def __init__(self, session: Session):
        self._session = session
        self._is_known = True
        self._ours: set[str] = set()

    async def switch_on(self, counts: Mapping[str, Counts]) -> None:
        """Ask for histograms of the exports that have none.

        They may be missing again at a later look: when somebody else, who had switched them on,
        has left.

        Raises:
            CliError: The server is gone.
        """
        for export, count in counts.items():
            if self._is_known and not count.has_histograms:
                await self._ask_for(export)

    async def _ask_for(self, export: str) -> None:
        try:
            await self._session.execute(COMMAND, {"id": export, "boundaries": [*BOUNDARIES_NS]})
        except RefusedError as error:
            # Any other reason is that the export has just gone.
            self._is_known = error.error_class != ErrorClass.COMMAND_NOT_FOUND
        else:
            self._ours.add(export)

    async def switch_off(self) -> None:
        """Put everything back, as far as the server and its exports are still there."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_S):
                for export in self._ours:
                    with contextlib.suppress(CliError):
                        await self._session.execute(COMMAND, {"id": export})


@contextlib.asynccontextmanager
async def keeping_latencies(session: Session) -> AsyncIterator[Latencies]:
    """Switch off at the end what was switched on meanwhile."""
    latencies = Latencies(session)
    try:
        yield latencies
    finally:
        await latencies.switch_off()
