# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Permissions: what each user of a node needs, and what it lets the others do.

Source: QEMU `include/block/block-common.h` (BLK_PERM_*) and the comments of `block.c`.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Final


class Permission(IntFlag):
    """One thing that a user of a node may need, and may allow others."""

    CONSISTENT_READ = 1
    """Read content that makes sense as a disk."""

    WRITE = 2
    """Change the content."""

    WRITE_UNCHANGED = 4
    """Write what reads the same as before."""

    RESIZE = 8
    """Change the size."""


NONE: Final = Permission(0)
ALL: Final = Permission(15)
WRITES: Final = Permission.WRITE | Permission.WRITE_UNCHANGED
CHANGES: Final = WRITES | Permission.RESIZE
"""What needs storage that is open for writing."""

_WORDS: Final = {
    Permission.CONSISTENT_READ: "consistent read",
    Permission.WRITE: "write",
    Permission.WRITE_UNCHANGED: "write unchanged",
    Permission.RESIZE: "resize",
}
_QAPI_NAMES: Final = {permission: word.replace(" ", "-") for permission, word in _WORDS.items()}


def describe(permissions: Permission) -> str:
    """The words of QEMU's error messages, such as "write, resize"."""
    return ", ".join(word for permission, word in _WORDS.items() if permission in permissions)


def qapi_names(permissions: Permission) -> list[str]:
    """Values of the QAPI enum `BlockPermission`, in the order of QEMU's answers."""
    return [name for permission, name in _QAPI_NAMES.items() if permission in permissions][::-1]
