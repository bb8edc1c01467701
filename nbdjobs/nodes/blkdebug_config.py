# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The configuration file of `blkdebug`: its rules in INI form.

    [inject-error]
    event = "read_aio"
    errno = "5"

    [set-state]
    event = "pwritev"
    new_state = "2"

Source: QEMU `docs/devel/blkdebug.rst`; error texts as its storage daemon gives them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from nbdjobs.errors import CommandError
from nbdjobs.nodes.blkdebug_rules import InjectError, IOType, SetState
from nbdjobs.nodes.events import DebugEvent

MAX_LENGTH: Final = 1024 * 1024
"""Longer files are not read; rules are written by hand."""

_SECTION: Final = re.compile(r"\s*\[([^\s\]]+)\]\s*")
_MEMBER: Final = re.compile(r'\s*([A-Za-z0-9_.-]+)\s+=\s*"([^"]*)"\s*')
_NUMBERS: Final = ("state", "errno", "sector")
_KEYS: Final = {
    "inject-error": {"event", "iotype", *_NUMBERS, "once", "immediately"},
    "set-state": {"event", "state", "new_state"},
}

Rule = InjectError | SetState


def read_config(path: str) -> list[Rule]:
    """The rules of a file, in its order; `CommandError` says what is wrong with it."""
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_LENGTH).decode(errors="replace")
    except OSError as error:
        raise CommandError(f"Could not read blkdebug config file: {error.strerror}") from error
    return [_rule(name, members) for name, members in _sections(text)]


def _sections(text: str) -> list[tuple[str, dict[str, str]]]:
    found: list[tuple[str, dict[str, str]]] = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if section := _SECTION.fullmatch(line):
            if section[1] not in _KEYS:
                raise CommandError(f"There is no option group '{section[1]}'")
            found.append((section[1], {}))
        elif member := _MEMBER.fullmatch(line):
            _note(found, member[1], member[2])
        else:
            raise CommandError(f"Invalid line in blkdebug config file: '{line.strip()}'")
    return found


def _note(found: list[tuple[str, dict[str, str]]], key: str, value: str) -> None:
    if not found:
        raise CommandError("no group defined")
    name, members = found[-1]
    if key not in _KEYS[name]:
        raise CommandError(f"Invalid parameter '{key}'")
    members[key] = value


def _rule(section: str, members: Mapping[str, str]) -> Rule:
    if "event" not in members:
        raise CommandError("Missing event name for rule")
    try:
        event = DebugEvent(members["event"])
        iotype = IOType(members["iotype"]) if "iotype" in members else None
    except ValueError as error:
        wrong = members["event"] if members["event"] not in list(DebugEvent) else members["iotype"]
        raise CommandError(f"invalid parameter value: {wrong}") from error
    numbers = {key: _number(key, members[key]) for key in _NUMBERS if key in members}
    if section == "set-state":
        new_state = _number("new_state", members.get("new_state", "0"))
        return SetState(event=event, state=numbers.get("state", 0), new_state=new_state)
    return InjectError(
        event=event,
        iotype=iotype,
        once=_switch("once", members.get("once", "off")),
        immediately=_switch("immediately", members.get("immediately", "off")),
        **numbers,
    )


def _number(key: str, text: str) -> int:
    try:
        return int(text, 0)
    except ValueError as error:
        raise CommandError(f"Parameter '{key}' expects a number") from error


def _switch(key: str, text: str) -> bool:
    match text:
        case "on" | "yes" | "true" | "y":
            return True
        case "off" | "no" | "false" | "n":
            return False
        case _:
            raise CommandError(f"Parameter '{key}' expects 'on' or 'off'")
