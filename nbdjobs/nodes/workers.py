# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Threads of one node, for system calls that may wait.

Every node has its own, so that a stuck disk holds up nobody but its own users. They start when
work comes, and are daemon threads: a system call that never returns cannot keep the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, NamedTuple, TypeVar

T = TypeVar("T")

MAX_THREADS: Final = 16
"""System calls under way at once on one node; disks gain nothing from a deeper queue of ours."""


class _Work(NamedTuple):
    call: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


class Workers:
    """A small pool of daemon threads.

    Attributes:
        busy: Calls handed over and not yet ended.
    """

    def __init__(self, name: str):
        self.busy = 0
        self._name = name
        self._threads = 0
        self._posted: set[asyncio.Future[Any]] = set()
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()

    def post(self, call: Callable[[], object]) -> None:
        """Run `call` in a thread some time; nobody cares what comes of it."""

        def ended(future: asyncio.Future[object]) -> None:
            self.busy -= 1
            self._posted.discard(future)
            future.exception()

        posted = self._hand_over(call)
        self._posted.add(posted)
        posted.add_done_callback(ended)

    async def idle(self) -> None:
        """Wait for the end of everything that was posted until now."""
        if self._posted:
            await asyncio.wait(self._posted)

    async def run(self, call: Callable[[], T]) -> T:
        """Run `call` in a thread and return or raise what it does.

        Cancelling takes effect only when the call has ended, since until then it may use the
        caller's buffers.
        """
        future = self._hand_over(call)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await _ended(future)
            raise
        finally:
            self.busy -= 1

    def _hand_over(self, call: Callable[[], T]) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self.busy += 1
        if self._threads < min(self.busy, MAX_THREADS):
            self._start_thread()
        self._queue.put(_Work(call, loop, future))
        return future

    def close(self) -> None:
        """Let the threads go once they have done what they were given."""
        for _ in range(self._threads):
            self._queue.put(None)
        self._threads = 0

    def _start_thread(self) -> None:
        self._threads += 1
        threading.Thread(target=self._work, name=f"node {self._name}", daemon=True).start()

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            report = _call(work)
            # A loop that was closed meanwhile has nobody left to tell.
            with contextlib.suppress(RuntimeError):
                work.loop.call_soon_threadsafe(report)
            del work, report


def _call(work: _Work) -> Callable[[], None]:
    """Do the work, and return what the loop has to do with the outcome."""
    future = work.future
    try:
        result = work.call()
    except BaseException as error:
        failure = error
        return lambda: future.set_exception(failure)
    return lambda: future.set_result(result)


async def _ended(future: asyncio.Future[Any]) -> None:
    """Wait for the end, however often we are cancelled; the outcome interests nobody."""
    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([future])
    future.exception()
