# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""New files for images, with their space taken in advance if that is wanted.

Source: QEMU `block/file-posix.c` (raw_co_create) for the behaviour, and its error texts.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

from nbdjobs.errors import CommandError
from nbdjobs.nodes import new_file
from nbdjobs.nodes.new_file import FileId
from nbdjobs.nodes.preallocation import Preallocation
from nbdjobs.nodes.workers import Workers

_ZEROES: Final = bytes(1024 * 1024)
_MAX_HINT: Final = (1 << 32) - 1

# From linux/fs.h. Sizes and places of `struct fsxattr`: flags, extent size, 20 bytes more.
_GET_FLAGS: Final = 0x80086601
_SET_FLAGS: Final = 0x40086602
_NO_COPY_ON_WRITE: Final = 0x0080_0000
_GET_ATTRIBUTES: Final = 0x801C581F
_SET_ATTRIBUTES: Final = 0x401C5820
_HAS_EXTENT_SIZE: Final = 0x0000_0800
_ATTRIBUTES: Final = struct.Struct("@II20s")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFile:
    """A file to be made.

    Attributes:
        path: Where.
        size: Bytes; what is there already is lost.
        preallocation: Whether the space is taken, by the file system or by writing zeroes.
        is_without_copy_on_write: Whether a file system that copies on write shall not do so for
            this file; a wish, which others ignore.
        extent_size_hint: Bytes that the file system shall allocate together; a wish likewise.
    """

    path: str
    size: int
    preallocation: Preallocation = Preallocation.OFF
    is_without_copy_on_write: bool = False
    extent_size_hint: int = 0


async def create_file(new: NewFile, in_use: Mapping[FileId, str]) -> None:
    """Make a file of zeroes.

    Cancelling takes effect at the next MiB, and a file that was made for it is gone again.

    Args:
        new: The file.
        in_use: Files that nodes have open, with the names of the nodes: they are left alone.

    Raises:
        CommandError: It cannot be done, in QEMU's words; a file made for it is gone again.
    """
    if new.extent_size_hint > _MAX_HINT:
        raise CommandError("Extent size hint is too large")
    if new.preallocation is Preallocation.METADATA:
        raise CommandError("Unsupported preallocation mode: metadata")
    workers = Workers("new file")
    try:
        fd, is_new = await workers.run(partial(new_file.open_unused, new.path, in_use))
        try:
            await _fill(new, fd, workers)
        except BaseException:
            if is_new:
                await workers.run(partial(new_file.remove, new.path))
            raise
        finally:
            os.close(fd)  # the locks go with it
    finally:
        workers.close()


async def _fill(new: NewFile, fd: int, workers: Workers) -> None:
    step = "resize file"
    try:
        await workers.run(partial(os.ftruncate, fd, 0))
        await workers.run(partial(_set_attributes, new, fd))
        await workers.run(partial(os.ftruncate, fd, new.size))
        if new.preallocation is Preallocation.FALLOC and new.size:
            step = "preallocate data"
            await workers.run(partial(os.posix_fallocate, fd, 0, new.size))
        elif new.preallocation is Preallocation.FULL:
            step = "write zeros for preallocation"
            for offset in range(0, new.size, len(_ZEROES)):
                await workers.run(partial(_write_zeroes, fd, offset, new.size))
            await workers.run(partial(os.fsync, fd))
    except OSError as error:
        raise CommandError(f"Could not {step}: {error.strerror}") from error


def _write_zeroes(fd: int, offset: int, end: int) -> None:
    stop = min(offset + len(_ZEROES), end)
    while offset < stop:
        offset += os.pwrite(fd, _ZEROES[: stop - offset], offset)


def _set_attributes(new: NewFile, fd: int) -> None:
    """Tell the file system what is wished, while the file is empty; most know nothing of it."""
    if new.is_without_copy_on_write:
        with suppress(OSError):
            flags = bytearray(8)
            fcntl.ioctl(fd, _GET_FLAGS, flags)
            wished = int.from_bytes(flags[:4], "little") | _NO_COPY_ON_WRITE
            fcntl.ioctl(fd, _SET_FLAGS, wished.to_bytes(8, "little"))
    if new.extent_size_hint:
        with suppress(OSError):
            attributes = bytearray(_ATTRIBUTES.size)
            fcntl.ioctl(fd, _GET_ATTRIBUTES, attributes)
            flags_found, _, rest = _ATTRIBUTES.unpack(attributes)
            wished_for = (flags_found | _HAS_EXTENT_SIZE, new.extent_size_hint, rest)
            fcntl.ioctl(fd, _SET_ATTRIBUTES, _ATTRIBUTES.pack(*wished_for))
