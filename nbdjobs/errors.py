# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The error tree: a class exists because a caller acts differently on it."""

from __future__ import annotations

import errno as errno_names
import os
from enum import StrEnum


class NbdJobsError(Exception):
    """Base of every error that nbdjobs raises on purpose."""


class ProtocolError(NbdJobsError):
    """The peer broke the rules of the wire: its connection ends, nothing else."""


class NodeError(NbdJobsError):
    """A request on a node failed: the client gets an error reply, its connection lives.

    Attributes:
        errno: Number from the `errno` module that describes the failure best.
        message: One sentence for a human reader.
        offset: Where in the request it failed, in bytes from the start of the node,
            or None when that is not known.
    """

    def __init__(self, errno: int, message: str | None = None, *, offset: int | None = None):
        self.errno = errno
        self.message = message if message is not None else os.strerror(errno)
        self.offset = offset
        super().__init__(self.message)

    @classmethod
    def from_os_error(cls, error: OSError, *, offset: int | None = None) -> NodeError:
        """Wrap what the operating system answered."""
        return cls(error.errno or errno_names.EIO, error.strerror, offset=offset)


class JobError(NbdJobsError):
    """A job cannot go on: it concludes with this message."""


class ErrorClass(StrEnum):
    """QMP error classes (QAPI `QapiErrorClass`)."""

    GENERIC = "GenericError"
    COMMAND_NOT_FOUND = "CommandNotFound"
    DEVICE_NOT_ACTIVE = "DeviceNotActive"
    DEVICE_NOT_FOUND = "DeviceNotFound"
    KVM_MISSING_CAP = "KVMMissingCap"


class CommandError(NbdJobsError):
    """A command is refused before it has any effect.

    Attributes:
        description: The sentence the user reads.
        error_class: The QMP error class that scripts test for.
    """

    def __init__(self, description: str, error_class: ErrorClass = ErrorClass.GENERIC):
        self.description = description
        self.error_class = error_class
        super().__init__(description)
