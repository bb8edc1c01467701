# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Character devices that need no network: `null`, `file`, and `ringbuf` (or `memory`).

Source: QEMU qapi/char.json and docs about `-chardev`; texts of its storage daemon.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Final

from nbdjobs.errors import CommandError

RINGBUF_SIZE: Final = 65536
"""Bytes that a ring buffer holds unless told otherwise, as in QEMU."""


class Chardev(ABC):
    """A place that bytes go to and come from.

    Attributes:
        name: Its id.
        is_in_use: A monitor is on it.
    """

    def __init__(self, name: str):
        self.name: Final = name
        self.is_in_use = False

    @property
    @abstractmethod
    def filename(self) -> str:
        """What it is, as queries show it."""

    async def close(self) -> None:
        """Let go of what it holds."""


class NullChardev(Chardev):
    """Takes everything and gives nothing."""

    @property
    def filename(self) -> str:
        """Just what it is."""
        return "null"


class FileChardev(Chardev):
    """A file that what is sent goes to, and perhaps another that input comes from.

    Args:
        name: Its id.
        out: Path of the file; made if it is not there.
        is_appended: Keep what is in it.
        source: Path of the file for input.

    Raises:
        CommandError: One cannot be opened.
    """

    def __init__(
        self, name: str, out: str, *, is_appended: bool = False, source: str | None = None
    ):
        super().__init__(name)
        self._fds: list[int] = []
        keeping = os.O_APPEND if is_appended else os.O_TRUNC
        self._open(out, os.O_WRONLY | os.O_CREAT | keeping)
        if source is not None:
            self._open(source, os.O_RDONLY)

    def _open(self, path: str, flags: int) -> None:
        try:
            # Without O_NONBLOCK, a pipe would wait for somebody at its other end.
            self._fds.append(os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666))
        except (OSError, ValueError) as error:
            self._let_go()
            reason = error.strerror if isinstance(error, OSError) else error
            raise CommandError(f"Could not open '{path}': {reason}") from error

    @property
    def filename(self) -> str:
        """Just what it is."""
        return "file"

    async def close(self) -> None:
        """Close the files."""
        self._let_go()

    def _let_go(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []


class RingbufChardev(Chardev):
    """Keeps the last bytes that were written to it.

    Args:
        name: Its id.
        size: Most bytes that it keeps, a power of two or 0.
        filename: What it was called.

    Raises:
        CommandError: The size is none.
    """

    def __init__(self, name: str, size: int = RINGBUF_SIZE, *, filename: str = "ringbuf"):
        super().__init__(name)
        self._filename = filename
        if size < 0 or size & (size - 1):
            raise CommandError("size of ringbuf chardev must be power of two")
        self._size = size
        self._kept = bytearray()

    @property
    def filename(self) -> str:
        """Just what it is."""
        return self._filename

    def write(self, data: bytes) -> None:
        """Keep the data; the oldest make room."""
        self._kept += data[-self._size :] if self._size else b""
        del self._kept[: max(len(self._kept) - self._size, 0)]

    def read(self, length: int) -> bytes:
        """Take the oldest bytes, at most `length`."""
        taken = bytes(self._kept[:length])
        del self._kept[:length]
        return taken
