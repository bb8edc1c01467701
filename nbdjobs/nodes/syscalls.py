# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""System calls that Python's `os` lacks: fallocate, statx, and ioctls of block devices."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10

_SYNC_FILE_RANGE_WRITE: Final = 0x2

_BLKROGET: Final = 0x125E
_BLKSSZGET: Final = 0x1268
_BLKDISCARD: Final = 0x1277
_BLKZEROOUT: Final = 0x127F
_BLKGETSIZE64: Final = 0x80081272

_AT_EMPTY_PATH: Final = 0x1000
_STATX_DIOALIGN: Final = 0x2000
_STATX_SIZE: Final = 256
_STATX_MASK: Final = struct.Struct("@I")
_STATX_DIO: Final = struct.Struct("@152xII")

# CDLL gives up the interpreter lock while a call runs.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.sync_file_range.argtypes = (
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_uint,
)
_libc.statx.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_void_p,
)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Change what a file has allocated; `OSError` where the file system cannot."""
    _check(_libc.fallocate64(fd, mode, offset, length))


def begin_writeback(fd: int, offset: int, length: int) -> None:
    """Begin to write out the dirty pages of a range; `OSError` where that is not possible.

    Nobody waits, and errors of the storage are left for the next fsync to report.
    """
    _check(_libc.sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE))


def direct_io_alignment(fd: int) -> int | None:
    """The unit of offsets and lengths for O_DIRECT, or None where the kernel does not say."""
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    try:
        _check(_libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer))
    except OSError:
        return None
    (mask,) = _STATX_MASK.unpack_from(buffer)
    _, offset_alignment = _STATX_DIO.unpack_from(buffer)
    if not mask & _STATX_DIOALIGN or not offset_alignment:
        return None
    return int(offset_alignment)


def device_size(fd: int) -> int:
    """Bytes of a block device."""
    return _ioctl_read(fd, _BLKGETSIZE64, "Q")


def device_sector(fd: int) -> int:
    """Bytes of a logical sector of a block device."""
    return _ioctl_read(fd, _BLKSSZGET, "i")


def is_device_read_only(fd: int) -> bool:
    """Whether the kernel refuses writes to a block device, however it was opened."""
    return bool(_ioctl_read(fd, _BLKROGET, "i"))


def device_discard(fd: int, offset: int, length: int) -> None:
    """Discard sectors of a block device."""
    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("QQ", offset, length))


def device_zero(fd: int, offset: int, length: int) -> None:
    """Zero sectors of a block device; the kernel writes zeroes if the device cannot."""
    fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("QQ", offset, length))


def queue_limit(fd: int, name: str) -> int:
    """A value of a block device's request queue as /sys shows it, or 0."""
    number = os.fstat(fd).st_rdev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    for queue in (device / "queue", device / ".." / "queue"):  # a partition has its disk's
        try:
            return int((queue / name).read_text())
        except (OSError, ValueError):
            continue
    return 0


def _ioctl_read(fd: int, request: int, layout: str) -> int:
    answer = fcntl.ioctl(fd, request, bytes(struct.calcsize(layout)))
    return int(struct.unpack(layout, answer)[0])


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
