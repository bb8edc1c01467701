# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Compares a table of a configuration file with the QAPI type that it describes. Pure.

QAPI's own visitor stops at the first error, as clients of QMP expect. Whoever writes a file wants
all of them, with the place of each, what was expected there, and what a misspelt key may have
meant.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, assert_never

from nbdjobs.cli.units import parse_size
from nbdjobs.qapi.model import (
    AlternateType,
    AnyType,
    ArrayType,
    BoolType,
    EnumType,
    IntType,
    Member,
    NullType,
    NumberType,
    ObjectType,
    QapiType,
    SizeType,
    StrType,
    members_of,
)
from nbdjobs.qapi.types import INT64_MAX, UINT64_MAX, IntRange, UnionInfo, union_of

#: Keys that TOML takes without quotes.
_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")

#: How the choice between a node's name and a node is called (QAPI).
_NODE_REFERENCE: Final = "BlockdevRef"

_BYTES: Final = IntType(IntRange("size", 0, UINT64_MAX))

#: Types of TOML as its users know them, the special ones first: true is an int to Python.
_KINDS: Final = (
    (bool, "true or false"),
    ((int, float), "a number"),
    (str, "a string"),
    (list, "a list"),
    (dict, "a table"),
)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in a configuration.

    Attributes:
        path: The key, from the outermost table, as TOML writes it.
        text: What is wrong with it, and what was expected.
    """

    path: str
    text: str

    def __str__(self) -> str:
        """The sentence for the user."""
        return f"{self.path}: {self.text}" if self.path else self.text


def below(path: str, key: str) -> str:
    """The path of a key in the table at `path`."""
    quoted = (
        key if _BARE.fullmatch(key) else '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'
    )
    return f"{path}.{quoted}" if path else quoted


def suggest(word: str, known: Iterable[str]) -> str:
    """What could have been meant, as the end of a sentence: the closest word, or all of them."""
    words = list(known)
    close = difflib.get_close_matches(word, words, n=1)
    if close:
        return f", did you mean '{close[0]}'?"
    return f", expected one of {', '.join(words)}" if words else ""


def kind_of(value: object) -> str:
    """What a TOML value is, for messages."""
    return next((name for types, name in _KINDS if isinstance(value, types)), "a date or time")


@dataclass
class Walk:
    """One walk over a configuration, which goes on behind whatever is wrong.

    Attributes:
        problems: All that is wrong, in the order of the file's tables.
        references: Nodes that are referred to by name: where, and which.
        inline: Where nodes are written inside others, by their names.
    """

    problems: list[Problem] = field(default_factory=list)
    references: list[tuple[str, str]] = field(default_factory=list)
    inline: dict[str, str] = field(default_factory=dict)

    def complain(self, path: str, text: str) -> None:
        """Note that something is wrong."""
        self.problems.append(Problem(path, text))

    def table(
        self,
        cls: type,
        value: object,
        path: str,
        *,
        refused: Mapping[str, str] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Read a table as a struct or flat union.

        Args:
            cls: The dataclass that declares it.
            value: What stands in the file.
            path: Where.
            refused: Keys that nobody writes although some of them are members, and why.

        Returns:
            The value in JSON's types, with sizes as numbers; of no use where there are problems.
        """
        if not isinstance(value, dict):
            self._expected("a table", value, path)
            return {}
        declared = self._members(cls, value, path)
        if declared is None:
            return {}
        read: dict[str, Any] = {}
        for key, content in value.items():
            here = below(path, key)
            if key in refused:
                self.complain(here, f"unknown key: {refused[key]}")
            elif key in declared:
                read[key] = self.read(declared[key].type, content, here)
            else:
                known = [name for name in declared if name not in refused]
                self.complain(here, f"unknown key{suggest(key, known)}")
        for name, member in declared.items():
            if not (member.is_optional or name in value or name in refused):
                self.complain(
                    path, f"the key '{name}' is missing: expected {expected(member.type)}"
                )
        return read

    def _members(self, cls: type, value: dict[str, Any], path: str) -> dict[str, Member] | None:
        """The members that a table may have; None if nobody can know."""
        union = union_of(cls)
        branch = cls if union is None else self._branch(union, value, path)
        if branch is None:
            return None
        return {member.name: member for member in members_of(branch)}

    def _branch(self, union: UnionInfo, value: dict[str, Any], path: str) -> type | None:
        branches = union.branches()
        if union.tag not in value:
            self.complain(
                path, f"the key '{union.tag}' is missing: expected one of {', '.join(branches)}"
            )
            return None
        tag = value[union.tag]
        if not isinstance(tag, str):
            self._expected("a string", tag, below(path, union.tag))
            return None
        if tag not in branches:
            text = f"there is no '{tag}'{suggest(tag, branches)}"
            self.complain(below(path, union.tag), text)
        return branches.get(tag)

    def read(self, type_: QapiType, value: Any, path: str) -> Any:
        """Read a value as a type; what is returned is of no use where there are problems."""
        match type_:
            case ObjectType():
                return self._object(type_.cls, value, path)
            case AlternateType():
                return self._alternate(type_, value, path)
            case ArrayType():
                return self._list(type_, value, path)
            case EnumType():
                self._check_word(type_, value, path)
            case SizeType():
                return self._integer(_BYTES, value, path)
            case IntType():
                return self._integer(type_, value, path)
            case StrType() | BoolType() | NumberType() | NullType():
                if not _fits(type_, value):
                    self._expected(expected(type_), value, path)
            case AnyType():
                pass
            case _:
                assert_never(type_)
        return value

    def _object(self, cls: type, value: Any, path: str) -> dict[str, Any]:
        read = self.table(cls, value, path)
        name = read.get("node-name")
        if isinstance(name, str):
            self.inline[name] = path
        return read

    def _alternate(self, type_: AlternateType, value: Any, path: str) -> Any:
        if value == "" and NullType() in type_.branches:
            return None  # TOML has no null; an option's value is null when it is empty, too
        for branch in type_.branches:
            if _fits(branch, value):
                if type_.name.startswith(_NODE_REFERENCE) and isinstance(value, str):
                    self.references.append((path, value))
                return self.read(branch, value, path)
        self._expected(expected(type_), value, path)
        return value

    def _list(self, type_: ArrayType, value: Any, path: str) -> list[Any]:
        if not isinstance(value, list):
            self._expected("a list", value, path)
            return []
        return [
            self.read(type_.element, element, f"{path}[{number}]")
            for number, element in enumerate(value)
        ]

    def _check_word(self, type_: EnumType, value: Any, path: str) -> None:
        if not isinstance(value, str):
            self._expected(expected(type_), value, path)
        elif value not in [word.value for word in type_.enum]:
            words = [word.value for word in type_.enum]
            self.complain(path, f"there is no '{value}'{suggest(value, words)}")

    def _integer(self, type_: IntType, value: Any, path: str) -> int:
        low, high = type_.limits.low, type_.limits.high
        if isinstance(value, str) and _may_be_bytes(type_):
            return self._size(value, path)
        if not _fits(type_, value):
            self._expected(expected(type_), value, path)
        elif not low <= value <= high:
            self.complain(path, f"{value} is out of range: expected {low} to {high}")
        else:
            return int(value)
        return 0

    def _size(self, value: str, path: str) -> int:
        try:
            return parse_size(value)
        except ValueError as error:
            self.complain(path, str(error))
            return 0

    def _expected(self, what: str, value: object, path: str) -> None:
        self.complain(path, f"expected {what}, not {kind_of(value)}")


