# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for files and devices in a rehearsal: read like them, and never written.

Nothing is opened for writing, since for some devices that alone has an effect, and no image is
locked. What is written is dropped; so a format that repairs itself when it is opened writes to
nowhere, too.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from typing import ClassVar, Final, Self

from nbdjobs.errors import CommandError
from nbdjobs.nodes.config import SECTOR, NodeConfig
from nbdjobs.nodes.driver import AnyDriver, DriverNode
from nbdjobs.nodes.drivers import DRIVERS
from nbdjobs.nodes.file import FileNode, FileOptions, check_options
from nbdjobs.nodes.host_device import HostDeviceNode
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.nodes.rounding import round_up


class LookedAtFile(DriverNode[FileOptions]):
    """Stands in for `file`."""

    driver: ClassVar[str] = FileNode.driver
    options_type: ClassVar[type[BlockdevOptions]] = FileOptions

    def __init__(self, name: str, config: NodeConfig, path: str, fd: int):
        super().__init__(name, config)
        self._path = path
        self._fd = fd
        self._size = round_up(_length(fd), SECTOR)

    @classmethod
    async def open(
        cls, name: str, config: NodeConfig, options: FileOptions, children: Mapping[str, Node]
    ) -> Self:
        """Look whether the file can be opened as the options want it, and open it for reads."""
        check_options(cls.driver, options, config)
        path = options.filename
        is_written = not (config.is_read_only or config.is_auto_read_only)
        try:
            mode = os.stat(path).st_mode
            if is_written and stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            cls._check_kind(path, mode)
            if is_written and not os.access(path, os.R_OK | os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CommandError(f"Could not open '{path}': {error.strerror}") from error
        except ValueError as error:  # a zero byte in the name
            raise CommandError(f"Could not open '{path}': {error}") from error
        return cls(name, config, path, fd)

    @classmethod
    def _check_kind(cls, path: str, mode: int) -> None:
        if not stat.S_ISREG(mode):
            raise CommandError(f"'{cls.driver}' driver requires '{path}' to be a regular file")

    @property
    def size(self) -> int:
        """Bytes of the file, rounded up to 512."""
        return self._size

    @property
    def filename(self) -> str:
        """Path, as the user gave it."""
        return self._path

    @property
    def content_options(self) -> dict[str, object]:
        """Driver and path."""
        return {"driver": self.driver, "filename": self._path}

    async def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)

    async def _pread(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer) and (
            count := os.preadv(self._fd, (buffer[done:],), offset + done)
        ):
            done += count
        buffer[done:] = bytes(len(buffer) - done)

    async def _pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        """Dropped."""


class LookedAtDevice(LookedAtFile):
    """Stands in for `host_device`."""

    driver: ClassVar[str] = HostDeviceNode.driver

    @classmethod
    def _check_kind(cls, path: str, mode: int) -> None:
        if not (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)):
            raise CommandError(
                f"'{cls.driver}' driver requires '{path}' to be either a character or block device"
            )


REHEARSED: Final[Mapping[str, AnyDriver]] = {
    **DRIVERS,
    **{driver.driver: driver for driver in (LookedAtFile, LookedAtDevice)},
}
"""Drivers by name, with stand-ins for those that have storage of their own."""


def _length(fd: int) -> int:
    """Bytes of a file or device; 0 for one that has no end."""
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    except OSError:
        return 0
