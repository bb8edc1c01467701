# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Clients that do what no client should: memory stays bounded, and the next one is served."""

from __future__ import annotations

import random
import threading
from contextlib import ExitStack

from nbdjobs.protocol.memory import LIMIT, MAX_PINNED, MAX_WAITING, SMALL
from nbdjobs.protocol.negotiation import MAX_OPTIONS
from nbdjobs.protocol.session import AHEAD_BYTES
from tests.hardening.raw import (
    FLAGS,
    FLUSH,
    GREETING_SIZE,
    OPT_LIST,
    READ,
    WRITE,
    go,
    option,
    request,
)
from tests.hardening.victim import BIG, FILE, KIB, MIB, SLACK, Victim

LARGEST = 32 * MIB
READ_COOKIE = 5


def test_clients_that_take_no_replies(victim: Victim) -> None:
    count = 20
    with ExitStack() as clients, victim.may_grow_by(count * (AHEAD_BYTES + 2 * MIB) + SLACK):
        for _ in range(count):
            client = clients.enter_context(victim.attach())
            client.socket.sendall(request(READ, 0, MIB) * 1000)
        victim.check_service()


def test_clients_that_take_no_replies_of_the_largest_size(victim: Victim) -> None:
    """What each has asked for first is ready and waits; what comes after that is not begun."""
    count = 4
    with ExitStack() as clients, victim.may_grow_by(count * 2 * LARGEST + SLACK):
        for _ in range(count):
            client = clients.enter_context(victim.attach())
            client.socket.sendall(request(READ, 0, LARGEST) * 100)
        victim.check_service()


def test_a_client_that_takes_its_replies_slowly_gets_them_all(victim: Victim) -> None:
    chance = random.Random(1)
    with victim.attach("file") as slow, victim.may_grow_by(4 * MIB + SLACK):
        ranges = [(chance.randrange(FILE - 64 * KIB), 64 * KIB) for _ in range(200)]
        slow.socket.sendall(b"".join(request(READ, *where) for where in ranges))
        for number, (offset, length) in enumerate(ranges):
            assert slow.reply() == (0, 0)
            assert slow.receive(length) == victim.content[offset : offset + length]
            if number % 20 == 0:
                victim.check_service()


