# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Flushing: what may be skipped and shared, and what a failure means for later."""

from __future__ import annotations

import asyncio
import errno

import pytest

from nbdjobs.errors import NodeError
from nbdjobs.nodes.flusher import Flusher


class Storage:
    """Counts the system calls, and holds each until it is let go."""

    def __init__(self) -> None:
        self.calls = 0
        self.failure = 0
        self.open = asyncio.Event()
        self.open.set()
        self.entered = asyncio.Event()

    async def sync(self) -> None:
        self.calls += 1
        self.entered.set()
        await self.open.wait()
        if self.failure:
            raise NodeError(self.failure)


def test_nothing_written_means_nothing_to_do() -> None:
    async def scenario() -> None:
        storage = Storage()
        flusher = Flusher(storage.sync, is_failure_final=True)
        await flusher.flush()
        flusher.wrote()
        await flusher.flush()
        await flusher.flush()
        assert storage.calls == 1

    asyncio.run(scenario())


def test_flushes_that_wait_share_the_next_call() -> None:
    async def scenario() -> None:
        storage = Storage()
        flusher = Flusher(storage.sync, is_failure_final=True)
        flusher.wrote()
        storage.open.clear()
        first = asyncio.create_task(flusher.flush())
        await storage.entered.wait()
        flusher.wrote()  # completed after the call began: not covered by it
        later = [asyncio.create_task(flusher.flush()) for _ in range(5)]
        await asyncio.sleep(0)
        assert storage.calls == 1
        storage.open.set()
        await asyncio.gather(first, *later)
        assert storage.calls == 2

    asyncio.run(scenario())


def test_a_flush_may_join_one_that_began_after_its_writes() -> None:
    async def scenario() -> None:
        storage = Storage()
        flusher = Flusher(storage.sync, is_failure_final=True)
        flusher.wrote()
        storage.open.clear()
        flushes = [asyncio.create_task(flusher.flush()) for _ in range(2)]
        await storage.entered.wait()
        storage.open.set()
        await asyncio.gather(*flushes)
        assert storage.calls == 1

    asyncio.run(scenario())


def test_a_failure_is_told_to_everyone_who_relied_on_it_and_never_forgotten() -> None:
    async def scenario() -> None:
        storage = Storage()
        storage.failure = errno.EIO
        flusher = Flusher(storage.sync, is_failure_final=True)
        flusher.wrote()
        storage.open.clear()
        flushes = [asyncio.create_task(flusher.flush()) for _ in range(3)]
        await storage.entered.wait()
        storage.open.set()
        outcomes = await asyncio.gather(*flushes, return_exceptions=True)
        assert all(isinstance(outcome, NodeError) for outcome in outcomes)
        storage.failure = 0
        with pytest.raises(NodeError) as caught:
            await flusher.flush()
        assert caught.value.errno == errno.EIO
        assert storage.calls == 1

    asyncio.run(scenario())


def test_past_the_page_cache_a_failed_flush_may_be_repeated() -> None:
    async def scenario() -> None:
        storage = Storage()
        storage.failure = errno.EIO
        flusher = Flusher(storage.sync, is_failure_final=False)
        flusher.wrote()
        with pytest.raises(NodeError):
            await flusher.flush()
        storage.failure = 0
        await flusher.flush()
        assert storage.calls == 2

    asyncio.run(scenario())


def test_cancelling_a_flush_takes_nothing_from_those_who_share_it() -> None:
    async def scenario() -> None:
        storage = Storage()
        flusher = Flusher(storage.sync, is_failure_final=True)
        flusher.wrote()
        storage.open.clear()
        flushes = [asyncio.create_task(flusher.flush()) for _ in range(2)]
        await storage.entered.wait()
        flushes[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await flushes[0]
        storage.open.set()
        await flushes[1]
        assert storage.calls == 1

    asyncio.run(scenario())


def test_a_failure_that_nobody_waited_for_is_not_forgotten_either() -> None:
    async def scenario() -> None:
        storage = Storage()
        storage.failure = errno.ENOSPC
        flusher = Flusher(storage.sync, is_failure_final=True)
        flusher.wrote()
        storage.open.clear()
        flush = asyncio.create_task(flusher.flush())
        await storage.entered.wait()
        flush.cancel()
        storage.open.set()
        await flusher.idle()
        with pytest.raises(NodeError) as caught:
            await flusher.flush()
        assert caught.value.errno == errno.ENOSPC

    asyncio.run(scenario())


def test_a_failure_that_came_before_a_write_is_not_that_writes() -> None:
    async def scenario() -> None:
        storage = Storage()
        storage.failure = errno.EIO
        flusher = Flusher(storage.sync, is_failure_final=False)
        flusher.wrote()
        storage.open.clear()
        first = asyncio.create_task(flusher.flush())
        await storage.entered.wait()
        flusher.wrote()
        second = asyncio.create_task(flusher.flush())
        await asyncio.sleep(0)
        storage.open.set()
        with pytest.raises(NodeError):
            await first
        storage.failure = 0
        await second
        assert storage.calls == 2

    asyncio.run(scenario())
