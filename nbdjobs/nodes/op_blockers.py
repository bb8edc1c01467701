# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Operation blockers: commands that a use of a node rules out, and why.

Permissions guard the data; these guard what commands do to the graph as a whole.

Source: QEMU `bdrv_op_block` and its companions, for behaviour and text.
"""

from __future__ import annotations

from enum import StrEnum

from nbdjobs.errors import CommandError


class BlockOp(StrEnum):
    """Commands that a use of a node may rule out (QEMU BLOCK_OP_TYPE_*)."""

    BACKUP_SOURCE = "backup-source"
    BACKUP_TARGET = "backup-target"
    DRIVE_DEL = "drive-del"
    RESIZE = "resize"
    COMMIT = "commit"
    MIRROR_SOURCE = "mirror-source"
    MIRROR_TARGET = "mirror-target"
    STREAM = "stream"
    REPLACE = "replace"
    SNAPSHOT = "snapshot"
    INTERNAL_SNAPSHOT = "internal-snapshot"
    INTERNAL_SNAPSHOT_DELETE = "internal-snapshot-delete"
    CHANGE = "change"


class OpBlockers:
    """What is ruled out for one node.

    Args:
        node_name: For the text of refusals.
    """

    def __init__(self, node_name: str):
        self._node_name = node_name
        self._reasons: dict[BlockOp, list[str]] = {}

    def __bool__(self) -> bool:
        """Whether anything is ruled out."""
        return any(self._reasons.values())

    def add(self, reason: str, *, allowed: frozenset[BlockOp] = frozenset()) -> None:
        """Rule out every operation that is not `allowed`, for a `reason` shown to the user."""
        for operation in BlockOp:
            if operation not in allowed:
                self._reasons.setdefault(operation, []).append(reason)

    def remove(self, reason: str) -> None:
        """Take back one `add` with the same reason."""
        for reasons in self._reasons.values():
            if reason in reasons:
                reasons.remove(reason)

    def rules_out(self, operation: BlockOp) -> bool:
        """Whether the operation is ruled out."""
        return bool(self._reasons.get(operation))

    def check(self, operation: BlockOp) -> None:
        """Raise `CommandError` if the operation is ruled out by a use of the node."""
        for reason in self._reasons.get(operation, ()):
            raise CommandError(f"Node '{self._node_name}' is busy: {reason}")