def expected(type_: QapiType) -> str:
    """What a type takes, for messages."""
    match type_:
        case ObjectType():
            return "a table"
        case AlternateType():
            return " or ".join(dict.fromkeys(expected(branch) for branch in type_.branches))
        case ArrayType():
            return "a list"
        case EnumType():
            return f"one of {', '.join(word.value for word in type_.enum)}"
        case IntType() | SizeType() if _may_be_bytes(type_):
            return 'a number such as 65536 or "64K"'
        case IntType() | SizeType() | NumberType():
            return "a number"
        case BoolType():
            return "true or false"
        case StrType():
            return "a string"
        case NullType() | AnyType():
            return "a value"
        case _:
            assert_never(type_)


def _may_be_bytes(type_: IntType | SizeType) -> bool:
    """Whether it may be a number of bytes, which people write with a unit: QAPI rarely tells."""
    return isinstance(type_, SizeType) or type_.limits.high >= INT64_MAX


def _fits(type_: QapiType, value: object) -> bool:
    """Whether a TOML value has the right kind for a type."""
    match type_:
        case ObjectType():
            return isinstance(value, dict)
        case AlternateType():
            return any(_fits(branch, value) for branch in type_.branches)
        case ArrayType():
            return isinstance(value, list)
        case EnumType() | StrType():
            return isinstance(value, str)
        case BoolType():
            return isinstance(value, bool)
        case IntType() | SizeType():
            return isinstance(value, int) and not isinstance(value, bool)
        case NumberType():
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case NullType():
            return False  # TOML has no null
        case AnyType():
            return True
        case _:
            assert_never(type_)
