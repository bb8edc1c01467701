# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What is wrong in an image, found while it is used."""

from __future__ import annotations

from nbdjobs.errors import NbdJobsError


def hexed(number: int) -> str:
    """The number as C's "%#x" has it, in messages that others may look for."""
    return f"{number:#x}" if number else "0"


class CorruptionError(NbdJobsError):
    """Metadata cannot be true: the request fails, and the user is told by an event.

    Attributes:
        message: What was found, in QEMU's words.
        offset: Where in the image file, or -1 if it is at no place.
        size: How many bytes it is about, or -1.
        is_fatal: Going on could destroy more: the image must not be used any further.
    """

    def __init__(self, message: str, *, offset: int = -1, size: int = -1, is_fatal: bool = True):
        self.message = message
        self.offset = offset
        self.size = size
        self.is_fatal = is_fatal
        super().__init__(message)
