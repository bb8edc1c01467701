# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Flushing: as few system calls as keep the promise, and no failure forgotten.

A flush promises that the writes completed before it began are on stable storage. One that finds
nothing new to bring there ends at once, and those that arrive while the storage is busy with an
older one share the next.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

from nbdjobs.errors import NodeError


class Flusher:
    """Flushes one file through `sync`, which raises `NodeError` when it fails.

    After a failure the kernel may have dropped what it could not write, and a second attempt
    would succeed without it. So with `is_failure_final`, all later flushes fail likewise.

    Source: QEMU `block/file-posix.c` (page_cache_inconsistent) for the behaviour.
    """

    def __init__(self, sync: Callable[[], Awaitable[None]], *, is_failure_final: bool):
        self._sync = sync
        self._is_failure_final = is_failure_final
        self._failure = 0
        self._completed = 0
        self._stable = 0
        self._under_way: asyncio.Future[None] | None = None

    def wrote(self) -> None:
        """Take note that a write has completed."""
        self._completed += 1

    async def flush(self) -> None:
        """Bring all writes completed until now to stable storage.

        Cancelling takes effect once the system call under way has ended.
        """
        target = self._completed
        while self._stable < target:
            if self._failure:
                raise NodeError(self._failure, os.strerror(self._failure))
            if self._under_way is None:
                await self._sync_now()
            else:
                await asyncio.wait([self._under_way])
        if self._failure:
            raise NodeError(self._failure, os.strerror(self._failure))

    async def _sync_now(self) -> None:
        covered = self._completed
        self._under_way = asyncio.get_running_loop().create_future()
        try:
            await self._sync()
            self._stable = covered
        except NodeError as error:
            if self._is_failure_final:
                self._failure = error.errno
            raise
        finally:
            self._under_way.set_result(None)
            self._under_way = None
