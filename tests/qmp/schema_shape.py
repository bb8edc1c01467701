# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Compares two answers to query-qmp-schema, whose type names mean nothing.

    assert differences(ours, theirs) == []

Each command and event is spelled out as a tree of places, and places are compared by their
path. `blockdev-add arg.driver.raw.offset` is the member `offset` that the argument of
blockdev-add has when its member `driver` is `raw`; a list has its elements at `[]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Entry = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Something that a schema says.

    Attributes:
        says: Its kind, whether it may be missing, its features.
        inside: Members of an object, words of an enum, branches of an alternate, and below
            the word of a tag what the object has in addition then.
    """

    says: str
    inside: dict[str, Place] = field(default_factory=dict)


@dataclass(frozen=True, order=True)
class Difference:
    """A place that two schemas do not agree on.

    Attributes:
        path: Which.
        ours: What the first says of it; None if it is not there.
        theirs: What the second says.
    """

    path: str
    ours: str | None
    theirs: str | None


def differences(
    ours: list[Entry], theirs: list[Entry], names: frozenset[str] | None = None
) -> list[Difference]:
    """Everything that two schemas do not agree on, sorted by path.

    A place that is only in one of them counts once, with all that is inside. The order of
    entries, members and words counts for nothing.

    Args:
        ours: An answer to query-qmp-schema.
        theirs: Another.
        names: Of the commands and events to compare; all of them by default.
    """
    return sorted(_compare(_trees(ours, names), _trees(theirs, names), ""))


def _compare(
    ours: Mapping[str, Place], theirs: Mapping[str, Place], prefix: str
) -> Iterator[Difference]:
    for name in ours.keys() | theirs.keys():
        mine, other = ours.get(name), theirs.get(name)
        path = prefix + name
        if mine is None or other is None or mine.says != other.says:
            yield Difference(path, _said(mine), _said(other))
        else:
            yield from _compare(mine.inside, other.inside, path + ("." if prefix else " "))


def _said(place: Place | None) -> str | None:
    return None if place is None else place.says


def _trees(schema: list[Entry], names: frozenset[str] | None) -> dict[str, Place]:
    unfolding = _Unfolding({entry["name"]: entry for entry in schema})
    return {
        entry["name"]: unfolding.top(entry)
        for entry in schema
        if entry["meta-type"] in ("command", "event") and (names is None or entry["name"] in names)
    }


class _Unfolding:
    def __init__(self, entries: dict[str, Entry]) -> None:
        self._entries = entries

    def top(self, entry: Entry) -> Place:
        """A command or event."""
        inside = {"arg": self._type(entry["arg-type"], ())}
        if "ret-type" in entry:
            inside["ret"] = self._type(entry["ret-type"], ())
        out_of_band = " out of band" if entry.get("allow-oob") else ""
        return Place(_words(entry["meta-type"] + out_of_band, entry), inside)

    def _type(self, name: str, above: tuple[str, ...]) -> Place:
        if name in above:  # a type inside itself is told by its depth
            return Place(f"as {len(above) - above.index(name)} above")
        entry = self._entries[name]
        above = (*above, name)
        match entry["meta-type"]:
            case "builtin":
                return Place(entry["json-type"])
            case "enum":
                words = {word["name"]: Place(_words("word", word)) for word in entry["members"]}
                return Place(_words("enum", entry), words)
            case "array":
                return Place("array", {"[]": self._type(entry["element-type"], above)})
            case "alternate":
                branches = [self._type(each["type"], above) for each in entry["members"]]
                return Place(_words("alternate", entry), {_kind(each): each for each in branches})
        return self._object(entry, above)

    def _object(self, entry: Entry, above: tuple[str, ...]) -> Place:
        inside = {each["name"]: self._member(each, above) for each in entry["members"]}
        if "tag" in entry:
            words = inside[entry["tag"]].inside
            for variant in entry["variants"]:
                branch = self._type(variant["type"], above)
                word = words[variant["case"]]
                words[variant["case"]] = Place(f"{word.says} of {branch.says}", branch.inside)
        return Place(_words("object", entry), inside)

    def _member(self, member: Entry, above: tuple[str, ...]) -> Place:
        held = self._type(member["type"], above)
        optional = "optional " if "default" in member else ""
        return Place(_words(optional + held.says, member), held.inside)


def _words(says: str, entry: Entry) -> str:
    return " ".join([says, *sorted(entry.get("features", []))])


def _kind(branch: Place) -> str:
    """What tells a branch of an alternate from the others: how it looks in JSON.

    An object inside itself is shown by its depth, so it has no such word of its own.
    """
    kind = branch.says.partition(" ")[0]
    return {"enum": "string", "as": "object"}.get(kind, kind)
