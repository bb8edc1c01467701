# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A file with the process id, locked so that two daemons cannot claim it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from types import TracebackType


class PidFile:
    """Written once the daemon is set up, removed when it ends.

    Args:
        path: Where; None for no file.
    """

    def __init__(self, path: str | None):
        self._shown = path
        self._path = os.path.abspath(path) if path is not None else None
        self._descriptor: int | None = None

    def __enter__(self) -> PidFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._descriptor is not None and self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            os.close(self._descriptor)
            self._descriptor = None

    def write(self) -> None:
        """Write the process id.

        Raises:
            OSError: The file cannot be made, or another daemon holds it; `strerror` says which.
        """
        if self._path is None:
            return
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            text = f"Could not create '{self._shown}': {error.strerror}"
            raise OSError(error.errno, text) from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        except OSError as error:
            os.close(descriptor)
            text = f"Could not lock '{self._shown}': {error.strerror}"
            raise OSError(error.errno, text) from error
        self._descriptor = descriptor
