# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Commands about user-created objects.

Source: QEMU qapi/qom.json.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.daemon.object_options import ObjectOptions
from nbdjobs.daemon.qom import Qom
from nbdjobs.daemon.qom_types import properties_of, types_that_are
from nbdjobs.qmp.registry import command


@command("object-add")
def object_add(daemon: Daemon, arguments: ObjectOptions) -> None:
    """Create an object."""
    daemon.objects.add(arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectDel:
    """Arguments of object-del."""

    id: str


@command("object-del")
def object_del(daemon: Daemon, arguments: ObjectDel) -> None:
    """Remove an object that nothing uses."""
    daemon.objects.delete(arguments.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class QomList:
    """Arguments of qom-list."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectPropertyInfo:
    """A property of an object, and the name of its type."""

    name: str
    type: str
    description: str | None = None
    default_value: object | None = None


@command("qom-list")
def qom_list(daemon: Daemon, arguments: QomList) -> list[ObjectPropertyInfo]:
    """The properties of an object."""
    found = Qom(daemon.objects).properties(arguments.path)
    return [ObjectPropertyInfo(name=name, type=type_) for name, type_ in found.items()]


@dataclass(frozen=True, slots=True, kw_only=True)
class QomGet:
    """Arguments of qom-get."""

    path: str
    property: str


@command("qom-get")
def qom_get(daemon: Daemon, arguments: QomGet) -> object:
    """The value of a property."""
    return Qom(daemon.objects).get(arguments.path, arguments.property)


@dataclass(frozen=True, slots=True, kw_only=True)
class QomSet:
    """Arguments of qom-set."""

    path: str
    property: str
    value: object


@command("qom-set")
def qom_set(daemon: Daemon, arguments: QomSet) -> None:
    """Change a property."""
    Qom(daemon.objects).set(arguments.path, arguments.property, arguments.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class QomListTypes:
    """Arguments of qom-list-types."""

    implements: str | None = None
    abstract: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectTypeInfo:
    """A type of objects."""

    name: str
    abstract: bool | None = None
    parent: str | None = None


@command("qom-list-types")
def qom_list_types(daemon: Daemon, arguments: QomListTypes) -> list[ObjectTypeInfo]:
    """The types of objects that there are."""
    found = types_that_are(arguments.implements, with_abstract=bool(arguments.abstract))
    return [
        ObjectTypeInfo(name=name, abstract=True if each.is_abstract else None, parent=each.parent)
        for name, each in found
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class QomListProperties:
    """Arguments of qom-list-properties."""

    typename: str


@command("qom-list-properties")
def qom_list_properties(daemon: Daemon, arguments: QomListProperties) -> list[ObjectPropertyInfo]:
    """The properties of objects of a type."""
    found = properties_of(arguments.typename)
    return [ObjectPropertyInfo(name=name, type=type_) for name, type_ in found.items()]
