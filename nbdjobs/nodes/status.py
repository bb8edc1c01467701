# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Block status: which parts of a node hold data, read as zeroes, or are allocated in it."""

from __future__ import annotations

from enum import IntFlag
from typing import NamedTuple


class Status(IntFlag):
    """What is known of a run of bytes (QEMU `include/block/block-common.h`, BDRV_BLOCK_*)."""

    DATA = 1
    """The storage below holds the bytes; clear for a hole."""

    ZERO = 2
    """The bytes read as zeroes."""

    ALLOCATED = 4
    """This node itself determines the content, not a backing node."""


DATA = Status.DATA | Status.ALLOCATED
HOLE = Status.ZERO | Status.ALLOCATED
ALLOCATED_ZERO = Status.DATA | Status.ZERO | Status.ALLOCATED


class BlockStatus(NamedTuple):
    """The first run at an offset: `length` bytes, at least 1, that share one `status`."""

    length: int
    status: Status
