# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A node's own threads: results, failures, cancelling, and that a stuck call stays alone."""

from __future__ import annotations

import asyncio
import threading

import pytest

from nbdjobs.nodes.workers import MAX_THREADS, Workers


def test_results_and_failures_come_back() -> None:
    def fail() -> None:
        raise OSError(5, "broken")

    async def scenario() -> None:
        workers = Workers("w")
        assert await workers.run(lambda: 7) == 7
        with pytest.raises(OSError, match="broken"):
            await workers.run(fail)
        assert workers.busy == 0
        workers.close()

    asyncio.run(scenario())


def test_a_cancelled_caller_waits_until_its_buffer_is_free() -> None:
    async def scenario() -> None:
        workers = Workers("w")
        begun, may_end = threading.Event(), threading.Event()
        buffer = bytearray(1)

        def call() -> None:
            begun.set()
            may_end.wait()
            buffer[0] = 1

        task = asyncio.create_task(workers.run(call))
        await asyncio.to_thread(begun.wait)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
            assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert buffer[0] == 1
        workers.close()

    asyncio.run(scenario())


def test_a_stuck_node_takes_no_threads_from_others() -> None:
    async def scenario() -> None:
        stuck, other = Workers("stuck"), Workers("other")
        may_end = threading.Event()
        tasks = [asyncio.create_task(stuck.run(may_end.wait)) for _ in range(MAX_THREADS * 2)]
        await asyncio.sleep(0)
        assert await other.run(lambda: "served") == "served"
        may_end.set()
        await asyncio.gather(*tasks)
        stuck.close()
        other.close()

    asyncio.run(scenario())


def test_threads_cannot_keep_the_process() -> None:
    async def scenario() -> None:
        workers = Workers("daemonic")
        assert await workers.run(lambda: threading.current_thread().daemon)
        assert not [t for t in threading.enumerate() if t.name == "node idle"]
        workers.close()

    asyncio.run(scenario())
