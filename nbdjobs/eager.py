# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Start a coroutine now, and make it a task only if it really has to wait.

`asyncio` runs a new task from its beginning on the next turn of the loop. For requests that are
answered from memory that turn costs more than the answer, so `start` runs the coroutine at once
to its first suspension. Python 3.12 offers this as `asyncio.eager_task_factory`; this works on
3.11 and with uvloop as well.

One rule comes with it: before its first suspension the coroutine runs inside the *caller*, so up
to there it must not rely on `asyncio.current_task()` (`asyncio.timeout` and `asyncio.TaskGroup`
do). Behind one `await asyncio.sleep(0)` everything is as in any task.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")


def start(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T] | None:
    """Run a coroutine to its end, or to its first suspension and from there on as a task.

    Args:
        coroutine: A coroutine not yet begun. Its result is of use only when it suspends.

    Returns:
        None when it is done, otherwise the task that does the rest; the caller owns it.

    Raises:
        Exception: What the coroutine raised before its first suspension.
    """
    try:
        awaited = coroutine.send(None)
    except StopIteration:
        return None
    rest = _rest(coroutine, awaited)
    rest.send(None)
    return asyncio.get_running_loop().create_task(rest)


async def _rest(coroutine: Coroutine[Any, Any, T], awaited: object) -> T:
    """Be a coroutine, which tasks ask for, around the generator that does it."""
    return await _forward(coroutine, awaited)


@types.coroutine
def _forward(coroutine: Coroutine[Any, Any, T], awaited: object) -> Generator[Any, Any, T]:
    """Yield what the coroutine awaits already, then pass on all that comes in and out.

    The future it awaits was yielded once, to `start`, but nobody has acted on it: its
    `_asyncio_future_blocking` is still set, so a task takes it as if it were new.

    The first yield is for `start`: a task that is cancelled before its first step would otherwise
    end without the coroutine, which is half done, hearing of it.
    """
    try:
        try:
            yield None
        except GeneratorExit:
            coroutine.close()
            raise
        except BaseException as error:
            awaited = coroutine.throw(error)
        while True:
            try:
                value = yield awaited
            except GeneratorExit:
                coroutine.close()
                raise
            except BaseException as error:
                awaited = coroutine.throw(error)
            else:
                awaited = coroutine.send(value)
    except StopIteration as stop:
        result: T = stop.value
        return result
