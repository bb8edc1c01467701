# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""User-created objects as a tree of paths and properties, as the `qom-*` commands see them.

    /            type "container"
    └─ objects   type "container"
       ├─ tg     type "throttle-group", with a property for each member of its options
       └─ ...

A path that does not begin with "/" means whatever ends with it, if that is only one.

Source: QEMU qapi/qom.json and `docs/devel/qom.rst`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from nbdjobs.daemon import throttle_limits
from nbdjobs.daemon.object_options import (
    ObjectOptions,
    SecretProperties,
    ThrottleGroupProperties,
)
from nbdjobs.daemon.objects import Objects
from nbdjobs.errors import CommandError, ErrorClass
from nbdjobs.qapi.model import BoolType, EnumType, IntType, Member, ObjectType, members_of
from nbdjobs.qapi.visitor import to_qapi, visit

Path = tuple[str, ...]

_ROOT: Final[Path] = ()
_OBJECTS: Final[Path] = ("objects",)
_TYPE: Final = "type"
_LOADED: Final = "loaded"
_BASE: Final = frozenset(member.name for member in members_of(ObjectOptions))


class Qom:
    """The tree, made anew from the objects at each look."""

    def __init__(self, objects: Objects):
        self._objects = objects

    def properties(self, path: str) -> dict[str, str]:
        """The properties of what is at `path`, with the names of their types.

        Raises:
            CommandError: Nothing is there, or the path means several things.
        """
        return self._properties(self._resolve(path))

    def get(self, path: str, name: str) -> object:
        """The JSON value of a property; of a child, its path.

        Raises:
            CommandError: There is no such property.
        """
        element = self._resolve(path)
        self._check_property(element, name)
        if name == _TYPE:
            return self._type(element)
        options = self._options(element)
        return _path(*element, name) if options is None else self._value(options, name)

    def set(self, path: str, name: str, value: object) -> None:
        """Change a property of an object to a JSON value.

        Raises:
            CommandError: It cannot be changed, or not to that, in QEMU's words.
        """
        element = self._resolve(path)
        self._check_property(element, name)
        options = self._options(element)
        if options is None or name in (_TYPE, _LOADED):
            raise CommandError(f"Property '{self._type(element)}.{name}' is not writable")
        attribute = name.replace("-", "_")
        if not isinstance(options, ThrottleGroupProperties):
            self._objects.change(options.id, **{attribute: _read(options, name, value)})
            return
        if name != "limits":
            raise CommandError("Property cannot be set after initialization")
        self._objects.set_limits(options.id, _read(options, name, value))

    # The tree

    def _resolve(self, path: str) -> Path:
        words = tuple(word for word in path.split("/") if word)
        starts = [_ROOT] if path.startswith("/") else list(self._elements())
        found = [start + words for start in starts if start + words in set(self._elements())]
        if not found:
            raise CommandError(f"Device '{path}' not found", ErrorClass.DEVICE_NOT_FOUND)
        if len(found) > 1:
            raise CommandError(f"Path '{path}' is ambiguous")
        return found[0]

    def _elements(self) -> Iterator[Path]:
        yield _ROOT
        yield _OBJECTS
        for options in self._objects:
            yield (*_OBJECTS, options.id)

    def _options(self, element: Path) -> ObjectOptions | None:
        """The options of an object; None for a container."""
        return None if element in (_ROOT, _OBJECTS) else self._objects.find(element[-1])

    def _type(self, element: Path) -> str:
        options = self._options(element)
        return "container" if options is None else options.qom_type

    # Properties

    def _check_property(self, element: Path, name: str) -> None:
        if name not in self._properties(element):
            raise CommandError(f"Property '{self._type(element)}.{name}' not found")

    def _properties(self, element: Path) -> dict[str, str]:
        options = self._options(element)
        if options is not None:
            return own_properties(type(options))
        children = {
            child[-1]: f"child<{self._type(child)}>"
            for child in self._elements()
            if child and child[:-1] == element
        }
        return {_TYPE: "string"} | children

    def _value(self, options: ObjectOptions, name: str) -> object:
        if isinstance(options, ThrottleGroupProperties):
            limits = throttle_limits.describe(self._objects.limits(options.id))
            return limits if name == "limits" else limits[name.removeprefix("x-")]
        if isinstance(options, SecretProperties) and name == _LOADED:
            return True
        value = getattr(options, name.replace("-", "_"))
        return "" if value is None else to_qapi(value)


def _read(options: ObjectOptions, name: str, value: object) -> Any:
    """A JSON value as the type that the property has."""
    identity = {"qom-type": options.qom_type, "id": options.id}
    read = visit(ObjectOptions, identity | {name: value})
    return getattr(read, name.replace("-", "_"))


def own_properties(cls: type) -> dict[str, str]:
    """The properties of objects made from such options, with the names of their types."""
    own = {member.name: _type_name(member) for member in members_of(cls)}
    return {_TYPE: "string"} | {name: own[name] for name in own if name not in _BASE}


def _type_name(member: Member) -> str:
    match member.type:
        case IntType():
            return "int"
        case BoolType():
            return "bool"
        case EnumType(enum=enum):
            return enum.__name__
        case ObjectType(cls=cls):
            return cls.__name__
    return "string"


def _path(*words: str) -> str:
    return "/" + "/".join(words)
