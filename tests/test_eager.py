# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import uvloop

from nbdjobs import eager

LOOPS = pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
NewLoop = Callable[[], asyncio.AbstractEventLoop]


def run(new_loop: NewLoop, main: Callable[[], object]) -> object:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(main())  # type: ignore[arg-type]  # every main here is async


@LOOPS
def test_what_never_waits_is_over_at_once(new_loop: NewLoop) -> None:
    async def main() -> None:
        done = []

        async def work() -> None:
            done.append(1)

        assert eager.start(work()) is None
        assert done == [1]

    run(new_loop, main)


@LOOPS
def test_an_error_before_the_first_suspension_reaches_the_caller(new_loop: NewLoop) -> None:
    async def main() -> None:
        async def work() -> None:
            raise KeyError("x")

        with pytest.raises(KeyError):
            eager.start(work())

    run(new_loop, main)


@LOOPS
def test_what_waits_goes_on_as_a_task_with_results_and_errors(new_loop: NewLoop) -> None:
    async def main() -> None:
        first: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def work() -> str:
            value = await first
            await asyncio.sleep(0)
            try:
                await failing()
            except ValueError as error:
                return f"{value} {error}"
            return "no error"

        async def failing() -> None:
            await asyncio.sleep(0)
            raise ValueError("bad")

        task = eager.start(work())
        assert task is not None
        first.set_result(5)
        assert await task == "5 bad"

    run(new_loop, main)


@LOOPS
def test_a_future_that_fails_raises_inside(new_loop: NewLoop) -> None:
    async def main() -> None:
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def work() -> None:
            await first

        task = eager.start(work())
        assert task is not None
        first.set_exception(OSError("gone"))
        with pytest.raises(OSError, match="gone"):
            await task

    run(new_loop, main)


@LOOPS
@pytest.mark.parametrize("has_begun", [False, True])
def test_cancelling_reaches_the_coroutine(new_loop: NewLoop, has_begun: bool) -> None:
    async def main() -> None:
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        seen = []

        async def work() -> None:
            try:
                await first
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        task = eager.start(work())
        assert task is not None
        if has_begun:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert seen == ["cancelled"]

    run(new_loop, main)


@LOOPS
def test_a_bare_yield_is_a_suspension_too(new_loop: NewLoop) -> None:
    async def main() -> None:
        async def work() -> int:
            await asyncio.sleep(0)
            assert asyncio.current_task() is not None
            async with asyncio.timeout(10):
                await asyncio.sleep(0)
            return 3

        task = eager.start(work())
        assert task is not None
        assert await task == 3

    run(new_loop, main)
