# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Compares entries of two answers to query-qmp-schema, whose type names mean nothing.

    assert shape_of(ours, "blockdev-backup") == shape_of(theirs, "blockdev-backup")

`shape_of` spells a command or event out with all types below it; `without` takes away what
the other side cannot have, so that a test names each difference it allows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Entry = dict[str, Any]


def shape_of(
    schema: list[Entry], name: str, *, without: Callable[[str], bool] = lambda path: False
) -> Any:
    """A command or event with its types in place of their names.

    Args:
        schema: An answer to query-qmp-schema.
        name: Of the command or event.
        without: Whether to leave out what has this path: members, words of an enum and
            cases of a union, such as `arg.driver.ssh` or `ret[].file`.

    Returns:
        Plain values to compare. The order of members counts for nothing; a type inside
        itself is shown by its depth.
    """
    entries = {entry["name"]: entry for entry in schema}
    entry = entries[name]
    shape = {"meta-type": entry["meta-type"], "features": sorted(entry.get("features", []))}
    if entry.get("allow-oob"):
        shape["allow-oob"] = True
    unfold = _Unfolding(entries, without)
    shape["arg"] = unfold.type(entry["arg-type"], "arg", ())
    if "ret-type" in entry:
        shape["ret"] = unfold.type(entry["ret-type"], "ret", ())
    return shape


class _Unfolding:
    def __init__(self, entries: dict[str, Entry], without: Callable[[str], bool]) -> None:
        self._entries = entries
        self._without = without

    def type(self, name: str, path: str, above: tuple[str, ...]) -> Any:
        if name in above:
            return f"as {len(above) - above.index(name)} above"
        entry = self._entries[name]
        above = (*above, name)
        match entry["meta-type"]:
            case "builtin":
                return entry["json-type"]
            case "enum":
                words = [m for m in entry["members"] if not self._without(f"{path}.{m['name']}")]
                return {m["name"]: sorted(m.get("features", [])) for m in words}
            case "array":
                return [self.type(entry["element-type"], f"{path}[]", above)]
            case "alternate":
                branches = [self.type(m["type"], path, above) for m in entry["members"]]
                return {"alternate": sorted(branches, key=repr)}
        return self._object(entry, path, above)

    def _object(self, entry: Entry, path: str, above: tuple[str, ...]) -> Any:
        shape: Entry = {"features": sorted(entry.get("features", [])), "members": {}}
        for member in entry["members"]:
            where = f"{path}.{member['name']}"
            if not self._without(where):
                shape["members"][member["name"]] = {
                    "type": self.type(member["type"], where, above),
                    "is_optional": "default" in member,
                    "features": sorted(member.get("features", [])),
                }
        if "tag" in entry:
            shape["tag"] = entry["tag"]
            shape["cases"] = {
                variant["case"]: self.type(variant["type"], path, above)
                for variant in entry["variants"]
                if not self._without(f"{path}.{entry['tag']}.{variant['case']}")
            }
        return shape
