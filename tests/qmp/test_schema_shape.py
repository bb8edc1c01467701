# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from nbdjobs.qapi.schema import CommandShape, build_schema
from nbdjobs.qapi.visitor import to_qapi
from tests.qapi import toy_types as toy
from tests.qmp.schema_shape import Difference, differences

Schema = list[dict[str, Any]]

SCHEMA: Schema = to_qapi(build_schema([CommandShape("add", toy.Blockdev, None)], []))


def entry(schema: Schema, meta_type: str, **having: object) -> dict[str, Any]:
    """The first entry of a kind that has these values."""
    return next(
        each for each in schema if each["meta-type"] == meta_type and having.items() <= each.items()
    )


def renamed(schema: Schema) -> Schema:
    """The same schema with other type names in another order."""
    text = {each["name"]: f"t{each['name']}" for each in schema if each["name"].isdigit()}

    def change(value: Any) -> Any:
        match value:
            case dict():
                return {key: change(held) for key, held in value.items()}
            case list():
                return [change(held) for held in value]
            case str() if value.startswith("["):
                return f"[{text.get(value[1:-1], value[1:-1])}]"
        return text.get(value, value) if isinstance(value, str) else value

    changed: Schema = change(schema)
    return changed[::-1]


def test_type_names_and_order_do_not_count() -> None:
    assert differences(renamed(SCHEMA), SCHEMA) == []


def drop_a_word(schema: Schema) -> None:
    entry(schema, "enum", values=["ignore", "unmap"])["members"].pop()


def require_a_member(schema: Schema) -> None:
    members = entry(schema, "object", tag="driver")["members"]
    del next(each for each in members if each["name"] == "node-name")["default"]


def drop_a_case(schema: Schema) -> None:
    variants = entry(schema, "object", tag="driver")["variants"]
    variants.remove(next(each for each in variants if each["case"] == "raw"))


def drop_a_feature(schema: Schema) -> None:
    entry(schema, "object", features=["dynamic-auto-read-only"])["features"].clear()


def change_a_type(schema: Schema) -> None:
    members = entry(schema, "object", tag="driver")["members"]
    next(each for each in members if each["name"] == "node-name")["type"] = "int"


def drop_a_branch(schema: Schema) -> None:
    entry(schema, "alternate")["members"].pop()


#: Places where the toy types refer to a node by name or options.
REFERENCES = ("blkdebug.image", "qcow2.file", "quorum.children.[]", "raw.file")


@pytest.mark.parametrize(
    ("change", "paths"),
    [
        (drop_a_word, ["discard.unmap"]),
        (require_a_member, ["node-name"]),
        (drop_a_case, ["driver.raw"]),
        (drop_a_feature, ["driver.file"]),
        (change_a_type, ["node-name"]),
        (drop_a_branch, [f"driver.{driver}.string" for driver in REFERENCES]),
    ],
)
def test_every_difference_is_found_where_it_is(
    change: Callable[[Schema], None], paths: list[str]
) -> None:
    changed = copy.deepcopy(SCHEMA)
    change(changed)
    assert [each.path for each in differences(changed, SCHEMA)] == [f"add arg.{p}" for p in paths]


def test_a_case_that_is_missing_counts_once() -> None:
    changed = copy.deepcopy(SCHEMA)
    union = entry(changed, "object", tag="driver")
    union["variants"] = [each for each in union["variants"] if each["case"] != "raw"]
    tag = entry(changed, "enum", values=list(toy.BLOCKDEVS))
    tag["members"] = [each for each in tag["members"] if each["name"] != "raw"]
    assert differences(changed, SCHEMA) == [
        Difference("add arg.driver.raw", None, "word of object")
    ]


def test_a_command_that_is_missing_counts_once() -> None:
    assert differences([], SCHEMA) == [Difference("add", None, "command")]
    assert differences([], SCHEMA, frozenset({"del"})) == []
