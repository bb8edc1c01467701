# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable

from nbdjobs.protocol.buffers import KEEP_S, BufferPool, ReceiveBuffer

KIB = 1024


class Timers:
    """Takes the place of `call_later`."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], None]] = []

    def call_later(self, delay: float, call: Callable[[], None]) -> Timers:
        assert delay == KEEP_S
        self.pending.append(call)
        return self

    def cancel(self) -> None:
        self.pending.clear()

    def fire(self) -> None:
        (call,) = self.pending
        self.pending.clear()
        call()


def test_a_buffer_given_back_is_used_again() -> None:
    pool = BufferPool(1024 * KIB)
    buffer = pool.take(256 * KIB)
    buffer[0] = 7
    pool.give_back(buffer)
    assert pool.take(200 * KIB)[0] == 7
    assert pool.take(200 * KIB)[0] == 0


def test_no_more_is_kept_than_the_limit() -> None:
    pool = BufferPool(256 * KIB)
    first, second = pool.take(256 * KIB), pool.take(256 * KIB)
    first[0], second[0] = 1, 2
    pool.give_back(first)
    pool.give_back(second)
    assert [pool.take(256 * KIB)[0], pool.take(256 * KIB)[0]] == [1, 0]


def test_what_nobody_wants_for_a_while_is_let_go() -> None:
    timers = Timers()
    pool = BufferPool(1024 * KIB, timers.call_later)
    buffer = pool.take(256 * KIB)
    buffer[0] = 7
    pool.give_back(buffer)
    pool.give_back(pool.take(256 * KIB))
    timers.fire()  # it was of use meanwhile
    assert pool.take(256 * KIB)[0] == 7
    pool.give_back(buffer)
    timers.fire()
    timers.fire()
    assert not timers.pending
    assert pool.take(256 * KIB)[0] == 0


def test_a_closed_pool_keeps_nothing() -> None:
    timers = Timers()
    pool = BufferPool(1024 * KIB, timers.call_later)
    buffer = pool.take(256 * KIB)
    buffer[0] = 7
    pool.give_back(buffer)
    pool.close()
    assert not timers.pending
    pool.give_back(buffer)
    assert pool.take(256 * KIB)[0] == 0


def test_a_retired_buffer_waits_for_the_last_request_that_uses_it() -> None:
    pool = BufferPool(1024 * KIB)
    buffer = ReceiveBuffer(pool, 256 * KIB)
    buffer.append(b"payload")
    buffer.pins = 2
    buffer.retire()
    buffer.retire()
    buffer.unpin()
    assert pool.take(256 * KIB)[0] == 0
    buffer.unpin()
    assert bytes(pool.take(256 * KIB)[:7]) == b"payload"
    assert pool.take(256 * KIB)[0] == 0
