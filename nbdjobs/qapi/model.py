# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Reads the declarations of `types` once and hands them out as plain descriptions.

The visitor and the schema both `match` on these, so neither knows about Python's typing.
"""

from __future__ import annotations

import types
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import (
    Annotated,
    Any,
    Final,
    TypeAlias,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from nbdjobs.qapi.types import (
    INT64_MAX,
    INT64_MIN,
    MEMBER_KEY,
    Alternate,
    ByteSize,
    IntRange,
    MemberInfo,
    Null,
)


@dataclass(frozen=True, slots=True)
class IntType:
    """An integer with its range."""

    limits: IntRange


@dataclass(frozen=True, slots=True)
class SizeType:
    """A number of bytes."""


@dataclass(frozen=True, slots=True)
class StrType:
    """A string."""


@dataclass(frozen=True, slots=True)
class BoolType:
    """True or false."""


@dataclass(frozen=True, slots=True)
class NumberType:
    """A floating point number."""


@dataclass(frozen=True, slots=True)
class NullType:
    """JSON's null."""


@dataclass(frozen=True, slots=True)
class AnyType:
    """Any JSON value, taken as it is."""


@dataclass(frozen=True, slots=True)
class EnumType:
    """One of a fixed set of words."""

    enum: type[StrEnum]


@dataclass(frozen=True, slots=True)
class ArrayType:
    """A list; `container` is what the visitor builds."""

    element: QapiType
    container: type[list[Any]] | type[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class ObjectType:
    """A struct or a flat union: a dataclass, whose members are looked at when needed."""

    cls: type


@dataclass(frozen=True, slots=True)
class AlternateType:
    """A choice by JSON type."""

    name: str
    branches: tuple[QapiType, ...]


QapiType: TypeAlias = (
    IntType
    | SizeType
    | StrType
    | BoolType
    | NumberType
    | NullType
    | AnyType
    | EnumType
    | ArrayType
    | ObjectType
    | AlternateType
)


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a struct.

    Attributes:
        attribute: Field name in the dataclass.
        name: QAPI name.
        type: What the value must be.
        is_optional: The member may be left out; the dataclass has a default.
        features: QAPI features.
    """

    attribute: str
    name: str
    type: QapiType
    is_optional: bool
    features: tuple[str, ...]


INT64: Final = IntType(IntRange("int64", INT64_MIN, INT64_MAX))

_PLAIN: Final[dict[object, QapiType]] = {
    int: INT64,
    str: StrType(),
    bool: BoolType(),
    float: NumberType(),
    object: AnyType(),
    Any: AnyType(),
    Null: NullType(),
}


@cache
def members_of(cls: type) -> tuple[Member, ...]:
    """The members of a struct in their declared order, base members first.

    Raises:
        TypeError: `cls` is not a dataclass, or a field's type means nothing in QAPI.
    """
    if not is_dataclass(cls):
        raise TypeError(f"{cls!r} is not a dataclass")
    hints = get_type_hints(cls, include_extras=True)
    described = []
    for field in fields(cls):
        info: MemberInfo = field.metadata.get(MEMBER_KEY, MemberInfo())
        is_optional = field.default is not MISSING or field.default_factory is not MISSING
        described.append(
            Member(
                attribute=field.name,
                name=info.name if info.name is not None else field.name.replace("_", "-"),
                type=describe(hints[field.name]),
                is_optional=is_optional,
                features=info.features,
            )
        )
    return tuple(described)


def describe(hint: Any) -> QapiType:
    """What a type hint means in QAPI.

    Raises:
        TypeError: It means nothing.
    """
    origin = get_origin(hint)
    if origin is Annotated:
        return _describe_annotated(hint)
    if origin in (Union, types.UnionType):
        return _describe_union(hint, alternate=None)
    if origin is list:
        return ArrayType(describe(get_args(hint)[0]), list)
    if origin is tuple and get_args(hint)[1:] == (Ellipsis,):
        return ArrayType(describe(get_args(hint)[0]), tuple)
    if hint in _PLAIN:
        return _PLAIN[hint]
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return EnumType(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        return ObjectType(hint)
    raise TypeError(f"{hint!r} describes no QAPI type")


def _describe_annotated(hint: Any) -> QapiType:
    inner, *notes = get_args(hint)
    for note in notes:
        match note:
            case IntRange():
                return IntType(note)
            case ByteSize():
                return SizeType()
            case Alternate():
                return _describe_union(inner, alternate=note)
    return describe(inner)


def _describe_union(hint: Any, *, alternate: Alternate | None) -> QapiType:
    """`X | None` is an optional X; any other union needs the name of its alternate."""
    branches = [branch for branch in get_args(hint) if branch is not type(None)]
    if alternate is not None:
        return AlternateType(alternate.name, tuple(describe(branch) for branch in branches))
    if len(branches) != 1:
        raise TypeError(f"{hint!r} needs Annotated[..., Alternate(name)]")
    return describe(branches[0])
