# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import asyncio
from pathlib import Path

from nbdjobs.protocol.export import Export
from nbdjobs.protocol.polling import FIRST_NS, LONGEST_NS, Polling
from nbdjobs.protocol.server import Server
from tests.protocol.client import Client
from tests.protocol.rig import MemoryDisk

CLIENT = "client"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000_000
        self.polling = Polling(lambda: self.now, processors=2)

    def request_after(self, gap_ns: int, client: object = CLIENT) -> int:
        """Let a request come so long after the last was answered; the budget it leads to."""
        self.now += gap_ns
        self.polling.woken(client)
        budget = self.polling.budget_ns
        self.now += 1000
        self.polling.idle()
        return budget


def test_nobody_looks_at_first() -> None:
    assert Clock().polling.budget_ns == 0


def test_the_budget_grows_while_requests_follow_closely_and_is_bounded() -> None:
    clock = Clock()
    clock.request_after(LONGEST_NS)
    budgets = [clock.request_after(LONGEST_NS) for _ in range(8)]
    assert budgets[0] == FIRST_NS
    assert budgets == sorted(budgets)
    assert budgets[-1] == LONGEST_NS


def test_the_budget_grows_no_further_than_it_has_to() -> None:
    clock = Clock()
    clock.request_after(FIRST_NS)
    assert {clock.request_after(FIRST_NS) for _ in range(8)} == {FIRST_NS}


def test_a_request_that_takes_its_time_ends_it() -> None:
    clock = Clock()
    for _ in range(4):
        clock.request_after(1000)
    assert clock.request_after(LONGEST_NS + 1) == 0


def test_a_second_client_ends_it() -> None:
    clock = Clock()
    for _ in range(4):
        clock.request_after(1000)
    assert clock.polling.budget_ns
    assert clock.request_after(1000, "another client") == 0


def test_a_single_processor_is_left_to_the_client() -> None:
    polling = Polling(lambda: 0, processors=1)
    for _ in range(4):
        polling.woken(CLIENT)
        polling.idle()
    assert polling.budget_ns == 0


class Patient(Polling):
    """Looks for long, and counts how often it is the event loop that brings a request."""

    def __init__(self) -> None:
        super().__init__(processors=2)
        self.budget_ns = 1_000_000_000
        self.wake_ups = 0

    def woken(self, client: object) -> None:
        self.wake_ups += 1


def test_requests_found_by_looking_are_served_like_all_others(tmp_path: Path) -> None:
    disk = MemoryDisk(1 << 20)
    rounds = 50

    async def client(path: str) -> None:
        nbd = await Client.attach(path)
        for number in range(rounds):
            block = bytes([number]) * 4096
            await nbd.write(number * 4096, block)
            assert await nbd.read(number * 4096, 4096) == block
        large = b"l" * (1 << 20)
        await nbd.write(0, large)
        assert await nbd.read(0, 1 << 20) == large
        await nbd.close()

    async def scenario() -> None:
        polling = Patient()
        server = Server(polling=polling)
        server.add_export(Export(name="", backend=disk, is_writable=True))
        path = server.listen_unix(str(tmp_path / "nbd.sock"))
        # In a thread with a loop of its own, since the server does nothing else while it looks.
        await asyncio.to_thread(lambda: asyncio.run(client(path)))
        await server.close()
        assert polling.wake_ups < 2 * rounds

    asyncio.run(scenario())
    assert disk.content == b"l" * (1 << 20)
