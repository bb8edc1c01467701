# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The files that are served: made once, kept in the page cache, clean before each measurement."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PIECE: Final = 1 << 20

#: A sparse disk has one piece of data in this many.
SPARSENESS: Final = 8


@dataclass(frozen=True, slots=True)
class Images:
    """Raw disk images.

    Attributes:
        disk: What clients read and write: full of random bytes.
        random: What is backed up: full of random bytes.
        sparse: What is backed up: one eighth random bytes, in pieces of 1 MiB, the rest holes.
    """

    disk: Path
    random: Path
    sparse: Path

    @classmethod
    def create(cls, directory: Path, disk_size: int, backup_size: int) -> Images:
        """Write the files; sizes are bytes, multiples of 1 MiB."""
        images = cls(directory / "disk.img", directory / "random.img", directory / "sparse.img")
        _fill(images.disk, disk_size, every=1)
        _fill(images.random, backup_size, every=1)
        _fill(images.sparse, backup_size, every=SPARSENESS)
        return images

    def warm(self) -> None:
        """Read all of them into the page cache."""
        for path in (self.disk, self.random, self.sparse):
            _warm(path)


def _fill(path: Path, size: int, every: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)
        for offset in range(0, size, PIECE * every):
            file.seek(offset)
            file.write(os.urandom(PIECE))


def _warm(path: Path) -> None:
    buffer = bytearray(PIECE)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def settle() -> None:
    """Write out what is dirty, so that one's writes are not written back in another's turn."""
    os.sync()
