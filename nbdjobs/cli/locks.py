# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Whether another program uses an image: a look at the locks that QEMU and nbdjobs take.

They lock bytes of the file by open file description: byte 100 + n when they use permission n,
byte 200 + n when they do not share it. Servers share everything, as their clients are meant to
work together; so two servers on one disk do not exclude each other, and a look is needed.

Source: QEMU block/file-posix.c (RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE).
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Final

#: `struct flock`: type, whence, start, length, pid, with the padding of the C struct.
FLOCK: Final = struct.Struct("@hhqqi0q")

FIRST_BYTE: Final = 100
ALL_BYTES: Final = 200
WRITE_BYTE: Final = FIRST_BYTE + 1


def is_used(path: Path) -> bool:
    """Whether another program has the file open as an image; `OSError` if it cannot be read."""
    return _is_locked(path, FIRST_BYTE, ALL_BYTES)


def is_written(path: Path) -> bool:
    """Whether another program may write to it as an image; `OSError` if it cannot be read."""
    return _is_locked(path, WRITE_BYTE, 1)


def _is_locked(path: Path, start: int, length: int) -> bool:
    request = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    with path.open("rb") as file:
        answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, request)
    return bool(FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
