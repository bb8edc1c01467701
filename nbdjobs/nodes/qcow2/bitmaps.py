# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Persistent bitmaps: kept as they are, and marked where a change of the disk makes them wrong.

A bitmap whose `auto` flag is set promises to know of every change. Nobody tells it of changes
here, so before the first one it gets the flag `in_use`: its content is not to be trusted. Bitmaps
without `auto` describe a span of time that is over, and stay true.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from struct import Struct
from typing import ClassVar

from nbdjobs.errors import CommandError
from nbdjobs.nodes.qcow2.constants import MAX_BITMAP_DIRECTORY_BYTES
from nbdjobs.nodes.rounding import round_up


class BitmapFlag(IntFlag):
    """Flags of a directory entry; the others are reserved."""

    IN_USE = 1
    AUTO = 2
    EXTRA_DATA_COMPATIBLE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class BitmapEntry:
    """One entry of the directory.

    Attributes:
        table_offset: Where the bitmap's table is.
        table_size: Entries of it.
        flags: `BitmapFlag`, and bits not known here.
        kind: 1 for a dirty tracking bitmap.
        granularity_bits: How much of the disk one bit is about, as a power of two.
        extra: Extra data, as it is.
        name: Unique in the image.
    """

    LAYOUT: ClassVar = Struct(">QIIBBHI")

    table_offset: int
    table_size: int
    flags: int
    kind: int
    granularity_bits: int
    extra: bytes
    name: bytes

    def pack(self) -> bytes:
        """The entry as it is in the file, with its padding."""
        head = self.LAYOUT.pack(
            self.table_offset,
            self.table_size,
            self.flags,
            self.kind,
            self.granularity_bits,
            len(self.name),
            len(self.extra),
        )
        entry = head + self.extra + self.name
        return entry + bytes(-len(entry) % 8)


def parse_directory(data: bytes, count: int) -> tuple[BitmapEntry, ...]:
    """Read a directory.

    Raises:
        CommandError: It does not have that many entries, in that many bytes.
    """
    entries = []
    position = 0
    for _ in range(count):
        if position + BitmapEntry.LAYOUT.size > len(data):
            raise CommandError("Bitmap directory is damaged")
        offset, size, flags, kind, bits, name_size, extra_size = BitmapEntry.LAYOUT.unpack_from(
            data, position
        )
        place = position + BitmapEntry.LAYOUT.size
        end = place + extra_size + name_size
        if end > len(data) or not name_size:
            raise CommandError("Bitmap directory is damaged")
        entries.append(
            BitmapEntry(
                table_offset=offset,
                table_size=size,
                flags=flags,
                kind=kind,
                granularity_bits=bits,
                extra=data[place : place + extra_size],
                name=data[place + extra_size : end],
            )
        )
        position = round_up(end, 8)
    if position != len(data) or len(data) > MAX_BITMAP_DIRECTORY_BYTES:
        raise CommandError("Bitmap directory is damaged")
    return tuple(entries)


def mark_changed(directory: bytes, count: int) -> bytes | None:
    """The directory with every bitmap in use that should have been told of a change.

    Returns:
        None if nothing has to be marked.

    Raises:
        CommandError: The directory is damaged.
    """
    marked = bytearray()
    has_changed = False
    for entry in parse_directory(directory, count):
        packed = bytearray(entry.pack())
        if entry.flags & BitmapFlag.AUTO and not entry.flags & BitmapFlag.IN_USE:
            packed[12:16] = (entry.flags | BitmapFlag.IN_USE).to_bytes(4)
            has_changed = True
        marked += packed
    return bytes(marked) if has_changed else None
