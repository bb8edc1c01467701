# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The types of objects, for those who ask before they create one.

    interface ─ user-creatable      whatever object-add can make is that, too
    object ┬─ container
           ├─ secret_common ─ secret
           ├─ event-loop-base ─ iothread
           └─ throttle-group

Source: QEMU qapi/qom.json (qom-list-types, qom-list-properties); names and parents as its storage
daemon has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from nbdjobs.daemon.object_options import (
    IothreadProperties,
    ObjectOptions,
    SecretProperties,
    ThrottleGroupProperties,
)
from nbdjobs.daemon.qom import own_properties
from nbdjobs.errors import CommandError, ErrorClass

_INTERFACES: Final = frozenset({"interface", "user-creatable"})


@dataclass(frozen=True, slots=True, kw_only=True)
class QomType:
    """A type of objects.

    Attributes:
        parent: Name of the type that it extends; None for a root.
        is_abstract: There are no objects of just this type.
        options: What objects of the type are made from.
        lacks: Properties that only types below have.
    """

    parent: str | None = None
    is_abstract: bool = False
    options: type[ObjectOptions] | None = None
    lacks: frozenset[str] = frozenset()


TYPES: Final[Mapping[str, QomType]] = {
    "interface": QomType(is_abstract=True),
    "user-creatable": QomType(parent="interface", is_abstract=True),
    "object": QomType(is_abstract=True),
    "container": QomType(parent="object"),
    "secret_common": QomType(
        parent="object",
        is_abstract=True,
        options=SecretProperties,
        lacks=frozenset({"data", "file"}),
    ),
    "secret": QomType(parent="secret_common", options=SecretProperties),
    "event-loop-base": QomType(
        parent="object",
        is_abstract=True,
        options=IothreadProperties,
        lacks=frozenset({"poll-max-ns", "poll-grow", "poll-shrink"}),
    ),
    "iothread": QomType(parent="event-loop-base", options=IothreadProperties),
    "throttle-group": QomType(parent="object", options=ThrottleGroupProperties),
}


def types_that_are(ancestor: str | None, *, with_abstract: bool) -> Iterator[tuple[str, QomType]]:
    """The types that extend `ancestor` or are it, by name; all of them for None."""
    for name, each in TYPES.items():
        if (with_abstract or not each.is_abstract) and (
            ancestor is None or ancestor in _ancestors(name)
        ):
            yield name, each


def properties_of(name: str) -> dict[str, str]:
    """The properties of objects of a type, with the names of their types.

    Raises:
        CommandError: There is no such type, or it is an interface.
    """
    found = TYPES.get(name)
    if found is None:
        raise CommandError(f"Class '{name}' not found", ErrorClass.DEVICE_NOT_FOUND)
    if name in _INTERFACES:
        raise CommandError("Parameter 'typename' expects a QOM type")
    if found.options is None:
        return {"type": "string"}
    properties = own_properties(found.options)
    return {each: properties[each] for each in properties if each not in found.lacks}


def _ancestors(name: str | None) -> Iterator[str]:
    """The type itself, what it extends, and the interface of whatever users can make."""
    while name is not None:
        yield name
        each = TYPES[name]
        if each.options is not None:
            yield "user-creatable"
            yield "interface"
        name = each.parent
