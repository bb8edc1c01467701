# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What users want done about I/O errors: the words for it, and what they mean for an errno.

Source: QEMU qapi/block-core.json (BlockdevOnError, BlockErrorAction, BlockDeviceIoStatus).
"""

from __future__ import annotations

import errno
from enum import StrEnum
from typing import assert_never


class OnError(StrEnum):
    """What a user wants done about an I/O error (QAPI `BlockdevOnError`)."""

    REPORT = "report"
    IGNORE = "ignore"
    ENOSPC = "enospc"
    STOP = "stop"
    AUTO = "auto"


class IoOperation(StrEnum):
    """QAPI `IoOperationType`."""

    READ = "read"
    WRITE = "write"


class ErrorAction(StrEnum):
    """QAPI `BlockErrorAction`: what is done about an I/O error."""

    IGNORE = "ignore"
    REPORT = "report"
    STOP = "stop"


class IoStatus(StrEnum):
    """Whether an error has stopped a device or job (QAPI `BlockDeviceIoStatus`)."""

    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"

    def after(self, error: int) -> IoStatus:
        """The status once an errno has stopped it: the first error is the one that is kept."""
        if self is not IoStatus.OK:
            return self
        return IoStatus.NOSPACE if error == errno.ENOSPC else IoStatus.FAILED


def choose_action(policy: OnError, error: int) -> ErrorAction:
    """What a policy means for an errno."""
    match policy:
        case OnError.REPORT:
            return ErrorAction.REPORT
        case OnError.IGNORE:
            return ErrorAction.IGNORE
        case OnError.STOP:
            return ErrorAction.STOP
        case OnError.ENOSPC | OnError.AUTO:
            return ErrorAction.STOP if error == errno.ENOSPC else ErrorAction.REPORT
        case other:
            assert_never(other)
