# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Describes commands, events and their types to clients, from the types themselves.

Names of types carry no meaning, as in QEMU: a number per type in the order of first use,
`[n]` for an array. Entries stand in that order too, after the commands and events.

Source: QEMU docs/devel/qapi-code-gen.rst, "Client JSON Protocol introspection".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

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
from nbdjobs.qapi.types import (
    NULL,
    UnionInfo,
    features_of,
    flat_union,
    member,
    union_of,
    value_features_of,
)


class MetaType(StrEnum):
    """QAPI `SchemaMetaType`: what an entry of the schema describes."""

    BUILTIN = "builtin"
    ENUM = "enum"
    ARRAY = "array"
    OBJECT = "object"
    ALTERNATE = "alternate"
    COMMAND = "command"
    EVENT = "event"


class JsonType(StrEnum):
    """QAPI `JSONType`: how a builtin looks in JSON."""

    STRING = "string"
    NUMBER = "number"
    INT = "int"
    BOOLEAN = "boolean"
    NULL = "null"
    OBJECT = "object"
    ARRAY = "array"
    VALUE = "value"


@flat_union("meta-type", lambda: _BRANCHES)
@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaInfo:
    """One entry of the schema.

    Attributes:
        name: Of the command or event, or the opaque name of a type.
        meta_type: A word of `MetaType`.
        features: QAPI features, or None when there are none.
    """

    name: str
    meta_type: str
    features: list[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaInfoBuiltin(SchemaInfo):
    """A builtin type and how it looks in JSON."""

    meta_type: str = MetaType.BUILTIN
    json_type: JsonType


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaInfoEnumMember:
    """One word of an enum."""

    name: str
    features: list[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaInfoEnum(SchemaInfo):
    """An enum; `values` says the same as `members` to old clients."""

    meta_type: str = MetaType.ENUM
    members: list[SchemaInfoEnumMember]
    values: list[str] = field(metadata=member(features=("deprecated",)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaInfoArray(SchemaInfo):
    """An array of one type."""

    meta_type: str = MetaType.ARRAY
    element_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaInfoObjectMember:
    """A member of an object; `default` is null for an optional one, else left out."""

    name: str
    type: str
    default: object = None
    features: list[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaInfoObjectVariant:
    """What an object has in addition when its tag is `case`."""

    case: str
    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaInfoObject(SchemaInfo):
    """A struct, or with `tag` and `variants` a flat union."""

    meta_type: str = MetaType.OBJECT
    members: list[SchemaInfoObjectMember]
    tag: str | None = None
    variants: list[SchemaInfoObjectVariant] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaInfoAlternateMember:
    """One branch of an alternate."""

    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaInfoAlternate(SchemaInfo):
    """A choice by JSON type."""

    meta_type: str = MetaType.ALTERNATE
    members: list[SchemaInfoAlternateMember]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaInfoCommand(SchemaInfo):
    """A command; `allow_oob` is None where it is false."""

    meta_type: str = MetaType.COMMAND
    arg_type: str
    ret_type: str
    allow_oob: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaInfoEvent(SchemaInfo):
    """An event and its data."""

    meta_type: str = MetaType.EVENT
    arg_type: str


_BRANCHES: Final[dict[str, type[SchemaInfo]]] = {
    MetaType.BUILTIN: SchemaInfoBuiltin,
    MetaType.ENUM: SchemaInfoEnum,
    MetaType.ARRAY: SchemaInfoArray,
    MetaType.OBJECT: SchemaInfoObject,
    MetaType.ALTERNATE: SchemaInfoAlternate,
    MetaType.COMMAND: SchemaInfoCommand,
    MetaType.EVENT: SchemaInfoEvent,
}


@dataclass(frozen=True, slots=True)
class CommandShape:
    """What the schema says about a command.

    Attributes:
        name: QMP name.
        arguments: Dataclass of the arguments, or None without any.
        result: What it returns, or None for an empty object.
        features: QAPI features.
        allow_oob: It may be executed out of band.
    """

    name: str
    arguments: type | None
    result: QapiType | None
    features: tuple[str, ...] = ()
    allow_oob: bool = False


@dataclass(frozen=True, slots=True)
class EventShape:
    """What the schema says about an event: its name and the dataclass of its data."""

    name: str
    data: type


def build_schema(
    commands: Iterable[CommandShape], events: Iterable[EventShape]
) -> list[SchemaInfo]:
    """Describe commands, then events, then all types that they use."""
    return _Builder().build(commands, events)


@dataclass(frozen=True, slots=True)
class _Empty:
    """The object without members: no arguments, no result, a branch that adds nothing."""


@dataclass(frozen=True, slots=True)
class _Tag:
    """The enum of a union's tag."""

    union: type


@dataclass(frozen=True, slots=True)
class _Variant:
    """What a branch has beyond the base of its union."""

    branch: type
    base: type


_Described = QapiType | _Empty | _Tag | _Variant
_EMPTY: Final = _Empty()

_BUILTINS: Final[dict[type, tuple[str, JsonType]]] = {
    IntType: ("int", JsonType.INT),
    SizeType: ("int", JsonType.INT),
    StrType: ("str", JsonType.STRING),
    BoolType: ("bool", JsonType.BOOLEAN),
    NumberType: ("number", JsonType.NUMBER),
    NullType: ("null", JsonType.NULL),
    AnyType: ("any", JsonType.VALUE),
}


class _Builder:
    """Gives names on first use and remembers what is still to be described."""

    def __init__(self) -> None:
        self._names: dict[_Described, str] = {}
        self._numbered = 0
        self._used: dict[str, _Described] = {}

    def build(
        self, commands: Iterable[CommandShape], events: Iterable[EventShape]
    ) -> list[SchemaInfo]:
        self._name(_EMPTY)
        entries: list[SchemaInfo] = [self._command(shape) for shape in commands]
        entries += [self._event(shape) for shape in events]
        described = 0
        while described < len(self._used):
            # Describing a type may use others, which then wait at the end of the table.
            for name, type_ in list(self._used.items())[described:]:
                entries.append(self._entry(name, type_))
                described += 1
        return entries

    def _command(self, shape: CommandShape) -> SchemaInfo:
        return SchemaInfoCommand(
            name=shape.name,
            arg_type=self._name(_object_or_empty(shape.arguments)),
            ret_type=self._name(shape.result if shape.result is not None else _EMPTY),
            allow_oob=True if shape.allow_oob else None,
            features=_listed(shape.features),
        )

    def _event(self, shape: EventShape) -> SchemaInfo:
        return SchemaInfoEvent(
            name=shape.name,
            arg_type=self._name(_object_or_empty(shape.data)),
            features=_listed(features_of(shape.data)),
        )

    def _name(self, type_: _Described) -> str:
        builtin = _BUILTINS.get(type(type_))
        if builtin is not None:
            self._used.setdefault(builtin[0], type_)
            return builtin[0]
        if isinstance(type_, ArrayType):
            return self._array_name(type_)
        name = self._names.get(type_)
        if name is None:
            name = str(self._numbered)
            self._numbered += 1
            self._names[type_] = name
            self._used[name] = type_
        return name

    def _array_name(self, type_: ArrayType) -> str:
        name = f"[{self._name(type_.element)}]"
        self._used.setdefault(name, type_)
        return name

    def _entry(self, name: str, type_: _Described) -> SchemaInfo:
        match type_:
            case _Empty():
                return SchemaInfoObject(name=name, members=[])
            case _Tag():
                return self._enum(name, [(word, ()) for word in _union(type_.union).branches()])
            case _Variant():
                return self._variant(name, type_)
            case EnumType():
                words = [(word.value, value_features_of(type_.enum, word)) for word in type_.enum]
                return self._enum(name, words, features_of(type_.enum))
            case ArrayType():
                return SchemaInfoArray(name=name, element_type=self._name(type_.element))
            case ObjectType():
                return self._object(name, type_.cls)
            case AlternateType():
                branches = [
                    SchemaInfoAlternateMember(type=self._name(branch)) for branch in type_.branches
                ]
                return SchemaInfoAlternate(name=name, members=branches)
            case _:
                return SchemaInfoBuiltin(name=name, json_type=_BUILTINS[type(type_)][1])

    def _enum(
        self, name: str, words: list[tuple[str, tuple[str, ...]]], features: tuple[str, ...] = ()
    ) -> SchemaInfo:
        return SchemaInfoEnum(
            name=name,
            members=[SchemaInfoEnumMember(name=w, features=_listed(f)) for w, f in words],
            values=[word for word, _ in words],
            features=_listed(features),
        )

    def _object(self, name: str, cls: type) -> SchemaInfo:
        union = union_of(cls)
        variants = None
        members = [self._member(each, cls) for each in members_of(cls)]
        if union is not None:
            variants = [
                SchemaInfoObjectVariant(case=case, type=self._name(_variant_of(branch, cls)))
                for case, branch in union.branches().items()
            ]
        return SchemaInfoObject(
            name=name,
            members=members,
            tag=union.tag if union is not None else None,
            variants=variants,
            features=_listed(features_of(cls)),
        )

    def _variant(self, name: str, variant: _Variant) -> SchemaInfo:
        return SchemaInfoObject(
            name=name,
            members=[self._member(each, variant.branch) for each in _own_members(variant)],
            features=_listed(features_of(variant.branch)),
        )

    def _member(self, described: Member, cls: type) -> SchemaInfoObjectMember:
        union = union_of(cls)
        is_tag = union is not None and described.name == union.tag
        return SchemaInfoObjectMember(
            name=described.name,
            type=self._name(_Tag(cls) if is_tag else described.type),
            default=NULL if described.is_optional else None,
            features=_listed(described.features),
        )


def _object_or_empty(cls: type | None) -> _Described:
    if cls is None or (not members_of(cls) and union_of(cls) is None):
        return _EMPTY
    return ObjectType(cls)


def _union(cls: type) -> UnionInfo:
    union = union_of(cls)
    assert union is not None, "a tag is only made for a union"
    return union


def _variant_of(branch: type, base: type) -> _Described:
    variant = _Variant(branch, base)
    return variant if _own_members(variant) else _EMPTY


def _own_members(variant: _Variant) -> list[Member]:
    base = {member.name for member in members_of(variant.base)}
    return [member for member in members_of(variant.branch) if member.name not in base]


def _listed(names: tuple[str, ...]) -> list[str] | None:
    return list(names) or None
