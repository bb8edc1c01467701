# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Turns decoded JSON or key=value options into typed options, and typed values back.

What is refused is refused in the order and the words that clients know: declared members
first, in their order, then members that nobody declared. Two names appear in these texts:
the path from the root (`file.cache.direct`, `children[0]`) and, for a value of the right
JSON type that is still not allowed, only the member's own name. A list element has no name
of its own and is called `null`.

Source: error texts of qemu-storage-daemon 7.2 (tests/interop/test_qapi_texts.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum, StrEnum
from typing import Any, TypeVar, assert_never

from nbdjobs.errors import CommandError
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
    describe,
    members_of,
)
from nbdjobs.qapi.numbers import parse_bool, parse_integer, parse_number, parse_size
from nbdjobs.qapi.types import INT64_MAX, INT64_MIN, NULL, UINT64_MAX, IntRange, UnionInfo, union_of

T = TypeVar("T")


def visit(type_: type[T], value: object, *, keyval: bool = False) -> T:
    """Read `value` as a struct or flat union.

    Args:
        type_: The dataclass to make; for a flat union, its base, and the result is an
            instance of the branch.
        value: A decoded JSON object, or what `keyval.parse_keyval` returned.
        keyval: `value` is from key=value text: all scalars are strings.

    Raises:
        CommandError: A member is missing, unexpected, ill-typed or out of range.
    """
    result: T = _Visitor(keyval).visit(describe(type_), value, _Place("", None))
    return result


