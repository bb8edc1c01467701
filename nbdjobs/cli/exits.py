# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""How the command line ends: exit codes, and the error that becomes one sentence."""

from __future__ import annotations

from enum import IntEnum

from nbdjobs.errors import NbdJobsError


class ExitCode(IntEnum):
    """What scripts test for; part of the manual (docs/backup.md)."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    CANCELLED = 3
    INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class CliError(NbdJobsError):
    """Something the user has to know and perhaps change: one sentence, then the program ends.

    Attributes:
        code: The exit code.
    """

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILED):
        self.code = code
        super().__init__(message)
