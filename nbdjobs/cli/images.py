# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Looking at a disk image before it is served: what it is, how large, and what to call it."""

from __future__ import annotations

import os
import re
import stat
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from nbdjobs.cli.exits import CliError
from nbdjobs.cli.locks import is_used, is_written

QCOW2_MAGIC: Final = b"QFI\xfb"

#: Where the size of the disk is in a qcow2 image (docs/interop/qcow2 of QEMU, "Header").
QCOW2_SIZE_AT: Final = 24

#: Bytes of an image that say what it is.
HEADER: Final = QCOW2_SIZE_AT + 8

#: How other formats begin. Served as raw bytes such a file would show its metadata as the disk.
FOREIGN_MAGIC: Final = {
    QCOW2_MAGIC: "qcow2",
    b"KDMV": "vmdk",
    b"COWD": "vmdk",
    b"conectix": "vpc",
    b"vhdxfile": "vhdx",
    b"QED\0": "qed",
}

#: QEMU's limit for node names and ids, in characters.
NODE_NAME_MAX: Final = 31

#: The NBD specification's limit for an export name, in bytes of UTF-8.
EXPORT_NAME_MAX: Final = 4096

_NODE_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


class Format(StrEnum):
    """How a disk is laid out in an image."""

    RAW = "raw"
    QCOW2 = "qcow2"


@dataclass(frozen=True, slots=True)
class Image:
    """A disk image that can be served.

    Attributes:
        path: Absolute path.
        size: Bytes of the disk.
        is_device: A block device rather than a regular file.
        format: How the disk is laid out in it.
    """

    path: Path
    size: int
    is_device: bool
    format: Format = Format.RAW

    @property
    def driver(self) -> str:
        """The node driver that opens the file or device."""
        return "host_device" if self.is_device else "file"


def look_at(path: Path, *, read_only: bool, chosen: Format | None = None) -> Image:
    """Open an image once and see whether it can be served.

    Args:
        path: What the user named.
        read_only: It need not be writable.
        chosen: What the user says that it is. It is never guessed: who can write to a raw disk
            could make it look like an image with a backing file of their choice.

    Raises:
        CliError: It is missing, something else than a file or block device, not accessible,
            empty, in use by another program, or in a format that is not served.
    """
    text = str(path)
    if not text.isprintable():
        raise CliError(f"{text!r} cannot be served: expected a name of printable UTF-8 characters")
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise CliError(f"'{path}' cannot be served: expected a regular file or a block device")
        with path.open("rb" if read_only else "r+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            start = file.read(HEADER)
        is_taken = is_written(path) if read_only else is_used(path)
    except OSError as error:
        raise CliError(_reason(path, error, read_only=read_only)) from error
    if size == 0:
        raise CliError(f"'{path}' is empty: expected a disk image (truncate -s 1G makes one)")
    if is_taken:
        raise CliError(f"'{path}' is in use by another program: expected an image nobody else has")
    if chosen is None:
        _refuse_foreign(path, start)
    is_device = stat.S_ISBLK(mode)
    if chosen is Format.QCOW2:
        return Image(path.absolute(), _size_in(path, start), is_device, chosen)
    return Image(path.absolute(), size, is_device)


def _reason(path: Path, error: OSError, *, read_only: bool) -> str:
    if isinstance(error, PermissionError) and not read_only:
        return f"'{path}' cannot be opened for writing ({error.strerror}): try --read-only"
    return f"'{path}' cannot be opened: {error.strerror}"


def _refuse_foreign(path: Path, start: bytes) -> None:
    for magic, name in FOREIGN_MAGIC.items():
        if start.startswith(magic):
            is_served = name in list(Format)
            hint = f"--format {name} serves the disk in it, " if is_served else ""
            raise CliError(
                f"'{path}' looks like a {name} image: expected a raw one"
                f" ({hint}--format raw serves its bytes as they are)"
            )


def _size_in(path: Path, start: bytes) -> int:
    """Bytes of the disk in a qcow2 image; the daemon looks at the rest when it opens it."""
    if len(start) < HEADER or not start.startswith(QCOW2_MAGIC):
        raise CliError(f"'{path}' is not a qcow2 image: expected one with --format qcow2")
    return int.from_bytes(start[QCOW2_SIZE_AT:HEADER], "big")


def export_names(paths: Sequence[Path], chosen: Sequence[str]) -> list[str]:
    """Give every image an export name: the chosen ones in order, else the file name's stem.

    Raises:
        CliError: More names than images, a name that NBD cannot carry, or one name twice.
    """
    if len(chosen) > len(paths):
        raise CliError(
            f"{len(chosen)} names were given for {len(paths)} image(s): expected at most one each"
        )
    names = [*chosen, *(path.stem or path.name for path in paths[len(chosen) :])]
    for name in names:
        if len(name.encode(errors="replace")) > EXPORT_NAME_MAX or not (name + ".").isprintable():
            raise CliError(
                f"{name!r} cannot be an export name: expected printable characters,"
                f" at most {EXPORT_NAME_MAX} bytes"
            )
        if names.count(name) > 1:
            twins = " and ".join(
                f"'{other}'" for other, used in zip(paths, names, strict=True) if used == name
            )
            raise CliError(f"{twins} would both be exported as '{name}': give each its own --name")
    return names


def node_name(name: str) -> str:
    """Turn an export name into a node name: itself where it is one, else close to it and unique.

    `nbdjobs backup` uses the same function, so it finds the node by the export name.
    """
    if is_identifier(name) and len(name) <= NODE_NAME_MAX:
        return name
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    if not re.match(r"[A-Za-z]", safe):
        safe = f"disk-{safe}"
    checksum = f"{zlib.crc32(name.encode(errors='replace')):08x}"
    return f"{safe[: NODE_NAME_MAX - 9]}-{checksum}"


def is_identifier(text: str) -> bool:
    """Whether QEMU takes it as an id: of a job, a node, an export."""
    return _NODE_NAME.fullmatch(text) is not None