def to_qapi(value: object) -> Any:
    """The JSON form of a typed value: QAPI names, without the members that are None."""
    match value:
        case Enum():
            return value.value
        case list() | tuple():
            return [to_qapi(element) for element in value]
        case Mapping():
            return {key: to_qapi(element) for key, element in value.items()}
    if isinstance(value, type) or not is_dataclass(value):
        return value
    cls: type = type(value)
    pairs = ((member.name, getattr(value, member.attribute)) for member in members_of(cls))
    return {name: to_qapi(held) for name, held in pairs if held is not None}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in the input a value stands.

    Attributes:
        path: Its name from the root.
        name: Its own name, or None for a list element.
    """

    path: str
    name: str | None

    @property
    def own_name(self) -> str:
        return self.name if self.name is not None else "null"

    def member(self, name: str) -> _Place:
        return _Place(f"{self.path}.{name}" if self.path else name, name)

    def wrong_type(self, expected: str) -> CommandError:
        return CommandError(f"Invalid parameter type for '{self.path}', expected: {expected}")

    def expects(self, expected: str) -> CommandError:
        return CommandError(f"Parameter '{self.path}' expects {expected}")


class _Visitor:
    """The walk over one input; a method per kind of type."""

    def __init__(self, keyval: bool) -> None:
        self._keyval = keyval

    def visit(self, type_: QapiType, value: Any, place: _Place) -> Any:
        match type_:
            case ObjectType():
                return self._object(type_.cls, value, place)
            case AlternateType():
                return self._alternate(type_, value, place)
            case ArrayType():
                return self._array(type_, value, place)
            case StrType():
                return _string(value, place)
            case EnumType():
                return _enum(type_.enum, value, place)
            case BoolType():
                return self._bool(value, place)
            case IntType():
                return self._integer(type_.limits, value, place)
            case SizeType():
                return self._size(value, place)
            case NumberType():
                return self._number(value, place)
            case NullType():
                return self._null(value, place)
            case AnyType():
                return value
            case _:
                assert_never(type_)

    def _object(self, cls: type, value: Any, place: _Place) -> Any:
        if not isinstance(value, dict):
            raise place.wrong_type("object")
        union = union_of(cls)
        members = members_of(cls)
        attributes: dict[str, Any] = {}
        branch = cls
        for member in members:
            self._member(member, value, place, attributes)
            if union is not None and member.name == union.tag:
                branch = _branch(union, attributes[member.attribute], place.member(union.tag))
        names = {member.name for member in members}
        for member in members_of(branch):
            if member.name not in names:
                self._member(member, value, place, attributes)
                names.add(member.name)
        for name in value:
            if name not in names:
                raise CommandError(f"Parameter '{place.member(name).path}' is unexpected")
        return branch(**attributes)

    def _member(
        self, member: Member, value: dict[str, Any], place: _Place, attributes: dict[str, Any]
    ) -> None:
        here = place.member(member.name)
        if member.name in value:
            attributes[member.attribute] = self.visit(member.type, value[member.name], here)
        elif not member.is_optional:
            raise CommandError(f"Parameter '{here.path}' is missing")

    def _array(self, type_: ArrayType, value: Any, place: _Place) -> Any:
        if not isinstance(value, list):
            raise place.wrong_type("array")
        form = "{}.{}" if self._keyval else "{}[{}]"
        elements = [
            self.visit(type_.element, element, _Place(form.format(place.path, index), None))
            for index, element in enumerate(value)
        ]
        return type_.container(elements)

    def _alternate(self, type_: AlternateType, value: Any, place: _Place) -> Any:
        for branch in type_.branches:
            if _takes(branch, value):
                return self.visit(branch, value, place)
        raise CommandError(f"Invalid parameter type for '{place.own_name}', expected: {type_.name}")

    def _bool(self, value: Any, place: _Place) -> bool:
        if not self._keyval and isinstance(value, bool):
            return value
        if not self._keyval or not isinstance(value, str):
            raise place.wrong_type("boolean")
        choice = parse_bool(value)
        if choice is None:
            raise place.expects("'on' or 'off'")
        return choice

    def _integer(self, limits: IntRange, value: Any, place: _Place) -> int:
        is_signed = limits.low < 0
        number = self._int64(value, place) if is_signed else self._uint64(value, place)
        if not limits.low <= number <= limits.high:
            raise CommandError(f"Parameter '{place.own_name}' expects {limits.name}")
        return number

    def _int64(self, value: Any, place: _Place) -> int:
        if self._keyval:
            return _keyval_integer(value, place, INT64_MIN, INT64_MAX)
        if not _is_int(value) or not INT64_MIN <= value <= INT64_MAX:
            raise place.wrong_type("integer")
        return int(value)

    def _uint64(self, value: Any, place: _Place) -> int:
        """Negative numbers wrap around: old clients say -1 and mean all bits set."""
        if self._keyval:
            return _keyval_integer(value, place, -UINT64_MAX, UINT64_MAX) & UINT64_MAX
        if not _is_int(value) or not INT64_MIN <= value <= UINT64_MAX:
            raise place.expects("uint64")
        return int(value) & UINT64_MAX

    def _size(self, value: Any, place: _Place) -> int:
        if not self._keyval:
            return self._uint64(value, place)
        size = parse_size(_string(value, place))
        if size is None:
            raise place.expects("size")
        return size

    def _number(self, value: Any, place: _Place) -> float:
        if self._keyval:
            number = parse_number(_string(value, place))
        else:
            number = float(value) if _is_int(value) or isinstance(value, float) else None
        if number is None:
            raise place.wrong_type("number")
        return number

    def _null(self, value: Any, place: _Place) -> object:
        if value is None or (self._keyval and value == ""):
            return NULL
        raise place.wrong_type("null")


def _string(value: Any, place: _Place) -> str:
    if not isinstance(value, str):
        raise place.wrong_type("string")
    return value


def _enum(enum: type[StrEnum], value: Any, place: _Place) -> StrEnum:
    word = _string(value, place)
    try:
        return enum(word)
    except ValueError:
        raise _not_accepted(word, place) from None


def _branch(union: UnionInfo, tag: str, place: _Place) -> type:
    branch = union.branches().get(tag)
    if branch is None:
        raise _not_accepted(tag, place)
    return branch


def _not_accepted(word: str, place: _Place) -> CommandError:
    return CommandError(f"Parameter '{place.own_name}' does not accept value '{word}'")


def _keyval_integer(value: Any, place: _Place, low: int, high: int) -> int:
    number = parse_integer(_string(value, place))
    if number is None or not low <= number <= high:
        raise place.expects("integer")
    return number


def _is_int(value: Any) -> bool:
    """Whether JSON had an integer; Python's bool is an int, JSON's is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _takes(branch: QapiType, value: Any) -> bool:
    """Whether the JSON type of `value` selects this branch of an alternate."""
    match branch:
        case ObjectType():
            return isinstance(value, dict)
        case ArrayType():
            return isinstance(value, list)
        case StrType() | EnumType():
            return isinstance(value, str)
        case BoolType():
            return isinstance(value, bool)
        case IntType() | SizeType():
            return _is_int(value)
        case NumberType():
            return _is_int(value) or isinstance(value, float)
        case NullType():
            return value is None
        case AnyType() | AlternateType():
            return True
        case _:
            assert_never(branch)
