# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Flushing: as few system calls as keep the promise, and no failure forgotten.

A flush promises that the writes completed before it began are on stable storage. One that finds
nothing new to bring there ends at once, and those that arrive while the storage is busy with an
older one share the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from nbdjobs.errors import NodeError


class _Outcome(NamedTuple):
    """How many writes a system call was about, and the errno of its failure or 0."""

    covered: int
    failure: int


class Flusher:
    """Flushes one file through `sync`, which raises `NodeError` when it fails.

    After a failure the kernel may have dropped what it could not write, and a second attempt
    would succeed without it. So while `is_failure_final`, all later flushes fail likewise.

    Source: QEMU `block/file-posix.c` (page_cache_inconsistent) for the behaviour.
    """

    def __init__(self, sync: Callable[[], Awaitable[None]], *, is_failure_final: bool = True):
        self.is_failure_final = is_failure_final
        self._sync = sync
        self._failure = 0
        self._completed = 0
        self._stable = 0
        self._under_way: asyncio.Task[_Outcome] | None = None

    def wrote(self) -> None:
        """Take note that a write has completed."""
        self._completed += 1

    async def flush(self) -> None:
        """Bring all writes completed until now to stable storage.

        Cancelling leaves the system call under way alone: others may rely on it.
        """
        target = self._completed
        while self._stable < target and not self._failure:
            if self._under_way is None:
                self._under_way = asyncio.create_task(self._sync_now())
            outcome = await asyncio.shield(self._under_way)
            if outcome.failure and outcome.covered >= target:
                raise NodeError(outcome.failure)
        if self._failure:
            raise NodeError(self._failure)

    async def idle(self) -> None:
        """Wait until no system call is under way."""
        if self._under_way is not None:
            await asyncio.wait([self._under_way])

    async def _sync_now(self) -> _Outcome:
        covered, failure = self._completed, 0
        try:
            await self._sync()
            self._stable = covered
        except NodeError as error:
            failure = error.errno
            if self.is_failure_final:
                self._failure = failure
        finally:
            self._under_way = None
        return _Outcome(covered, failure)
