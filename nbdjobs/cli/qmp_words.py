# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""QMP commands as people type them, and what may come next. Pure.

    blockdev-add driver=file node-name=disk filename=/a,b.img cache.direct=on
    blockdev-add '{"driver": "file", "node-name": "disk", "filename": "/a,b.img"}'
    block-export-add id=e type=nbd node-name=disk bitmaps='["a"]'

The schema says which type an argument has, so `node-name=1` is the string "1" where a guess would
make it a number. Names with dots are members of members, numbers in them are places in lists.
What the schema does not know is sent as it looks: the server refuses better than we could.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from nbdjobs.cli.exits import CliError
from nbdjobs.cli.qmp_schema import Entry, Schema
from nbdjobs.errors import CommandError
from nbdjobs.qapi.keyval import parse_keyval

_BOOLEANS: Final = {
    **dict.fromkeys(("on", "yes", "true", "y"), True),
    **dict.fromkeys(("off", "no", "false", "n"), False),
}


def read_arguments(schema: Schema, command: str, words: Sequence[str]) -> dict[str, Any]:
    """Turn what follows a command's name into its arguments.

    Args:
        schema: Of the server.
        command: Its name.
        words: Each `name=value`, or a JSON object with several arguments.

    Raises:
        CliError: A word is neither, or a value is not of its argument's type.
    """
    arguments: dict[str, Any] = {}
    pairs = []
    for word in words:
        if word.lstrip().startswith("{"):
            arguments.update(_json_object(word))
        elif "=" in word:
            pairs.append(word)
        else:
            raise CliError(f"'{word}' is not an argument: expected NAME=VALUE or a JSON object")
    typed = schema.arguments_of(command)
    given = _nested(pairs)
    tag = given.get(typed.get("tag", ""), arguments.get(typed.get("tag", "")))
    members = schema.members(typed, tag)
    for name, value in given.items():
        arguments[name] = _convert(schema, members.get(name), value, name)
    return arguments


def complete(schema: Schema, before: Sequence[str], word: str) -> list[str]:
    """Return what a word may become.

    Args:
        schema: Of the server.
        before: The words before it; the first is a command.
        word: Its beginning, which may be empty.

    Returns:
        Whole words, sorted. One that is complete ends in a blank; the name of an argument ends
        in `=`, or in a dot when its members come next.
    """
    if not before:
        return [f"{name} " for name in schema.commands if name.startswith(word)]
    name, equals, value = word.partition("=")
    path = name.split(".")
    given = _readable(before[1:])
    typed = schema.arguments_of(before[0])
    for part in path[:-1]:
        member = _member(schema, typed, given, part)
        if member is None:
            return []
        below = given.get(part)
        typed, given = member, below if isinstance(below, dict) else {}
    prefix = "".join(f"{part}." for part in path[:-1])
    if equals:
        member = _member(schema, typed, given, path[-1])
        words = schema.words(member) if member is not None else []
        return sorted(f"{name}={each} " for each in words if each.startswith(value))
    return sorted(
        f"{prefix}{each}{_ending(schema, member)}"
        for each, member in _members(schema, typed, given).items()
        if each.startswith(path[-1]) and not isinstance(given.get(each), str)
    )


def _members(schema: Schema, typed: Entry, given: Mapping[str, Any]) -> dict[str, Entry]:
    object_type = schema.as_object(typed)
    return schema.members(object_type, given.get(object_type.get("tag", "")))


def _member(schema: Schema, typed: Entry, given: Mapping[str, Any], name: str) -> Entry | None:
    if typed["meta-type"] == "array":
        return schema.element(typed) if name.isdecimal() else None
    return _members(schema, typed, given).get(name)


def _ending(schema: Schema, member: Entry) -> str:
    """An object can only be written by its members; an alternate also as a word."""
    return "." if member["meta-type"] == "object" else "="


def _readable(words: Sequence[str]) -> dict[str, Any]:
    """What is already there, as far as it can be understood: it may be half written."""
    try:
        return _nested([word for word in words if "=" in word])
    except CliError:
        return {}


def _nested(pairs: Sequence[str]) -> dict[str, Any]:
    """Read `a.b=c` words into nested dicts and lists of strings."""
    text = ",".join(pair.replace(",", ",,") for pair in pairs)
    try:
        found = parse_keyval(text)
    except CommandError as error:
        raise CliError(f"the arguments cannot be read: {error}") from error
    assert isinstance(found, dict)
    return found


def _json_object(word: str) -> dict[str, Any]:
    value = _json(word)
    if not isinstance(value, dict):
        raise CliError(f"'{word}' is not a JSON object")
    return value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CliError(f"'{text}' is not JSON: {error}") from error


def _convert(schema: Schema, type_: Entry | None, value: Any, place: str) -> Any:
    """Turn strings into what the type asks for."""
    if isinstance(value, dict):
        return _convert_object(schema, type_, value, place)
    if isinstance(value, list):
        is_array = type_ is not None and type_["meta-type"] == "array"
        element = schema.element(type_) if type_ is not None and is_array else None
        return [
            _convert(schema, element, each, f"{place}.{index}") for index, each in enumerate(value)
        ]
    if type_ is None:
        return _guess(value)
    match type_["meta-type"]:
        case "enum":
            return value
        case "alternate":
            return _convert_alternate(schema, type_, value, place)
        case "object" | "array":
            if value[:1] not in ("{", "["):
                members = "its members or " if type_["meta-type"] == "object" else ""
                raise CliError(f"'{value}' is not a value for '{place}': expected {members}JSON")
            return _json(value)
        case _:
            return _convert_scalar(type_["json-type"], value, place)


def _convert_object(
    schema: Schema, type_: Entry | None, value: Mapping[str, Any], place: str
) -> dict[str, Any]:
    members = {} if type_ is None else _members(schema, type_, value)
    return {
        name: _convert(schema, members.get(name), each, f"{place}.{name}")
        for name, each in value.items()
    }


def _convert_alternate(schema: Schema, type_: Entry, value: str, place: str) -> Any:
    """The first branch that can be written as one word, or JSON for the others."""
    branches = schema.branches(type_)
    if value[:1] in ("{", "["):
        return _json(value)
    for branch in branches:
        if branch.get("json-type") == "string" or value in schema.words(branch):
            return value
    for branch in branches:
        if branch["meta-type"] == "builtin" and branch["json-type"] != "null":
            return _convert_scalar(branch["json-type"], value, place)
    return _guess(value)


def _convert_scalar(json_type: str, value: str, place: str) -> Any:
    try:
        match json_type:
            case "string":
                return value
            case "int":
                return int(value, 0)
            case "number":
                return float(value)
            case "boolean":
                return _BOOLEANS[value]
            case "null":
                return None
            case _:
                return _guess(value)
    except (ValueError, KeyError) as error:
        expected = {"int": "a whole number", "number": "a number", "boolean": "on or off"}
        raise CliError(
            f"'{value}' is not a value for '{place}': expected {expected[json_type]}"
        ) from error


def _guess(value: str) -> Any:
    """JSON where it is JSON, else the text itself."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
