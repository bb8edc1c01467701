# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A server's commands and their arguments, from its answer to `query-qmp-schema`. Pure.

Source: QEMU docs/devel/qapi-code-gen.rst, "Client JSON Protocol introspection".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

Entry = Mapping[str, Any]

#: Stands for a type that the schema does not tell, such as that of an unknown argument.
UNKNOWN: Final[Entry] = {"name": "", "meta-type": "builtin", "json-type": "value"}


class Schema:
    """The entries of a schema by name."""

    def __init__(self, entries: Iterable[Entry]):
        self._entries = {entry["name"]: entry for entry in entries}

    @property
    def commands(self) -> list[str]:
        """The names of all commands, sorted."""
        return sorted(
            name for name, entry in self._entries.items() if entry["meta-type"] == "command"
        )

    def arguments_of(self, command: str) -> Entry:
        """Return the type of a command's arguments; `UNKNOWN` if there is no such command."""
        entry = self._entries.get(command)
        if entry is None or entry["meta-type"] != "command":
            return UNKNOWN
        return self.type(entry["arg-type"])

    def type(self, name: str) -> Entry:
        """Return a type by its name in the schema."""
        return self._entries[name]

    def members(self, object_type: Entry, tag: object) -> dict[str, Entry]:
        """Return the types of an object's members by their names.

        Args:
            object_type: An entry; without members unless it is an object.
            tag: Value of the member that selects a branch of a union; None to leave it open.
        """
        members: Sequence[Entry] = object_type.get("members", ())
        if object_type["meta-type"] != "object":
            return {}
        found = {member["name"]: self.type(member["type"]) for member in members}
        for variant in object_type.get("variants", ()):
            if variant["case"] == tag:
                found.update(self.members(self.type(variant["type"]), None))
        return found

    def branches(self, alternate: Entry) -> list[Entry]:
        """Return the types that an alternate chooses from by how a value looks."""
        return [self.type(member["type"]) for member in alternate["members"]]

    def element(self, array: Entry) -> Entry:
        """Return the type of an array's elements."""
        return self.type(array["element-type"])

    def as_object(self, type_: Entry) -> Entry:
        """Return an object type for values with members: itself, or an alternate's branch."""
        if type_["meta-type"] == "alternate":
            objects = [each for each in self.branches(type_) if each["meta-type"] == "object"]
            return objects[0] if objects else UNKNOWN
        return type_

    def words(self, type_: Entry) -> list[str]:
        """Return the values of an enum or a boolean as users write them; else none."""
        if type_["meta-type"] == "enum":
            # "values" is the older form, which new servers may drop.
            members: Sequence[Entry] = type_.get("members", ())
            return [member["name"] for member in members] or list(type_.get("values", ()))
        return ["on", "off"] if type_.get("json-type") == "boolean" else []
