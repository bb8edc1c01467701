# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""When a cluster that nothing refers to any more may be used again.

Two things have to happen first. The metadata without the reference must be stable: otherwise a
crash would bring the reference back, to a cluster with somebody else's data. And the requests
that found the reference before it went must have ended: a slow write would still hit the cluster.

For the second, time is cut into epochs. A request counts in the epoch in which it began. What a
commit makes free waits until no request of its epoch, or of an earlier one, is in flight:

    epoch 1 ──────────────┐ epoch 2 ──────────────┐ epoch 3
      r ██████████████████│███                    │
    cluster unlinked ▲    commit      ▲ free from here on: r has ended and the commit too
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import NamedTuple


class Reason(Enum):
    """Why a reference went, as the options `pass-discard-*` tell reasons apart."""

    REQUEST = "request"
    """A guest discarded it."""

    SNAPSHOT = "snapshot"
    """It was in a snapshot that was deleted."""

    OTHER = "other"


class Freed(NamedTuple):
    """References that went: `clusters` from `first` on have one user less.

    Attributes:
        first: The first cluster.
        clusters: How many.
        may_discard: Whether the storage may be told to discard them, once nobody uses them.
    """

    first: int
    clusters: int
    may_discard: bool


class Epoch:
    """The requests that began in one stretch of time.

    Attributes:
        users: How many of them are in flight.
    """

    __slots__ = ("users",)

    def __init__(self) -> None:
        self.users = 0


class _Batch(NamedTuple):
    epoch: Epoch
    freed: list[Freed]


class Reclaim:
    """What waits to be used again.

    Args:
        discarded: Reasons for which the storage may discard clusters.

    Attributes:
        epoch: Where a request that begins now counts itself, and out again at its end.
        changed: Called whenever there is something new for a commit to do.
        unlinked: References that went since the last commit began.
    """

    def __init__(self, discarded: Iterable[Reason] = ()) -> None:
        self.epoch = Epoch()
        self.changed: Callable[[], None] = lambda: None
        self._discarded = frozenset(discarded)
        self.unlinked: list[Freed] = []
        self._stable: deque[_Batch] = deque()

    @contextmanager
    def request(self) -> Iterator[None]:
        """While inside, nothing that is in the tables now is used anew."""
        epoch = self.epoch
        epoch.users += 1
        try:
            yield
        finally:
            epoch.users -= 1

    def may_discard(self, reason: Reason) -> bool:
        """Whether the storage may be told to discard what becomes free for a reason."""
        return reason in self._discarded

    def drop(self, cluster: int, count: int = 1, reason: Reason = Reason.OTHER) -> None:
        """Take note that references to clusters went out of the metadata in memory."""
        may_discard = self.may_discard(reason)
        self.changed()
        if self.unlinked:
            last = self.unlinked[-1]
            if last.first + last.clusters == cluster and last.may_discard == may_discard:
                self.unlinked[-1] = last._replace(clusters=last.clusters + count)
                return
        self.unlinked.append(Freed(cluster, count, may_discard))

    def begin_commit(self) -> list[Freed]:
        """What the commit that begins now will make free."""
        freed, self.unlinked = self.unlinked, []
        return freed

    def commit_failed(self, freed: list[Freed]) -> None:
        """The references may still be on stable storage."""
        self.unlinked[:0] = freed

    def committed(self, freed: list[Freed]) -> None:
        """The references are gone for good; requests that know them may be in flight."""
        if freed:
            self._stable.append(_Batch(self.epoch, freed))
            self.epoch = Epoch()

    def ready(self) -> list[Freed]:
        """Take what can be used again now."""
        freed: list[Freed] = []
        while self._stable and not self._stable[0].epoch.users:
            freed += self._stable.popleft().freed
        return freed
