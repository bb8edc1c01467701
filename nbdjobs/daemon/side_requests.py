# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Requests that a command began and did not wait for, and what they have to say when they end.

A request belongs to the node or device that the command named. Its report waits there for the
next command that names the same one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final

from nbdjobs import eager
from nbdjobs.errors import CommandError

MAX_REQUESTS: Final = 64
MAX_BYTES: Final = 256 * 1024 * 1024
"""Memory that requests may keep while somebody holds them."""


class SideRequests:
    """The requests of all owners, bounded in number and in bytes."""

    def __init__(self) -> None:
        self._in_flight: dict[asyncio.Task[None], str] = {}
        self._reports: list[tuple[str, str]] = []
        self._length = 0

    def start(self, owner: str, length: int, request: Coroutine[Any, Any, str]) -> None:
        """Begin a request, at once; one that never waits has told its report on return.

        Args:
            owner: What the command named.
            length: Bytes of memory that it keeps.
            request: Gives its report, and never fails.

        Raises:
            CommandError: Too much is under way, or not fetched.
        """
        count = len(self._in_flight) + len(self._reports)
        if count >= MAX_REQUESTS or self._length + length > MAX_BYTES:
            request.close()
            raise CommandError("Too many asynchronous requests")
        task = eager.start(self._run(owner, length, request))
        if task is not None:
            self._in_flight[task] = owner
            task.add_done_callback(self._in_flight.pop)

    async def _run(self, owner: str, length: int, request: Coroutine[Any, Any, str]) -> None:
        self._length += length
        try:
            report = await request
        finally:
            self._length -= length
        if report:
            self._reports.append((owner, report))

    def take_reports(self, owner: str) -> str:
        """What the requests of an owner that have ended had to say, in that order."""
        reports = "".join(report for name, report in self._reports if name == owner)
        self._reports = [each for each in self._reports if each[0] != owner]
        return reports

    async def settled(self, owner: str) -> None:
        """Wait until no request of an owner is in flight."""
        await self._wait({task for task, name in self._in_flight.items() if name == owner})

    async def close(self) -> None:
        """Wait for all requests; nobody is left to fetch their reports."""
        await self._wait(set(self._in_flight))
        self._reports.clear()

    @staticmethod
    async def _wait(tasks: set[asyncio.Task[None]]) -> None:
        if tasks:
            await asyncio.wait(tasks)
