# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The demo's disk image: made, set aside for the proof, and compared byte by byte."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

#: Bytes compared, copied or made at a time.
CHUNK: Final = 4 << 20

#: `_IOW(0x94, 9, int)`: share the blocks of another file, where the file system can.
FICLONE: Final = 0x40049409


def make_image(path: Path, size: int) -> None:
    """Make a disk image: random data, a hole, random data, a hole, in equal parts.

    Args:
        path: A new file.
        size: Bytes, a multiple of four.
    """
    part = size // 4
    with path.open("xb", buffering=0) as file:
        file.truncate(size)
        for start in (0, 2 * part):
            file.seek(start)
            for offset in range(0, part, CHUNK):
                file.write(os.urandom(min(CHUNK, part - offset)))


def set_aside(source: Path, copy: Path) -> None:
    """Copy an image, holes as holes; instantly where the file system can share blocks."""
    with source.open("rb", buffering=0) as old, copy.open("xb", buffering=0) as new:
        with contextlib.suppress(OSError):
            fcntl.ioctl(new, FICLONE, old.fileno())
            return
        new.truncate(os.fstat(old.fileno()).st_size)
        for start, end in _data_ranges(old.fileno()):
            _copy_range(old.fileno(), new.fileno(), start, end)


def _data_ranges(descriptor: int) -> Iterator[tuple[int, int]]:
    end = 0
    while True:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end


def _copy_range(old: int, new: int, start: int, end: int) -> None:
    while start < end:
        data = os.pread(old, min(CHUNK, end - start), start)
        start += os.pwrite(new, data, start)


def count_differences(first: Path, second: Path) -> int:
    """Compare two files byte by byte.

    Returns:
        How many bytes differ; bytes that only one of them has count as different.
    """
    with first.open("rb", buffering=0) as left, second.open("rb", buffering=0) as right:
        different = 0
        while True:
            one, other = left.read(CHUNK), right.read(CHUNK)
            if not one and not other:
                return different
            if one != other:
                different += _differing(one, other)


def _differing(one: bytes, other: bytes) -> int:
    """Count by one exclusive-or of two large numbers: a loop over bytes would take minutes."""
    common = min(len(one), len(other))
    longer = max(len(one), len(other))
    mixed = int.from_bytes(one[:common], "little") ^ int.from_bytes(other[:common], "little")
    return longer - mixed.to_bytes(common, "little").count(0)
