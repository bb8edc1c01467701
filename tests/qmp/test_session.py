# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs import __version__
from nbdjobs.qmp.events import event_message
from nbdjobs.qmp.registry import Registry, command
from nbdjobs.qmp.session import Session
from nbdjobs.qmp.wire import encode
from tests.qmp.toy import TOY_REGISTRY, ToyBare, ToyContext, ToyHappened, toy_echo
from tests.qmp.wire_cases import BEFORE_NEGOTIATION, MESSAGES, OUT_OF_BAND

NEGOTIATE = b'{"execute": "qmp_capabilities"}'


def talk(*pieces: bytes, pretty: bool = False) -> list[bytes]:
    """Send pieces to a new session and return the replies."""

    async def run() -> list[bytes]:
        session = Session(TOY_REGISTRY, pretty=pretty)
        context = ToyContext()
        return [
            await session.answer(message, context)
            for piece in pieces
            for message in session.receive(piece)
        ]

    return asyncio.run(run())


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Send one request after negotiation and return the reply."""
    replies = talk(NEGOTIATE, json.dumps(request).encode())
    reply: dict[str, Any] = json.loads(replies[1])
    return reply


def test_the_greeting_says_who_answers() -> None:
    greeting = json.loads(Session(TOY_REGISTRY).greeting())
    assert greeting["QMP"]["capabilities"] == ["oob"]
    version = greeting["QMP"]["version"]
    assert version["package"] == f"nbdjobs {__version__}"
    assert (version["qemu"]["major"], version["qemu"]["minor"]) == (7, 2)


def test_the_layout_is_one_line_of_ascii() -> None:
    assert talk(NEGOTIATE) == [b'{"return": {}}\r\n']
    assert encode({"desc": "é"}) == b'{"desc": "\\u00e9"}\r\n'


def test_a_pretty_monitor_indents() -> None:
    assert talk(b'{"execute": "qmp_capabilities", "id": 1}', pretty=True) == [
        b'{\n    "return": {},\n    "id": 1\n}\r\n'
    ]


def test_negotiation_counts_for_what_follows_in_the_same_piece() -> None:
    replies = talk(NEGOTIATE + b'{"execute": "toy-echo", "arguments": {"text": "x"}}')
    assert json.loads(replies[1]) == {"return": {"text": "x"}}


def test_the_id_is_repeated_as_it_came() -> None:
    identity = {"a": [1, None, {"b": "c"}]}
    assert ask({"execute": "query-version", "id": identity})["id"] == identity
    assert ask({"execute": "toy-refuse", "id": None})["id"] is None
    assert "id" not in ask({"execute": "toy-refuse"})


def test_a_refusal_has_its_class_and_sentence() -> None:
    assert ask({"execute": "toy-refuse"})["error"] == {
        "class": "DeviceNotFound",
        "desc": "no such toy",
    }


def test_arguments_are_refused_before_any_effect() -> None:
    request = {"execute": "toy-echo", "arguments": {"text": "x", "more": 1}}
    assert ask(request)["error"]["desc"] == "Parameter 'more' is unexpected"
    request = {"execute": "toy-refuse", "arguments": {"more": 1}}
    assert ask(request)["error"]["desc"] == "Parameter 'more' is unexpected"


def test_a_broken_command_is_an_error_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        error = ask({"execute": "toy-break"})["error"]
    assert error["class"] == "GenericError"
    assert "toy is broken" in error["desc"]
    assert "ZeroDivisionError" in caplog.text


def test_deeply_nested_arguments_are_an_answerable_request() -> None:
    nested: object = 1
    for _ in range(100):
        nested = [nested]
    reply = ask({"execute": "toy-echo", "arguments": {"text": nested}, "id": nested})
    assert reply["id"] == nested
    assert "error" in reply


def test_commands_are_listed() -> None:
    listed = ask({"execute": "query-commands"})["return"]
    assert {"name": "toy-echo"} in listed
    assert [each["name"] for each in listed] == list(TOY_REGISTRY.commands)


def test_the_schema_describes_commands_and_events() -> None:
    schema = ask({"execute": "query-qmp-schema"})["return"]
    by_name = {each["name"]: each for each in schema}
    assert by_name["toy-open"]["allow-oob"] is True
    assert by_name["toy-open"]["features"] == ["unstable"]
    assert by_name["TOY_HAPPENED"]["meta-type"] == "event"
    assert by_name["TOY_BARE"]["arg-type"] == by_name["quit"]["arg-type"]


def test_quit_tells_the_context() -> None:
    async def run() -> None:
        session = Session(TOY_REGISTRY)
        session.negotiate([])
        context = ToyContext()
        [message] = session.receive(b'{"execute": "quit"}')
        assert json.loads(await session.answer(message, context)) == {"return": {}}
        assert context.has_quit

    asyncio.run(run())


def test_events_have_their_time_and_data() -> None:
    assert event_message(ToyHappened(text="x"), 1_500_000_001_234_567_890) == {
        "timestamp": {"seconds": 1_500_000_001, "microseconds": 234_567},
        "event": "TOY_HAPPENED",
        "data": {"text": "x"},
    }
    assert "data" not in event_message(ToyBare(), 0)


@given(st.lists(st.sampled_from([*MESSAGES, *OUT_OF_BAND, *BEFORE_NEGOTIATION]), max_size=5))
def test_replies_do_not_depend_on_the_pieces(messages: list[bytes]) -> None:
    data = NEGOTIATE + b"".join(messages)
    assert talk(data) == talk(*[data[i : i + 1] for i in range(len(data))])


@given(st.binary(max_size=80))
def test_any_bytes_get_replies_that_clients_can_read(data: bytes) -> None:
    for reply in talk(NEGOTIATE, data):
        assert reply.isascii()
        assert reply.endswith(b"\r\n")
        assert ("return" in json.loads(reply)) ^ ("error" in json.loads(reply))


def test_two_commands_of_one_name_are_refused() -> None:
    with pytest.raises(TypeError, match="toy-echo is declared twice"):
        Registry([toy_echo, toy_echo])
    with pytest.raises(TypeError, match="TOY_BARE is declared twice"):
        Registry([], [ToyBare, ToyBare])


def test_a_function_that_is_no_command_is_refused() -> None:
    @command("bad")
    def bad(one: object, two: ToyBare, three: ToyBare) -> None: ...

    with pytest.raises(TypeError, match="bad: a command takes"):
        Registry([bad])
    with pytest.raises(TypeError, match="not declared with @event"):
        Registry([], [ToyContext])


def test_a_command_is_still_a_function() -> None:
    assert toy_echo.name == "toy-echo"
