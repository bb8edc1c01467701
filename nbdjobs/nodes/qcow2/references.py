# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Everything in an image that refers to a host cluster, walked from the header on.

The walk reads the file by itself, a cluster at a time, and trusts nothing: what points outside
the file or to where nothing can be is reported as a finding, and not followed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Final, NamedTuple

from nbdjobs.errors import CommandError
from nbdjobs.nodes.qcow2.bitmaps import parse_directory
from nbdjobs.nodes.qcow2.constants import (
    COMPRESSED,
    COPIED,
    ENTRY_SIZE,
    OFFSET_MASK,
    ExtensionType,
)
from nbdjobs.nodes.qcow2.files import Files
from nbdjobs.nodes.qcow2.header import Header
from nbdjobs.nodes.qcow2.mapping import Words
from nbdjobs.nodes.qcow2.snapshot_table import read_snapshots
from nbdjobs.nodes.qcow2.snapshots import Snapshot


class Reference(NamedTuple):
    """Consecutive host clusters that something refers to once.

    Attributes:
        offset: First byte in the file.
        length: Bytes, at least 1.
    """

    offset: int
    length: int


class L2Table(NamedTuple):
    """An L2 table, and where it hangs.

    Attributes:
        number: Entry of the L1 table.
        entry: That entry.
        offset: Where the table is in the file.
        words: Its entries.
        is_active: It hangs on the active L1 table.
    """

    number: int
    entry: int
    offset: int
    words: Words
    is_active: bool

    def present(self, stride: int) -> list[tuple[int, int]]:
        """Index and value of every entry that is not zero; quick where few are.

        Args:
            stride: Words of an entry.
        """
        words, data = self.words, self.words.tobytes()
        found: list[tuple[int, int]] = []
        for begin in range(0, len(words), _LOOK):
            end = min(begin + _LOOK, len(words))
            part = data[begin * ENTRY_SIZE : end * ENTRY_SIZE]
            if part != _NOTHING[: len(part)]:
                places = range(begin, end, stride)
                found += [(index, words[index]) for index in places if words[index]]
        return found


_LOOK: Final = 128
"""Entries, an even number, that are passed over at a time where all are zero."""

_NOTHING: Final = bytes(_LOOK * ENTRY_SIZE)

Report = Callable[[str], None]


class References:
    """Walks one image.

    Args:
        header: Its header.
        files: Its nodes.
        report: Takes what cannot be true, as sentences.
    """

    def __init__(self, header: Header, files: Files, report: Report):
        self._header = header
        self._geometry = header.geometry
        self._files = files
        self._report = report
        self.end = files.file.size

    async def snapshots(self) -> tuple[Snapshot, ...]:
        """The internal snapshots, none if their table is damaged."""
        try:
            return await read_snapshots(self._header, self._files)
        except CommandError as error:
            self._report(f"ERROR snapshot table: {error}")
            return ()

    async def l2_tables(
        self, l1_offset: int, l1_size: int, *, is_active: bool
    ) -> AsyncIterator[L2Table]:
        """The L2 tables that hang on an L1 table, as far as they can be tables."""
        size = self._geometry.cluster_size
        if not self.is_inside(l1_offset, l1_size * ENTRY_SIZE):
            self._report(f"ERROR L1 table at {l1_offset:#x} is outside of the file")
            return
        step = size // ENTRY_SIZE
        for begin in range(0, l1_size, step):
            count = min(step, l1_size - begin)
            entries = await self._files.read_words(l1_offset + begin * ENTRY_SIZE, count)
            for index, entry in enumerate(entries, begin):
                offset = entry & OFFSET_MASK
                if not offset:
                    continue
                if offset % size:
                    self._report(
                        f"ERROR l2_offset={offset:x}: Table is not cluster aligned;"
                        " L1 entry corrupted"
                    )
                elif self.is_inside(offset, size):
                    words = await self._files.read_words(offset, step)
                    yield L2Table(index, entry, offset, words, is_active)
                else:
                    self._report(
                        "ERROR: counting reference for region exceeding the end of the file by"
                        f" one cluster or more: offset {offset:#x} size {size:#x}"
                    )

    def is_inside(self, offset: int, length: int) -> bool:
        """Whether a range is in the file, but for less than a cluster at its end."""
        return offset + length - self.end < self._geometry.cluster_size

    def data_in(self, table: L2Table) -> list[Reference]:
        """What the entries of a table refer to; clusters that follow each other are one piece."""
        geometry = self._geometry
        found: list[Reference] = []
        has_data_file, size = geometry.has_data_file, geometry.cluster_size
        begin = end = 0
        for _, entry in table.present(geometry.stride):
            if begin and (entry & OFFSET_MASK) == end and not entry & COMPRESSED:
                end += size
                continue
            if begin:
                found.append(Reference(begin, end - begin))
                begin = 0
            if entry & COMPRESSED:
                if has_data_file:
                    self._report("ERROR compressed cluster in an image with a data file")
                    continue
                found.append(Reference(*geometry.unpack_compressed(entry)))
            elif entry & OFFSET_MASK and not has_data_file:
                offset = entry & OFFSET_MASK
                if offset % size:
                    self._report(
                        f"ERROR offset={offset:x}: Cluster is not properly aligned;"
                        " L2 entry corrupted."
                    )
                    continue
                begin, end = offset, offset + size
        if begin:
            found.append(Reference(begin, end - begin))
        return found

    async def metadata(self, snapshots: tuple[Snapshot, ...]) -> list[Reference]:
        """What the header and the tables of fixed places occupy, L2 tables and blocks apart."""
        header = self._header
        found = [
            Reference(0, header.cluster_size),
            Reference(
                header.refcount_table_offset,
                header.refcount_table_clusters << header.cluster_bits,
            ),
        ]
        if header.l1_size:
            found.append(Reference(header.l1_offset, header.l1_size * ENTRY_SIZE))
        if snapshots:
            length = sum(len(snapshot.pack()) for snapshot in snapshots)
            found.append(Reference(header.snapshots_offset, length))
        found += [
            Reference(snapshot.l1_offset, snapshot.l1_size * ENTRY_SIZE)
            for snapshot in snapshots
            if snapshot.l1_size
        ]
        encryption = header.extension(ExtensionType.ENCRYPTION)
        if encryption is not None and len(encryption) == 16:
            offset, length = int.from_bytes(encryption[:8]), int.from_bytes(encryption[8:])
            found.append(Reference(offset, length))
        return found + await self._bitmaps()

    async def _bitmaps(self) -> list[Reference]:
        bitmaps = self._header.bitmaps
        if bitmaps is None:
            return []
        offset, length = bitmaps.directory_offset, bitmaps.directory_size
        found = [Reference(offset, length)]
        try:
            if not self.is_inside(offset, length):
                raise CommandError("Bitmap directory is outside of the file")
            entries = parse_directory(await self._files.read(offset, length), bitmaps.count)
        except CommandError as error:
            self._report(f"ERROR bitmaps: {error}")
            return found
        for entry in entries:
            if not entry.table_size:
                continue
            length = entry.table_size * ENTRY_SIZE
            if not self.is_inside(entry.table_offset, length):
                self._report("ERROR bitmaps: a table is outside of the file")
                continue
            found.append(Reference(entry.table_offset, length))
            for word in await self._files.read_words(entry.table_offset, entry.table_size):
                if word & OFFSET_MASK:
                    found.append(Reference(word & OFFSET_MASK, self._header.cluster_size))
        return found


def is_copied(entry: int) -> bool:
    """Whether an entry says that nobody else refers to the same place."""
    return bool(entry & COPIED)
