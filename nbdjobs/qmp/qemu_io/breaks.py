# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`break`, `remove_break`, `wait_break` and `resume`: break points of a `blkdebug` node.

The node meant is the first `blkdebug` on the way from what the user named to its storage.

Source: behaviour of qemu-io 7.2, QEMU `docs/devel/blkdebug.rst`.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from nbdjobs.nodes import permissions
from nbdjobs.nodes.blkdebug import BlkdebugNode
from nbdjobs.nodes.breakpoints import BreakPoints
from nbdjobs.nodes.events import DebugEvent
from nbdjobs.nodes.node import Node
from nbdjobs.qmp.qemu_io.table import IoCommand
from nbdjobs.qmp.qemu_io.target import Target
from nbdjobs.qmp.qemu_io.words import RefusedError, Words

_NO_SUCH: Final = os.strerror(errno.ENOENT)


def _find(node: Node | None) -> BreakPoints | None:
    while node is not None and not isinstance(node, BlkdebugNode):
        node = next((edge.node for edge in node.edges.values() if edge.is_primary), None)
    return None if node is None else node.break_points


def _break_points(target: Target, refusal: str) -> BreakPoints:
    found = _find(target.node)
    if found is None:
        raise RefusedError(f"{refusal}: {os.strerror(errno.ENOTSUP)}\n")
    return found


async def _break(command: IoCommand, target: Target, words: Words) -> str:
    event, tag = words.operands
    refusal = "Could not set breakpoint"
    points = _break_points(target, refusal)
    if event not in list(DebugEvent):
        raise RefusedError(f"{refusal}: {_NO_SUCH}\n")
    points.add(DebugEvent(event), tag)
    return ""


async def _remove_break(command: IoCommand, target: Target, words: Words) -> str:
    (tag,) = words.operands
    refusal = f"Could not remove breakpoint {tag}"
    # As in QEMU, what is held goes on, though there was no break point left to remove.
    if not _break_points(target, refusal).remove(tag):
        raise RefusedError(f"{refusal}: {_NO_SUCH}\n")
    return ""


async def _resume(command: IoCommand, target: Target, words: Words) -> str:
    (tag,) = words.operands
    refusal = "Could not resume request"
    if not _break_points(target, refusal).resume(tag):
        raise RefusedError(f"{refusal}: {_NO_SUCH}\n")
    return ""


async def _wait_break(command: IoCommand, target: Target, words: Words) -> str:
    (tag,) = words.operands
    refusal = f"Could not wait for breakpoint {tag}"
    points = _break_points(target, refusal)
    async with target.opened(permissions.NONE):  # meanwhile, nobody deletes the node
        if await points.reached(tag):
            return ""
    raise RefusedError(f"{refusal}: {_NO_SUCH}\n")


COMMANDS: Final = (
    IoCommand(
        name="break",
        arguments="event tag",
        summary="sets a breakpoint on event and tags the stopped request as tag",
        at_least=2,
        at_most=2,
        run=_break,
    ),
    IoCommand(
        name="remove_break",
        arguments="tag",
        summary="remove a breakpoint by tag",
        at_least=1,
        at_most=1,
        run=_remove_break,
    ),
    IoCommand(
        name="resume",
        arguments="tag",
        summary="resumes the request tagged as tag",
        at_least=1,
        at_most=1,
        run=_resume,
    ),
    IoCommand(
        name="wait_break",
        arguments="tag",
        summary="waits for the suspension of a request",
        at_least=1,
        at_most=1,
        run=_wait_break,
    ),
)
