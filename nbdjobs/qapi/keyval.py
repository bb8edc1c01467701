# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Reads options of the form `key=value,key.sub=value,list.0=value`.

The result is nested dicts and lists of strings, which the visitor turns into typed options.

    text     = [ param { "," param } [ "," ] ]
    param    = key "=" value | "help" | "?"
    key      = name { "." ( name | index ) }
    value    = characters, a comma written twice

The first parameter may lack its key when the option has an implied one (`raw,file=...`).

Source: behaviour and error texts of qemu-storage-daemon 7.2
(tests/interop/test_qapi_texts.py).
"""

from __future__ import annotations

import re
from typing import Final

from nbdjobs.errors import CommandError
from nbdjobs.qapi.jsonparse import JsonValue, parse_json

MAX_FRAGMENT: Final = 127
"""Longest part of a key between dots, in characters, as in QEMU."""

MAX_DEPTH: Final = 64
"""Most parts of a key; bounds recursion here and in the visitor."""

_NAME: Final = re.compile(r"(?:__[A-Za-z0-9.-]*_)?[A-Za-z][A-Za-z0-9_-]*")
_INDEX: Final = re.compile(r"[0-9]+")
_KEY_END: Final = re.compile(r"[=,]|$")
_HELP: Final = frozenset({"help", "?"})


class HelpRequestError(CommandError):
    """The text asks for help (`help` or `?`); the caller shows it or prints this sentence."""

    def __init__(self) -> None:
        super().__init__("Help is not available for this option")


def parse_option(text: str, *, implied_key: str | None = None) -> tuple[JsonValue, bool]:
    """Read an option that is JSON when it starts with `{` and key=value text otherwise.

    Args:
        text: What the user wrote.
        implied_key: Key of a first parameter without one, such as `driver`.

    Returns:
        The value, and whether it comes from key=value text, which is the `keyval` argument
        of `visitor.visit`.

    Raises:
        CommandError: The text is malformed.
        HelpRequestError: The text asks for help.
    """
    if text.startswith("{"):
        return parse_json(text), False
    return parse_keyval(text, implied_key=implied_key), True


def parse_keyval(text: str, *, implied_key: str | None = None) -> JsonValue:
    """Read key=value text; see `parse_option`."""
    root: dict[str, JsonValue] = {}
    wants_help = False
    position = 0
    while position < len(text):
        key, position = _read_key(text, position)
        if position < len(text) and text[position] == "=":
            path = _path(key)
            value, position = _read_value(text, position + 1)
            _store(root, path, value)
            implied_key = None
            continue
        position += 1
        if key in _HELP:
            wants_help = True
        elif implied_key is not None and key:
            _store(root, _path(implied_key), key)
        else:
            _path(key)
            raise CommandError(f"Expected '=' after parameter '{key}'")
        implied_key = None
    if wants_help:
        raise HelpRequestError
    return {name: _listify(value, name) for name, value in root.items()}


def _read_key(text: str, position: int) -> tuple[str, int]:
    end = _KEY_END.search(text, position)
    assert end is not None, "the pattern matches at the end of any text"
    return text[position : end.start()], end.start()


def _read_value(text: str, position: int) -> tuple[str, int]:
    """A value up to a single comma, and the position behind that comma."""
    parts: list[str] = []
    while True:
        comma = text.find(",", position)
        if comma < 0:
            return "".join([*parts, text[position:]]), len(text)
        if text[comma + 1 : comma + 2] != ",":
            return "".join([*parts, text[position:comma]]), comma + 1
        parts.append(text[position : comma + 1])
        position = comma + 2


def _path(key: str) -> list[str]:
    """The names and indexes that `key` strings together."""
    fragments: list[str] = []
    position = 0
    while True:
        match = _NAME.match(key, position)
        if match is None and fragments:
            match = _INDEX.match(key, position)
        if match is None or key[match.end() : match.end() + 1] not in ("", "."):
            raise CommandError(f"Invalid parameter '{key}'")
        if len(match[0]) > MAX_FRAGMENT or len(fragments) == MAX_DEPTH:
            raise CommandError(f"Parameter '{key[: match.end()]}' is too long")
        fragments.append(match[0])
        if match.end() == len(key):
            return fragments
        position = match.end() + 1


def _store(root: dict[str, JsonValue], path: list[str], value: str) -> None:
    """Put `value` where `path` says; the last one of several wins."""
    node = root
    for depth, fragment in enumerate(path[:-1], start=1):
        child = node.setdefault(_canonical(fragment), {})
        if not isinstance(child, dict):
            raise _inconsistent(".".join(path[:depth]))
        node = child
    last = _canonical(path[-1])
    if isinstance(node.get(last), dict):
        raise _inconsistent(".".join(path))
    node[last] = value


def _canonical(fragment: str) -> str:
    """One spelling per index, so that `a.0` and `a.00` are the same."""
    return fragment.lstrip("0") or "0" if fragment.isdecimal() else fragment


def _inconsistent(path: str) -> CommandError:
    return CommandError(f"Parameters '{path}.*' used inconsistently")


def _listify(value: JsonValue, path: str) -> JsonValue:
    """Turn dicts whose keys are indexes into lists."""
    if not isinstance(value, dict):
        return value
    done = {key: _listify(child, f"{path}.{key}") for key, child in value.items()}
    is_index = [key.isdecimal() for key in done]
    if not any(is_index):
        return done
    if not all(is_index):
        raise _inconsistent(path)
    for index in range(len(done)):
        if str(index) not in done:
            raise CommandError(f"Parameter '{path}.{index}' missing")
    return [done[str(index)] for index in range(len(done))]
