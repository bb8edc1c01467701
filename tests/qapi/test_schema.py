# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from nbdjobs.qapi.model import ArrayType, ObjectType, describe
from nbdjobs.qapi.schema import CommandShape, EventShape, build_schema
from nbdjobs.qapi.visitor import to_qapi
from tests.qapi import toy_types as toy


def schema(*commands: CommandShape, events: tuple[EventShape, ...] = ()) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = to_qapi(build_schema(commands, events))
    return result


def entry(entries: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return {each["name"]: each for each in entries}[name]


def member(described: dict[str, Any], name: str) -> dict[str, Any]:
    return entry(described["members"], name)


def test_commands_come_first_and_types_in_the_order_of_use() -> None:
    entries = schema(
        CommandShape("b", toy.Cache, None, ("unstable",), allow_oob=True),
        CommandShape("a", None, ArrayType(ObjectType(toy.Cache), list)),
        events=(EventShape("E", toy.InjectError),),
    )
    assert entries[:3] == [
        {
            "name": "b",
            "meta-type": "command",
            "arg-type": "1",
            "ret-type": "0",
            "allow-oob": True,
            "features": ["unstable"],
        },
        {"name": "a", "meta-type": "command", "arg-type": "0", "ret-type": "[1]"},
        {"name": "E", "meta-type": "event", "arg-type": "2"},
    ]
    names = [each["name"] for each in entries[3:]]
    assert names == ["0", "1", "[1]", "2", "bool", "3", "int"]
    assert entry(entries, "0") == {"name": "0", "meta-type": "object", "members": []}


def test_members_say_their_name_type_and_whether_they_are_optional() -> None:
    entries = schema(CommandShape("x", toy.Odd, None))
    odd = entry(entries, entry(entries, "x")["arg-type"])
    assert odd["members"] == [
        {"name": "small", "type": "int", "default": None},
        {"name": "middle", "type": "int", "default": None},
        {"name": "ratio", "type": "number", "default": None},
        {"name": "anything", "type": "any", "default": None},
        {"name": "bps_max", "type": "int", "default": None, "features": ["unstable"]},
        {"name": "words", "type": "[str]", "default": None},
    ]
    assert entry(entries, "any") == {"name": "any", "meta-type": "builtin", "json-type": "value"}
    assert entry(entries, "[str]") == {
        "name": "[str]",
        "meta-type": "array",
        "element-type": "str",
    }


def test_a_union_has_a_tag_of_its_own_and_branches_without_the_base() -> None:
    entries = schema(CommandShape("x", toy.Blockdev, None))
    union = entry(entries, entry(entries, "x")["arg-type"])
    assert union["tag"] == "driver"
    tag = entry(entries, member(union, "driver")["type"])
    assert tag["values"] == list(toy.BLOCKDEVS)
    assert [variant["case"] for variant in union["variants"]] == list(toy.BLOCKDEVS)
    types = {variant["case"]: variant["type"] for variant in union["variants"]}
    assert types["null-co"] == types["null-aio"]
    file = entry(entries, types["file"])
    assert file["members"] == [{"name": "filename", "type": "str"}]
    assert file["features"] == ["dynamic-auto-read-only"]


def test_a_type_inside_itself_is_described_once() -> None:
    entries = schema(CommandShape("x", toy.Blockdev, None))
    union = entry(entries, "x")["arg-type"]
    types = {each["case"]: each["type"] for each in entry(entries, union)["variants"]}
    reference = entry(entries, member(entry(entries, types["raw"]), "file")["type"])
    assert reference["meta-type"] == "alternate"
    assert reference["members"] == [{"type": union}, {"type": "str"}]
    assert len({each["name"] for each in entries}) == len(entries)


def test_every_type_that_is_named_is_described() -> None:
    entries = schema(CommandShape("x", toy.Blockdev, None), CommandShape("y", toy.Export, None))
    names = {each["name"] for each in entries}
    for each in entries:
        used = [m["type"] for m in each.get("members", []) if "type" in m]
        used += [variant["type"] for variant in each.get("variants", [])]
        used += [each[key] for key in ("arg-type", "ret-type", "element-type") if key in each]
        assert names.issuperset(used)


def test_what_means_nothing_in_qapi_is_refused() -> None:
    @dataclass
    class Bad:
        values: dict[str, int]

    for hint in (dict[str, int], int | str, set[str], tuple[int, str], complex):
        with pytest.raises(TypeError):
            describe(hint)
    with pytest.raises(TypeError):
        schema(CommandShape("x", Bad, None))
