# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Rules of `blkdebug`: which requests fail, from which event on, in which state.

Every event walks through the rules: those of the current state that name it become active (the
first of an event replaces what was active before) or change the state. A request fails when an
active rule fits its kind and range.

Source: QEMU `docs/devel/blkdebug.rst` and qapi/block-core.json (BlkdebugInjectErrorOptions).
"""

from __future__ import annotations

import errno as errno_names
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from nbdjobs.nodes.config import SECTOR
from nbdjobs.nodes.events import DebugEvent
from nbdjobs.qapi.types import member

ANY_STATE: Final = 0
FIRST_STATE: Final = 1
ANYWHERE: Final = -1


class IOType(StrEnum):
    """QAPI `BlkdebugIOType`."""

    READ = "read"
    WRITE = "write"
    WRITE_ZEROES = "write-zeroes"
    DISCARD = "discard"
    FLUSH = "flush"
    BLOCK_STATUS = "block-status"


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectError:
    """Requests fail (QAPI `BlkdebugInjectErrorOptions`).

    Attributes:
        event: What makes the rule active; "none" makes it active from the beginning.
        state: Only in this state; 0 for any.
        iotype: Only this kind of request; any but block status if not given.
        errno: What they fail with; with 0 they do not.
        sector: Only requests that touch this sector; -1 for any.
        once: Only one request.
        immediately: Accepted; whether a failure is told at once makes no difference here.
    """

    event: DebugEvent
    state: int = ANY_STATE
    iotype: IOType | None = None
    errno: int = errno_names.EIO
    sector: int = ANYWHERE
    once: bool = False
    immediately: bool = False

    def fits(self, iotype: IOType, offset: int, length: int) -> bool:
        """Whether a request of that kind and range is one that fails."""
        if self.iotype is None:
            if iotype is IOType.BLOCK_STATUS:
                return False
        elif self.iotype is not iotype:
            return False
        position = self.sector * SECTOR
        return self.sector == ANYWHERE or offset <= position < offset + length


@dataclass(frozen=True, slots=True, kw_only=True)
class SetState:
    """The state changes (QAPI `BlkdebugSetStateOptions`).

    Attributes:
        event: What changes it.
        state: Only in this state; 0 for any.
        new_state: The state from then on.
    """

    event: DebugEvent
    state: int = ANY_STATE
    new_state: int = field(metadata=member("new_state"))


class Rules:
    """The rules of one node, and where it stands.

    Attributes:
        state: The current state; it begins as 1.
    """

    def __init__(self, errors: Sequence[InjectError], transitions: Sequence[SetState]):
        self.state = FIRST_STATE
        self._errors = list(errors)
        self._transitions = list(transitions)
        self._active: list[InjectError] = []
        self.on_event(DebugEvent.NONE)

    def on_event(self, event: DebugEvent) -> None:
        """Go through the rules for an event; of several that fit, the first counts."""
        woken = [rule for rule in self._errors if self._is_due(rule, event)]
        if woken:
            self._active = woken
        due = [rule for rule in self._transitions if self._is_due(rule, event)]
        if due:
            self.state = due[0].new_state

    def failure_of(self, iotype: IOType, offset: int = 0, length: int = 0) -> int:
        """The errno with which a request has to fail, or 0; uses up a rule that holds once."""
        for rule in self._active:
            if rule.fits(iotype, offset, length):
                if rule.once:
                    self._active.remove(rule)
                return rule.errno
        return 0

    def _is_due(self, rule: InjectError | SetState, event: DebugEvent) -> bool:
        return rule.event is event and rule.state in (ANY_STATE, self.state)