def test_writes_that_wait_for_a_disk_that_hangs(victim: Victim) -> None:
    """Each client holds its part, and all together what all may hold."""
    count = 10
    writes = request(WRITE, 0, payload=bytes(MIB)) * 100
    assert count * MAX_WAITING > 2 * LIMIT
    with ExitStack() as clients:
        allowed = LIMIT + count * (SMALL + 4 * MIB) + SLACK
        with victim.stopped():
            attached = [clients.enter_context(victim.attach()) for _ in range(count)]
            with victim.may_grow_by(allowed):
                sent = [victim.push(client, writes) for client in attached]
            assert all(sent)
            assert sum(sent) < allowed
        for client, begun in zip(attached, sent, strict=True):
            for _ in range(begun // len(request(WRITE, 0, payload=bytes(MIB)))):
                assert client.reply() == (0, 0)
    victim.check_service()


def test_small_requests_that_wait_keep_large_buffers_from_being_used_again(
    victim: Victim,
) -> None:
    """A write of one byte waits; one of the largest size is refused, after its data has come."""
    small = request(WRITE, 0, payload=b"x")
    refused = request(WRITE, BIG, payload=bytes(LARGEST))
    allowed = MAX_PINNED + 3 * LARGEST + SLACK
    with victim.attach() as client, victim.stopped(), victim.may_grow_by(allowed):
        taken = 0
        while victim.push(client, small + refused) == len(small + refused):
            taken += LARGEST
            assert taken <= 2 * allowed, "it is never made to wait"
    victim.check_service()


def test_announced_payloads_that_never_come_take_no_memory(victim: Victim) -> None:
    with ExitStack() as clients, victim.may_grow_by(SLACK):
        for _ in range(50):
            client = clients.enter_context(victim.attach())
            client.socket.sendall(request(WRITE, 0, LARGEST) + b"a few bytes of it")
        victim.check_service()


def test_announced_options_that_never_come_take_no_memory(victim: Victim) -> None:
    with ExitStack() as clients, victim.may_grow_by(SLACK):
        for number in range(50):
            client = clients.enter_context(victim.connect())
            client.socket.sendall(FLAGS + option(number % 16, b"half", length=LARGEST))
        victim.check_service()


def test_bytes_that_come_one_by_one(victim: Victim) -> None:
    with victim.connect() as client:
        data = random.Random(2).randbytes(100)
        whole = b"".join(
            (
                FLAGS,
                option(99, b"unknown"),
                option(OPT_LIST),
                go("big"),
                request(WRITE, 4096, payload=data, cookie=1),
                request(READ, 0, 10, cookie=2),
                request(99, cookie=3),
                request(FLUSH, cookie=4),
            )
        )
        for number in range(len(whole)):
            client.socket.sendall(whole[number : number + 1])
            if number % 10 == 0:  # so that they do arrive one by one
                victim.daemon.qmp.execute("query-status")
        client.receive(GREETING_SIZE)
        assert client.take_option_replies() == (1 << 31) + 1
        assert client.take_option_replies() == 1
        assert client.take_option_replies() == 1
        assert client.reply() == (1, 0)
        assert client.reply() == (2, 0)
        assert client.receive(10) == bytes(10)
        assert client.reply() == (3, 22)
        assert client.reply() == (4, 0)


HALVES = [
    b"",
    FLAGS[:2],
    FLAGS,
    FLAGS + option(OPT_LIST)[:11],
    FLAGS + go("big")[:-1],
    FLAGS + go("big"),
    FLAGS + go("big") + request(READ, 0, 512)[:20],
    FLAGS + go("big") + request(WRITE, 0, payload=bytes(1000))[:-1],
    FLAGS + go("big") + request(WRITE, 0, payload=bytes(MIB))[:-1],
    FLAGS + go("big") + request(READ, 0, LARGEST),
    FLAGS + go("big") + request(FLUSH) * 100,
]


def test_clients_that_stop_halfway_wait_for_nobody(victim: Victim) -> None:
    before = victim.descriptors
    with ExitStack() as clients:
        for half in HALVES * 5:
            clients.enter_context(victim.connect()).socket.sendall(half)
        victim.check_service()
    victim.wait_until(lambda: victim.descriptors == before)


def test_clients_that_vanish_leave_nothing(victim: Victim) -> None:
    before = victim.descriptors
    with victim.may_grow_by(2 * LARGEST + SLACK):
        for half in HALVES * 50:
            with victim.connect() as client:
                client.socket.sendall(half)
        victim.wait_until(lambda: victim.descriptors == before)
    victim.check_service()


def test_clients_that_vanish_with_requests_that_wait(victim: Victim) -> None:
    before = victim.descriptors
    with victim.stopped():
        for _ in range(20):
            with victim.attach() as client:
                client.send(READ, 0, MIB)
                client.send(WRITE, 0, payload=bytes(64 * KIB))
                client.send(FLUSH)
        victim.let_it_work()
    victim.wait_until(lambda: victim.descriptors == before)
    victim.check_service()


def test_thousands_of_options(victim: Victim) -> None:
    with victim.connect() as client, victim.may_grow_by(SLACK):
        client.receive(GREETING_SIZE)
        client.socket.sendall(FLAGS)
        for _ in range(MAX_OPTIONS):
            client.socket.sendall(option(OPT_LIST))
            assert client.take_option_replies() == 1
        client.socket.sendall(option(OPT_LIST))
        assert client.is_closed_by_server()
    victim.check_service()


def test_two_hundred_idle_clients(victim: Victim) -> None:
    before = victim.descriptors
    with ExitStack() as clients:
        with victim.may_grow_by(200 * 64 * KIB):
            idle = [clients.enter_context(victim.attach("file")) for _ in range(200)]
            for client in idle:
                client.send(READ, 512, 512)
                assert client.reply() == (0, 0)
                assert client.receive(512) == victim.content[512:1024]
        victim.check_service()
        for client in idle:
            client.send(FLUSH, cookie=7)
            assert client.reply() == (7, 0)
    victim.wait_until(lambda: victim.descriptors == before)


def test_one_cookie_for_all_requests(victim: Victim) -> None:
    """Telling requests apart is the client's business, so nothing of the server goes by it."""
    with victim.attach("file") as client:
        for _ in range(10):
            client.socket.sendall(request(READ, 4096, 1000, cookie=2**64 - 1) * 100)
            for _ in range(100):
                assert client.reply() == (2**64 - 1, 0)
                assert client.receive(1000) == victim.content[4096:5096]
    victim.check_service()


def test_requests_by_the_thousand(victim: Victim) -> None:
    """Good ones and bad ones in one go; each is answered, and others are served meanwhile."""
    kinds = (
        (request(READ, 0, 4096, cookie=READ_COOKIE), 0),
        (request(WRITE, 4096, payload=bytes(512)), 0),
        (request(READ, BIG, 1), 22),
        (request(FLUSH), 0),
        (request(77, 5, 5), 22),
        (request(WRITE, BIG - 1, payload=b"xy"), 28),
    )
    with victim.attach() as client, victim.may_grow_by(SLACK):
        data = b"".join(kind[0] for kind in kinds) * 1000
        sending = threading.Thread(target=client.socket.sendall, args=(data,))
        sending.start()
        victim.check_service()
        errors: list[int] = []
        for _ in range(1000 * len(kinds)):
            cookie, error = client.reply()
            errors.append(error)
            if cookie == READ_COOKIE:
                assert client.receive(4096) == bytes(4096)
        sending.join()
        assert sorted(errors) == sorted([kind[1] for kind in kinds] * 1000)
