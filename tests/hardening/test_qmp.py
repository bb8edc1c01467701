# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""QMP clients that do what no client should: memory stays bounded, and the next one is served."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack
from typing import Any

import pytest

from nbdjobs.qapi.jsonparse import DEFAULT_LIMITS
from tests.hardening.victim import KIB, MIB, SLACK, Victim

CAPABILITIES = b'{"execute": "qmp_capabilities"}'
STATUS = b'{"execute": "query-status"}'

#: What a message may cost while it is read: its bytes, tokens and values.
ONE_MESSAGE = 2 * DEFAULT_LIMITS.size + SLACK


class Talk:
    """The messages that a monitor sends."""

    def __init__(self, monitor: socket.socket):
        self._lines = monitor.makefile("rb")

    def take(self) -> Any:
        return json.loads(self._lines.readline())

    def close(self) -> None:
        self._lines.close()


def push(monitor: socket.socket, data: bytes, times: int) -> None:
    """Send the data many times; the daemon takes all of it."""
    for _ in range(times):
        monitor.sendall(data)


ENDLESS = {
    "a string": (b'{"execute": "', b"x" * MIB),
    "an escaped string": (b'"', b"\\u0041" * (MIB // 6)),
    "a number": (b"", b"1" * MIB),
    "a word": (b"", b"a" * MIB),
    "nesting": (b"", b"[" * MIB),
    "nested objects": (b"", b'{"a":' * (MIB // 5)),
    "an array": (b"[1", b",1" * (MIB // 2)),
    "an object": (b'{"a":1', b',"a":1' * (MIB // 6)),
    "spaces": (b"", b" " * MIB),
    "what is no JSON": (b"", b"\xff" * MIB),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_input_without_end(victim: Victim, kind: str) -> None:
    begin, more = ENDLESS[kind]
    with victim.monitor() as monitor, victim.may_grow_by(ONE_MESSAGE):
        # Its answers, if any, are errors, and are not read: that must not matter either.
        monitor.settimeout(0.0)
        sent = 0
        for _ in range(24):
            for data in (begin, more) if not sent else (more,):
                victim_takes = send_some(victim, monitor, data)
                sent += victim_takes
        assert sent
        victim.check_service()
    victim.check_service()


def send_some(victim: Victim, monitor: socket.socket, data: bytes) -> int:
    """Send, with pauses in which the daemon works; give up what it does not take."""
    sent = 0
    for _ in range(100):
        try:
            sent += monitor.send(data[sent:])
        except BlockingIOError:
            victim.daemon.qmp.execute("query-status")
        if sent == len(data):
            break
    return sent


def test_a_session_goes_on_after_a_message_that_was_too_long(victim: Victim) -> None:
    with victim.monitor() as monitor:
        talk = Talk(monitor)
        assert "QMP" in talk.take()
        monitor.sendall(b'{"execute": "' + b"x" * DEFAULT_LIMITS.size + b'"}' + CAPABILITIES)
        replies = [talk.take()]
        while "error" in replies[-1]:
            replies.append(talk.take())
        assert replies[-1] == {"return": {}}
        assert len(replies) >= 2
        talk.close()


@pytest.mark.parametrize("depth", [1000, 100_000])
def test_deep_nesting_is_refused_and_the_session_goes_on(victim: Victim, depth: int) -> None:
    with victim.monitor() as monitor:
        talk = Talk(monitor)
        talk.take()
        nested = b'{"execute": "x", "arguments": {"a": ' + b"[" * depth + b"]" * depth + b"}}"
        monitor.sendall(nested + b"\n" + CAPABILITIES)
        reply = talk.take()
        while "error" in reply:
            reply = talk.take()
        assert reply == {"return": {}}
        talk.close()


def test_sessions_that_stop_halfway(victim: Victim) -> None:
    before = victim.descriptors
    halves = [b"", b"{", CAPABILITIES[:-1], CAPABILITIES, CAPABILITIES + b'{"execute": "query-']
    with ExitStack() as monitors, victim.may_grow_by(SLACK):
        for half in halves * 10:
            monitors.enter_context(victim.monitor()).sendall(half)
        victim.check_service()
    victim.wait_until(lambda: victim.descriptors == before)


def test_sessions_that_vanish(victim: Victim) -> None:
    before = victim.descriptors
    with victim.may_grow_by(SLACK):
        for data in [b"", b"[", CAPABILITIES, CAPABILITIES + STATUS * 100] * 25:
            with victim.monitor() as monitor:
                monitor.sendall(data)
            victim.daemon.qmp.execute("query-status")
        victim.wait_until(lambda: victim.descriptors == before)
    victim.check_service()


def test_bytes_that_come_one_by_one(victim: Victim) -> None:
    with victim.monitor() as monitor:
        talk = Talk(monitor)
        talk.take()
        for number, byte in enumerate(CAPABILITIES + STATUS):
            monitor.sendall(bytes([byte]))
            if number % 5 == 0:
                victim.daemon.qmp.execute("query-status")
        assert talk.take() == {"return": {}}
        assert talk.take()["return"]["running"]
        talk.close()


def test_commands_by_the_thousand(victim: Victim) -> None:
    count = 5000
    with victim.monitor() as monitor, victim.may_grow_by(SLACK):
        talk = Talk(monitor)
        talk.take()
        monitor.sendall(CAPABILITIES)
        assert talk.take() == {"return": {}}
        monitor.settimeout(0.0)
        commands = b"".join(b'{"execute":"query-status","id":%d}' % n for n in range(count))
        sent = send_some(victim, monitor, commands)
        victim.check_service()
        monitor.settimeout(60)
        answered = 0
        while answered < count:
            reply = talk.take()
            assert reply["id"] == answered
            answered += 1
            if sent < len(commands):
                sent += monitor.send(commands[sent : sent + 4 * KIB])
        talk.close()


def test_a_client_that_takes_no_replies(victim: Victim) -> None:
    """Its commands are not even executed any more; it is not read."""
    with victim.monitor() as monitor, victim.may_grow_by(4 * MIB + SLACK):
        monitor.settimeout(0.0)
        monitor.send(CAPABILITIES)
        sent = send_some(victim, monitor, b'{"execute": "query-qmp-schema"}' * 100_000)
        assert sent < 2 * MIB
        victim.check_service()


def test_a_client_that_takes_no_events(victim: Victim) -> None:
    """They pile up for a while, and then the client is dropped; others get all of theirs."""
    with victim.monitor() as deaf, victim.may_grow_by(8 * MIB + SLACK):
        deaf.sendall(CAPABILITIES)
        victim.let_it_work()
        before = victim.descriptors
        qmp = victim.daemon.qmp
        for _ in range(100):
            qmp.execute("stop")
            qmp.execute("cont")
        events = [event["event"] for event in qmp.events]
        assert events.count("STOP") == events.count("RESUME") == 100
        assert victim.descriptors == before
        victim.check_service()
