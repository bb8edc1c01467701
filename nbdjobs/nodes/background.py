# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Work that a node or a job does by itself and brings to its end, whoever asked for it.

Work begins at once, in the caller's place, and becomes a task only if something makes it wait:
a copy that the page cache answers costs no task (see `nbdjobs.eager` for the rule that brings).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from nbdjobs.eager import start


class Background:
    """The pieces of work of one owner that are under way.

    Args:
        ended: Called whenever a piece that had to wait has ended.
    """

    def __init__(self, ended: Callable[[], None] | None = None):
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = ended
        self._waiters: list[asyncio.Future[None]] = []

    def __len__(self) -> int:
        """How many pieces are under way."""
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
        """Begin a piece of work.

        Returns:
            The task that goes on with it, or None if it has ended already. Errors of work that
            has ended already are raised here, later ones are in the task.
        """
        task = start(work)
        if task is None:
            return None
        self._tasks.add(task)
        task.add_done_callback(self._end)
        return task

    async def settled(self) -> None:
        """Wait until nothing is under way."""
        while self._tasks:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def _end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever cares has looked; asyncio must not complain otherwise
        if not self._tasks:
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
        if self._ended is not None:
            self._ended()
