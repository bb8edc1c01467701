# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.protocol.memory import MAX_PINNED, MAX_WAITING, SMALL, Budget, Holdings

MIB = 1024 * 1024


class Client(Holdings):
    """A client that notes that it may go on."""

    def __init__(self, budget: Budget):
        self.woken = 0
        super().__init__(budget, self.wake)

    def wake(self) -> None:
        self.woken += 1

    def hold(self, waiting: int) -> bool:
        """Hold so many bytes; whether the client has to wait then."""
        self.waiting = waiting
        return self.recount()


def test_a_client_alone_may_hold_its_part() -> None:
    client = Client(Budget())
    assert not client.hold(MAX_WAITING - 1)
    assert client.hold(MAX_WAITING)
    assert not client.hold(0)
    client.pinned = MAX_PINNED
    assert client.recount()


def test_when_all_hold_much_whoever_holds_more_than_a_little_waits() -> None:
    budget = Budget(10 * MIB)
    large, small = Client(budget), Client(budget)
    assert large.hold(10 * MIB)
    assert not small.hold(SMALL)
    assert small.hold(SMALL + 1)
    assert budget.used == 11 * MIB + 1


def test_those_who_wait_are_told_when_there_is_room() -> None:
    budget = Budget(10 * MIB)
    large, other = Client(budget), Client(budget)
    large.hold(8 * MIB)
    assert other.hold(2 * MIB)
    large.hold(9 * MIB)
    assert other.woken == 0
    large.hold(7 * MIB)
    assert other.woken == 1
    assert not other.recount()
    large.hold(0)
    assert other.woken == 1


def test_what_is_being_received_counts_for_others_only() -> None:
    budget = Budget(10 * MIB)
    receiving, other = Client(budget), Client(budget)
    receiving.receiving = 32 * MIB
    assert not receiving.recount()
    assert other.hold(2 * MIB)


def test_replies_that_are_not_taken_count() -> None:
    budget = Budget(10 * MIB)
    client = Client(budget)
    client.unsent = 10 * MIB
    assert client.recount()


def test_a_client_that_is_gone_holds_nothing_and_is_not_told() -> None:
    budget = Budget(10 * MIB)
    gone, other = Client(budget), Client(budget)
    gone.hold(8 * MIB)
    other.hold(8 * MIB)
    assert gone.recount()
    gone.close()
    gone.close()
    assert budget.used == 8 * MIB
    other.hold(0)
    assert gone.woken == 0


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4))))
def test_nobody_waits_while_there_is_room(steps: list[tuple[int, int]]) -> None:
    budget = Budget(8 * SMALL)
    clients = [Client(budget) for _ in range(5)]
    waits: set[Client] = set()
    for number, held in steps:
        client = clients[number]
        for other in clients:
            other.woken = 0
        must_wait = client.hold(held * SMALL)
        waits -= {other for other in clients if other.woken}
        waits = waits | {client} if must_wait else waits - {client}
        assert budget.used == sum(client.waiting for client in clients)
        assert budget.is_short or not waits
