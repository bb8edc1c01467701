# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""How Python types describe QAPI types; everything else in this package follows from these.

A struct is a frozen, slotted, keyword-only dataclass. Its fields are the members, in QAPI's
order, and a field with a default is an optional member::

    @dataclass(frozen=True, slots=True, kw_only=True)
    class BackupPerf:
        use_copy_range: bool = False                      # use-copy-range
        max_workers: int = 64                             # max-workers
        block_size: Size = field(metadata=member("block_size"))

| QAPI                | Python                                                          |
|---------------------|-----------------------------------------------------------------|
| int, int64          | `int`                                                           |
| int8 ... uint64     | `Int8` ... `Uint64`                                             |
| size                | `Size`                                                          |
| str, bool, number   | `str`, `bool`, `float`                                          |
| any                 | `object`                                                        |
| null                | `Null`, because None says that an optional member was left out  |
| enum                | a `StrEnum`                                                     |
| ['T']               | `list[T]` or `tuple[T, ...]`                                    |
| alternate           | `Annotated[str | BlockdevOptions, Alternate("BlockdevRef")]`    |
| flat union          | the dataclass of its base members under `@flat_union`           |
| event               | the dataclass of its data under `@event`                        |

Source: QEMU docs/devel/qapi-code-gen.rst describes the types and their rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Annotated, Any, Final, TypeVar

T = TypeVar("T")

INT64_MIN: Final = -(1 << 63)
INT64_MAX: Final = (1 << 63) - 1
UINT64_MAX: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class IntRange:
    """Marks an int that is narrower than 64 bits, or unsigned.

    Attributes:
        name: How error messages call the type.
        low: Smallest value allowed.
        high: Largest value allowed.
    """

    name: str
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class ByteSize:
    """Marks an unsigned 64-bit number of bytes: in key=value text it may end in a unit."""


Int8 = Annotated[int, IntRange("int8_t", -(1 << 7), (1 << 7) - 1)]
Int16 = Annotated[int, IntRange("int16_t", -(1 << 15), (1 << 15) - 1)]
Int32 = Annotated[int, IntRange("int32_t", -(1 << 31), (1 << 31) - 1)]
Uint8 = Annotated[int, IntRange("uint8_t", 0, (1 << 8) - 1)]
Uint16 = Annotated[int, IntRange("uint16_t", 0, (1 << 16) - 1)]
Uint32 = Annotated[int, IntRange("uint32_t", 0, (1 << 32) - 1)]
Uint64 = Annotated[int, IntRange("uint64", 0, UINT64_MAX)]
Size = Annotated[int, ByteSize()]


class Null(Enum):
    """JSON's null as a value that means something, for example "no backing file"."""

    NULL = None


NULL: Final = Null.NULL


@dataclass(frozen=True, slots=True)
class Alternate:
    """Names a choice by JSON type; it stands in `Annotated` beside the union of the branches.

    Attributes:
        name: QAPI name of the alternate, as error messages show it.
    """

    name: str


@dataclass(frozen=True, slots=True)
class MemberInfo:
    """What a dataclass field cannot say about a QAPI member.

    Attributes:
        name: QAPI name, or None to derive it from the field name with hyphens.
        features: QAPI features of the member, such as `unstable` or `deprecated`.
    """

    name: str | None = None
    features: tuple[str, ...] = ()


MEMBER_KEY: Final = "qapi"


def member(name: str | None = None, *, features: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """Metadata for a dataclass field whose QAPI member needs more than the field says.

    Args:
        name: QAPI name when it is not the field name with hyphens (`bps_max`).
        features: QAPI features to show in the schema.
    """
    return {MEMBER_KEY: MemberInfo(name, features)}


@dataclass(frozen=True, slots=True)
class UnionInfo:
    """The branches of a flat union.

    Attributes:
        tag: QAPI name of the base member that selects the branch.
        branches: Gives the dataclass of each tag value, in the schema's order. It is called
            at use, so that a branch may refer to the union and tables may be filled later.
    """

    tag: str
    branches: Callable[[], Mapping[str, type]]


_UNION: Final = "__qapi_union__"
_EVENT: Final = "__qapi_event__"
_FEATURES: Final = "__qapi_features__"
_VALUE_FEATURES: Final = "__qapi_value_features__"


def flat_union(
    tag: str, branches: Callable[[], Mapping[str, type]]
) -> Callable[[type[T]], type[T]]:
    """Make a dataclass of base members a union; it stands above `@dataclass`.

    A branch is a subclass of the base (or the base itself when it adds nothing), so that
    what is read has the base members as attributes too.

    Args:
        tag: QAPI name of the member that selects the branch; its field is a `str`.
        branches: Gives the mapping from tag value to dataclass when it is needed.
    """

    def declare(cls: type[T]) -> type[T]:
        setattr(cls, _UNION, UnionInfo(tag, branches))
        return cls

    return declare


def event(name: str) -> Callable[[type[T]], type[T]]:
    """Make a dataclass the data of the event `name`; it stands above `@dataclass`."""

    def declare(cls: type[T]) -> type[T]:
        setattr(cls, _EVENT, name)
        return cls

    return declare


def features(
    *names: str, values: Mapping[str, tuple[str, ...]] | None = None
) -> Callable[[type[T]], type[T]]:
    """Declare the QAPI features of a struct or enum, and of an enum's values.

    Args:
        *names: Features of the type itself.
        values: Features by enum value.
    """

    def declare(cls: type[T]) -> type[T]:
        setattr(cls, _FEATURES, names)
        setattr(cls, _VALUE_FEATURES, dict(values or {}))
        return cls

    return declare


def union_of(cls: type) -> UnionInfo | None:
    """The union that `cls` itself declares; a branch does not inherit its base's."""
    found = cls.__dict__.get(_UNION)
    return found if isinstance(found, UnionInfo) else None


def event_name(cls: type) -> str:
    """The name of the event whose data `cls` is.

    Raises:
        TypeError: `cls` is not declared with `@event`.
    """
    found = cls.__dict__.get(_EVENT)
    if not isinstance(found, str):
        raise TypeError(f"{cls.__name__} is not declared with @event")
    return found


def features_of(cls: type) -> tuple[str, ...]:
    """The features that `cls` itself declares."""
    found: tuple[str, ...] = cls.__dict__.get(_FEATURES, ())
    return found


def value_features_of(cls: type[StrEnum], value: str) -> tuple[str, ...]:
    """The features of one value of an enum."""
    declared: Mapping[str, tuple[str, ...]] = cls.__dict__.get(_VALUE_FEATURES, {})
    return declared.get(value, ())
