# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Rounding of sizes and offsets, in bytes."""

from __future__ import annotations


def round_down(value: int, alignment: int) -> int:
    """Largest multiple of `alignment` that is not above `value`."""
    return value - value % alignment


def round_up(value: int, alignment: int) -> int:
    """Smallest multiple of `alignment` that is not below `value`."""
    return value + -value % alignment
