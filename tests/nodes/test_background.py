# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio

import pytest

from nbdjobs.nodes.background import Background


def test_work_that_does_not_wait_is_done_at_once() -> None:
    async def main() -> None:
        done: list[int] = []

        async def work() -> None:
            done.append(1)

        background = Background(lambda: done.append(2))
        assert background.start(work()) is None
        assert done == [1]
        assert len(background) == 0

    asyncio.run(main())


def test_errors_come_where_the_work_was_when_it_failed() -> None:
    async def main() -> None:
        async def work(turns: int) -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            raise ZeroDivisionError

        background = Background()
        with pytest.raises(ZeroDivisionError):
            background.start(work(0))
        task = background.start(work(2))
        assert task is not None
        await background.settled()
        assert isinstance(task.exception(), ZeroDivisionError)

    asyncio.run(main())


def test_settled_waits_for_all_that_is_under_way_and_for_what_comes_meanwhile() -> None:
    async def main() -> None:
        gates = [asyncio.Event() for _ in range(3)]
        ended: list[int] = []

        async def work(number: int) -> None:
            await gates[number].wait()

        background = Background(lambda: ended.append(len(background)))
        for number in range(2):
            background.start(work(number))
        settled = asyncio.create_task(background.settled())
        gates[0].set()
        for _ in range(5):
            await asyncio.sleep(0)
        background.start(work(2))
        gates[1].set()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not settled.done()
        gates[2].set()
        await settled
        assert ended == [1, 1, 0]

    asyncio.run(main())
