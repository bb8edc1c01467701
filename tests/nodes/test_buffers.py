# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio

import pytest

from nbdjobs.nodes.buffers import BUFFER_SIZE, BufferPool


def test_buffers_are_made_when_needed_and_used_again() -> None:
    async def main() -> None:
        pool = BufferPool(2)
        first = await pool.take()
        assert len(first) == BUFFER_SIZE
        pool.give_back(first)
        assert await pool.take() is first
        assert await pool.take() is not first

    asyncio.run(main())


def test_who_waits_is_served_in_order_and_may_give_up() -> None:
    async def main() -> None:
        pool = BufferPool(1)
        only = await pool.take()
        waiting = [asyncio.create_task(pool.take()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        pool.give_back(only)
        assert await waiting[1] is only
        assert not waiting[2].done()
        pool.give_back(only)
        assert await waiting[2] is only

    asyncio.run(main())


def test_a_buffer_given_to_someone_who_is_cancelled_in_the_same_turn_is_not_lost() -> None:
    async def main() -> None:
        pool = BufferPool(1)
        only = await pool.take()
        waiting = asyncio.create_task(pool.take())
        await asyncio.sleep(0)
        pool.give_back(only)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await pool.take() is only

    asyncio.run(main())
