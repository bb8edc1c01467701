# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A disk cut into plots, and all that is known of the content of each at each moment.

A plot belongs to one writer, who has at most one change of it in flight. So its content goes
through a row of versions, and version n may be current from the moment its change was sent until
the moment the next change was acknowledged:

    change 1   sent ├────┤ acknowledged
    change 2                  sent ├──┤ acknowledged
    version 1       ├─────────────────┤
    version 2                      ├──────────────────

Plots begin and end anywhere, in the middle of sectors and clusters, and range from a few bytes
to several clusters, so that changes touch clusters of other writers' and span many of their own.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from hashlib import blake2b


def digest(content: bytes | bytearray | memoryview) -> bytes:
    """Tell contents apart."""
    return blake2b(content, digest_size=16).digest()


@dataclass(slots=True)
class Version:
    """One content of a plot.

    Attributes:
        digest: Of the content.
        sent: When the change to it was sent, in seconds.
        replaced: When the change to the next version was acknowledged.
    """

    digest: bytes
    sent: float
    replaced: float = math.inf


@dataclass(slots=True)
class Change:
    """A change that is not acknowledged: the new content of a part of a plot."""

    start: int
    data: bytes


@dataclass(slots=True)
class Plot:
    """Some bytes of the disk.

    Attributes:
        offset: Where they begin on the disk.
        content: What was acknowledged last.
        versions: All contents so far.
        change: What is in flight, or was when the connection broke.
    """

    offset: int
    content: bytearray
    versions: list[Version] = field(default_factory=list)
    change: Change | None = None

    def __post_init__(self) -> None:
        self.versions.append(Version(digest(self.content), -math.inf))

    def begin(self, start: int, data: bytes, now: float) -> None:
        """Note that a change is sent."""
        assert self.change is None
        self.change = Change(start, data)
        after = bytearray(self.content)
        after[start : start + len(data)] = data
        self.versions.append(Version(digest(after), now))

    def acknowledge(self, now: float) -> None:
        """Note that the change in flight is done."""
        assert self.change is not None
        self.content[self.change.start : self.change.start + len(self.change.data)] = (
            self.change.data
        )
        self.change = None
        self.versions[-2].replaced = now

    def possible(self, begin: float, end: float) -> set[bytes]:
        """The contents that may have been current at some moment between the two."""
        return {
            version.digest
            for version in self.versions
            if version.sent <= end and version.replaced >= begin
        }

    def check_after_crash(self, found: bytes) -> None:
        """Check what a crash has left: a change in flight is done, not done or half done."""
        expected = self.content
        if self.change is None:
            assert found == expected, f"acknowledged data lost in {self.describe()}"
            return
        start, data = self.change.start, self.change.data
        end = start + len(data)
        assert found[:start] == expected[:start], f"data before a write changed: {self.describe()}"
        assert found[end:] == expected[end:], f"data behind a write changed: {self.describe()}"
        for old, new, byte in zip(expected[start:end], data, found[start:end], strict=True):
            assert byte in (old, new), f"neither old nor new content in {self.describe()}"

    def describe(self) -> str:
        """Where it is, for messages."""
        return f"[{self.offset}, {self.offset + len(self.content)})"


def cut(content: bytes, random_: random.Random, *, longest: int) -> list[Plot]:
    """Cut a disk into plots of random sizes; long ones are rarer."""
    plots: list[Plot] = []
    offset = 0
    while offset < len(content):
        length = round(math.exp(random_.uniform(math.log(16), math.log(longest))))
        plots.append(Plot(offset, bytearray(content[offset : offset + length])))
        offset += length
    return plots


def check_point_in_time(plots: list[Plot], image: bytes, begin: float, end: float) -> None:
    """Check that every plot of a backup was current when it was started."""
    for plot in plots:
        found = digest(image[plot.offset : plot.offset + len(plot.content)])
        known = [version.digest for version in plot.versions]
        assert found in plot.possible(begin, end), (
            f"{plot.describe()} holds version {known.index(found)} of {len(known)}"
            if found in known
            else f"{plot.describe()} holds what was never there"
        )
