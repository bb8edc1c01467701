# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""How much of a new disk is there from the beginning."""

from __future__ import annotations

from enum import StrEnum


class Preallocation(StrEnum):
    """What of the disk is there from the beginning (QAPI `PreallocMode`)."""

    OFF = "off"
    METADATA = "metadata"
    """Only what says where the data goes."""

    FALLOC = "falloc"
    """The file system has taken the space."""

    FULL = "full"
    """All of it was written."""
