# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The files that are served: made once, kept in the page cache, clean before each measurement."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PIECE: Final = 1 << 20

#: A sparse disk has one piece of data in this many.
SPARSENESS: Final = 8

#: The same of a disk that is nearly empty: 256 MiB of data in 64 GiB.
EMPTINESS: Final = 256
NEARLY_EMPTY: Final = 64 << 30


@dataclass(frozen=True, slots=True)
class Images:
    """Disk images: raw ones, and where the name says so, qcow2.

    Attributes:
        disk: What clients read and write: full of random bytes.
        random: What is backed up: full of random bytes.
        sparse: What is backed up: one eighth random bytes, in pieces of 1 MiB, the rest holes.
        empty: What is backed up: 64 GiB with 256 MiB of random bytes, in pieces of 1 MiB.
        qcow2: The content of `disk`, every cluster allocated.
    """

    disk: Path
    random: Path
    sparse: Path
    empty: Path
    qcow2: Path

    @classmethod
    def create(cls, directory: Path, disk_size: int, backup_size: int) -> Images:
        """Write the files; sizes are bytes, multiples of 1 MiB."""
        names = ("disk.img", "random.img", "sparse.img", "empty.img", "disk.qcow2")
        images = cls(*(directory / name for name in names))
        _fill(images.disk, disk_size, every=1)
        _fill(images.random, backup_size, every=1)
        _fill(images.sparse, backup_size, every=SPARSENESS)
        _fill(images.empty, NEARLY_EMPTY, every=EMPTINESS)
        _qemu_img("convert", "-f", "raw", "-O", "qcow2", str(images.disk), str(images.qcow2))
        return images

    def warm(self) -> None:
        """Read all of them into the page cache."""
        for path in (self.disk, self.random, self.sparse, self.empty, self.qcow2):
            _warm(path)


def create_qcow2(path: Path, size: int) -> None:
    """Make an image in which nothing is allocated; the tool is the same for all peers."""
    _qemu_img("create", "-f", "qcow2", str(path), str(size))


def format_of(path: Path) -> str:
    """The format that a file's name stands for."""
    return "qcow2" if path.suffix == ".qcow2" else "raw"


def disk_size(path: Path) -> int:
    """Bytes of the disk that is in a file."""
    if format_of(path) == "raw":
        return path.stat().st_size
    with path.open("rb") as file:
        file.seek(24)  # `size` in the header
        return int.from_bytes(file.read(8))


def _qemu_img(*words: str) -> None:
    finished = subprocess.run(["qemu-img", *words], capture_output=True, text=True, check=False)
    if finished.returncode:
        raise OSError(finished.stderr.strip())


def _fill(path: Path, size: int, every: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)
        for offset in range(0, size, PIECE * every):
            file.seek(offset)
            file.write(os.urandom(PIECE))


def _warm(path: Path) -> None:
    buffer = bytearray(PIECE)
    with path.open("rb", buffering=0) as file:
        for begin, end in _data(file.fileno()):
            file.seek(begin)
            while file.tell() < end and file.readinto(buffer):
                pass


def _data(descriptor: int) -> Iterator[tuple[int, int]]:
    """The runs of a file that are no holes."""
    end = 0
    while True:
        try:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        yield begin, end


def settle() -> None:
    """Write out what is dirty, so that one's writes are not written back in another's turn."""
    os.sync()
