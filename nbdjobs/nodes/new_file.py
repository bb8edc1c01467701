# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Making the file or device of a new image: plain calls that may wait.

A file that is there already loses its content, unless somebody uses it as an image: another
process by its image locks, or a node here. Devices are as large as they are.

Source: QEMU `block/file-posix.c` (raw_co_create) for the behaviour, and its error texts.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import suppress

from nbdjobs.errors import CommandError
from nbdjobs.nodes import image_lock, permissions
from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.image_lock import ImageLock
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.storage import DeviceStorage

FileId = tuple[int, int]
"""Device and inode, which tell whether two paths lead to the same file."""


def file_id(status: os.stat_result) -> FileId:
    """What identifies a file, whatever its path."""
    return status.st_dev, status.st_ino


def make_file(path: str, size: int, in_use: Mapping[FileId, str]) -> bool:
    """Make a file of zeroes.

    Args:
        path: Where.
        size: Bytes.
        in_use: Files that nodes have open, with the names of the nodes.

    Returns:
        Whether there was none before.

    Raises:
        CommandError: That is not possible; a file made for it is gone again.
    """
    fd, is_new = open_unused(path, in_use)
    try:
        os.ftruncate(fd, 0)
        os.ftruncate(fd, size)
    except BaseException as error:
        if is_new:
            remove(path)
        if isinstance(error, OSError):
            raise CommandError(f"Could not resize file: {error.strerror}") from error
        raise
    finally:
        os.close(fd)  # the locks go with it
    return is_new


def open_unused(path: str, in_use: Mapping[FileId, str]) -> tuple[int, bool]:
    """Open a file for writing that nobody uses as an image, or make one where there is none.

    Args:
        path: Where.
        in_use: Files that nodes have open, with the names of the nodes.

    Returns:
        A descriptor, which keeps other processes away until it is closed, and whether the file is
        new.

    Raises:
        CommandError: That is not possible; a file made for it is gone again.
    """
    try:
        fd, is_new = _open(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"Could not create '{path}': {_reason(error)}") from error
    try:
        _check_unused(fd, path, in_use)
    except BaseException:
        os.close(fd)
        if is_new:
            remove(path)
        raise
    return fd, is_new


def remove(path: str) -> None:
    """Remove a file that was made; it may be gone already."""
    with suppress(OSError):
        os.unlink(path)


def check_device(path: str, size: int) -> None:
    """Refuse a device that is missing, or too small, with `CommandError`."""
    try:
        storage = DeviceStorage(path, NodeConfig(is_read_only=True))
    except CommandError as error:
        raise CommandError(
            "Protocol driver 'host_device' does not support image creation, and opening the image"
            f" failed: {error}"
        ) from error
    storage.close()
    if storage.size < size:
        raise CommandError("Cannot grow device files")


def is_device(path: str) -> bool:
    """Whether there is a device at a path."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISBLK(mode) or stat.S_ISCHR(mode)


def read_beginning(path: str, length: int) -> bytes:
    """The first bytes of a file or device that is to be written, fewer if it is shorter.

    Raises:
        CommandError: It cannot be opened for that, or not be read.
    """
    try:
        # Without O_NONBLOCK, opening a pipe by mistake would wait for somebody at its other end.
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise CommandError(f"Could not open '{path}': {_reason(error)}") from error
    try:
        return os.pread(fd, length, 0)
    except OSError as error:
        raise CommandError(
            f"Could not read image for determining its format: {error.strerror}"
        ) from error
    finally:
        os.close(fd)


def _reason(error: OSError | ValueError) -> str:
    """What went wrong with a path; `ValueError` is for a zero byte in it."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _open(path: str) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags | os.O_EXCL, 0o644), True
    except FileExistsError:
        return os.open(path, flags, 0o644), False


def _check_unused(fd: int, path: str, in_use: Mapping[FileId, str]) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise CommandError(f"Could not create '{path}': it is not a regular file")
    if image_lock.is_supported(fd):
        shared = permissions.ALL & ~Permission.RESIZE
        ImageLock(fd).acquire(Permission.WRITE | Permission.RESIZE, shared)
    if (user := in_use.get(file_id(status))) is not None:
        raise CommandError(f"Could not create '{path}': node '{user}' has the file open")
