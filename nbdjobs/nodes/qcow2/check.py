# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The consistency check: what refers to each cluster is compared with its refcount.

Memory is bounded: references are counted for a window of the file at a time, and there are as
many walks through the tables as the file has windows; images up to half a terabyte (with
clusters of 64 KiB) take one.

Nobody else may use the image meanwhile. What is repaired are refcounts, and the flags that
follow from them; the mapping itself is never touched, since which of two entries is wrong, nobody
can tell.

Source: QEMU `block/qcow2-refcount.c` for what counts as what; `qemu-img check` for the numbers.
"""

from __future__ import annotations

import errno
import logging
from array import array
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from nbdjobs.errors import NodeError
from nbdjobs.nodes.qcow2.constants import (
    COMPRESSED,
    COPIED,
    ENTRY_SIZE,
    OFFSET_MASK,
    REFCOUNT_OFFSET_MASK,
    Incompatible,
)
from nbdjobs.nodes.qcow2.errors import CorruptionError
from nbdjobs.nodes.qcow2.files import Files, bytes_of
from nbdjobs.nodes.qcow2.geometry import Geometry
from nbdjobs.nodes.qcow2.header_file import HeaderFile
from nbdjobs.nodes.qcow2.mapping import Words
from nbdjobs.nodes.qcow2.overlap import MetadataMap
from nbdjobs.nodes.qcow2.reclaim import Reclaim
from nbdjobs.nodes.qcow2.refcounts import Refcounts
from nbdjobs.nodes.qcow2.references import L2Table, Reference, References
from nbdjobs.nodes.qcow2.snapshots import Snapshot

logger = logging.getLogger(__name__)

WINDOW: Final = 8 * 1024 * 1024
"""Clusters whose references are counted at a time, four bytes for each."""

_MOST_MESSAGES: Final = 1000
_BLOCKS: Final = 64


class Fix(Enum):
    """What to repair."""

    NOTHING = "nothing"
    LEAKS = "leaks"
    """Clusters that are counted and that nothing refers to."""

    ALL = "all"


@dataclass(slots=True)
class CheckResult:
    """What was found (QAPI `ImageCheck`).

    Attributes:
        corruptions: What may lose data.
        leaks: Clusters with references counted that are not there: they only occupy space.
        corruptions_fixed: How many were repaired.
        leaks_fixed: Likewise.
        total_clusters: Clusters of the disk.
        allocated_clusters: Those that have a place in the image.
        fragmented_clusters: Those whose place does not follow that of the one before.
        compressed_clusters: Those that are compressed.
        image_end_offset: Where the last cluster in use ends in the file.
        messages: What was found, in sentences; there may be more findings than sentences.
    """

    corruptions: int = 0
    leaks: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    image_end_offset: int = 0
    messages: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong, or not any more."""
        return self.corruptions == self.corruptions_fixed and self.leaks == self.leaks_fixed

    def report(self, message: str) -> None:
        """Count a corruption."""
        self.corruptions += 1
        self.say(message)

    def say(self, message: str) -> None:
        """Keep a sentence."""
        if len(self.messages) < _MOST_MESSAGES:
            self.messages.append(message)


async def check(
    header: HeaderFile, files: Files, fix: Fix = Fix.NOTHING, *, window: int = WINDOW
) -> CheckResult:
    """Check an image that nobody uses, and repair it.

    Args:
        header: Its header.
        files: Its nodes; the file is writable if something may be repaired.
        fix: What to repair.
        window: Clusters to be counted at a time.

    Raises:
        NodeError: The file cannot be read or written.
    """
    return await _Check(header, files, fix, window).run()


class _Check:
    def __init__(self, header: HeaderFile, files: Files, fix: Fix, window: int):
        self._header = header
        self._geometry: Geometry = header.header.geometry
        self._files = files
        self._fix = fix
        self._window = window
        self._result = CheckResult()
        self._references = References(header.header, files, self._report_once)
        self._is_first_walk = True
        self._snapshots: tuple[Snapshot, ...] = ()

    def _report_once(self, message: str) -> None:
        if self._is_first_walk:
            self._result.report(message)

    async def run(self) -> CheckResult:
        fields = self._header.header
        self._result.total_clusters = self._geometry.clusters(fields.size)
        self._snapshots = await self._references.snapshots()
        table = await self._read_refcount_table()
        refcounts = self._refcounts(table)
        if self._fix is Fix.ALL:
            await self._replace_blocks(refcounts)
        end = max(self._geometry.clusters(self._references.end), 1)
        for begin in range(0, end, self._window):
            await self._check_window(refcounts, begin, min(begin + self._window, end))
            self._is_first_walk = False
        if self._fix is not Fix.NOTHING:
            await refcounts.write_back()
            await self._files.flush()
        await self._check_copied(refcounts)
        await self._settle_marks()
        return self._result

    def _refcounts(self, table: Words) -> Refcounts:
        geometry = self._geometry
        return Refcounts(
            geometry,
            self._files,
            self._header,
            table,
            MetadataMap(geometry.cluster_bits, ()),
            Reclaim(),
            _BLOCKS,
        )

    async def _read_refcount_table(self) -> Words:
        """The refcount table, without entries that cannot be."""
        fields = self._header.header
        count = (fields.refcount_table_clusters << fields.cluster_bits) // ENTRY_SIZE
        table = await self._files.read_words(fields.refcount_table_offset, count)
        seen: set[int] = set()
        for index, entry in enumerate(table):
            if not entry:
                continue
            offset = entry & REFCOUNT_OFFSET_MASK
            problem = ""
            if offset % self._geometry.cluster_size:
                problem = "is not cluster aligned; refcount table entry corrupted"
            elif not self._references.is_inside(offset, self._geometry.cluster_size):
                problem = "is outside image"
            elif offset in seen:
                problem = "is there twice"
            seen.add(offset)
            if problem:
                self._result.report(f"ERROR refcount block {index} {problem}")
                table[index] = 0
                # The new entry is written with the new block.
                self._result.corruptions_fixed += self._fix is Fix.ALL
        return table

    # Refcount blocks that cannot be kept

    async def _replace_blocks(self, refcounts: Refcounts) -> None:
        """Give every cluster of the file a block that counts it and that nothing else refers to.

        New ones go behind the end of the file: what is free, refcounts cannot tell now.
        """
        bits = self._geometry.cluster_bits
        blocks = {
            (entry & REFCOUNT_OFFSET_MASK) >> bits: index
            for index, entry in enumerate(refcounts.table)
            if entry
        }
        users = dict.fromkeys(blocks, 1)
        async for reference in self._all_references():
            first, last = self._clusters_of(reference)
            for cluster in range(first, last + 1):
                if cluster in users:
                    users[cluster] += 1
        for cluster, count in users.items():
            if count > 1:
                self._report_block(blocks[cluster], count)
                self._result.corruptions_fixed += 1
                refcounts.blocks.drop(blocks[cluster])
        await self._add_blocks(refcounts)

    async def _add_blocks(self, refcounts: Refcounts) -> None:
        size, per_block = self._geometry.cluster_size, self._geometry.refcounts_per_block
        end = self._geometry.clusters(self._references.end)
        index = 0
        while index * per_block < end:
            if index >= len(refcounts.table):
                raise NodeError(errno.EFBIG, "the refcount table is too small for the file")
            if not refcounts.table[index]:
                await self._files.write(end * size, bytes(size))
                refcounts.blocks.add(index, end)
                end += 1
            index += 1
        self._references.end = max(end * size, self._references.end)

    def _report_block(self, index: int, users: int) -> None:
        self._result.report(f"ERROR refcount block {index} refcount={users}")

    # Counting references

    async def _all_references(self) -> AsyncIterator[Reference]:
        """All of the image, but those to refcount blocks."""
        for reference in await self._references.metadata(self._snapshots):
            yield reference
        fields = self._header.header
        places = [(fields.l1_offset, fields.l1_size, True)]
        places += [(each.l1_offset, each.l1_size, False) for each in self._snapshots]
        for l1_offset, l1_size, is_active in places:
            walk = self._references.l2_tables(l1_offset, l1_size, is_active=is_active)
            async for table in walk:
                yield Reference(table.offset, self._geometry.cluster_size)
                for reference in self._references.data_in(table):
                    yield reference
                if is_active and self._is_first_walk:
                    self._take_statistics(table)

    async def _check_window(self, refcounts: Refcounts, begin: int, end: int) -> None:
        counts = array("I", bytes(4 * (end - begin)))
        async for reference in self._all_references():
            first, last = self._clusters_of(reference)
            for cluster in range(max(first, begin), min(last + 1, end)):
                counts[cluster - begin] += 1
        for index, entry in enumerate(refcounts.table):
            cluster = (entry & REFCOUNT_OFFSET_MASK) >> self._geometry.cluster_bits
            if entry and begin <= cluster < end:
                counts[cluster - begin] += 1
                if counts[cluster - begin] > 1:
                    self._report_block(index, counts[cluster - begin])
        await self._compare(refcounts, counts, begin)

    def _clusters_of(self, reference: Reference) -> tuple[int, int]:
        """The first and the last cluster; the last is before the first if they cannot be."""
        bits = self._geometry.cluster_bits
        offset, length = reference
        if not self._references.is_inside(offset, length):
            self._report_once(
                "ERROR: counting reference for region exceeding the end of the file by one"
                f" cluster or more: offset {offset:#x} size {length:#x}"
            )
            return 0, -1
        return offset >> bits, (offset + length - 1) >> bits

    def _take_statistics(self, table: L2Table) -> None:
        geometry, result = self._geometry, self._result
        expected = 0
        for _, entry in table.present(geometry.stride):
            if entry & COMPRESSED:
                result.compressed_clusters += 1
                result.fragmented_clusters += 1
            elif entry & OFFSET_MASK or (geometry.has_data_file and entry & COPIED):
                place = entry & OFFSET_MASK
                if expected and place != expected:
                    result.fragmented_clusters += 1
                expected = place + geometry.cluster_size
            else:
                continue
            result.allocated_clusters += 1

    # Comparing

    async def _compare(self, refcounts: Refcounts, counts: array[int], begin: int) -> None:
        """Look for what is counted otherwise, a block at a time."""
        per_block = self._geometry.refcounts_per_block
        place = 0
        while place < len(counts):
            stop = min(place + per_block - (begin + place) % per_block, len(counts))
            part = counts[place:stop]
            if await refcounts.holds(begin + place, part):
                used = len(part.tobytes().rstrip(b"\0")) + part.itemsize - 1
                self._note_end(begin + place + used // part.itemsize)
            else:
                for index, wanted in enumerate(part, begin + place):
                    await self._compare_one(refcounts, index, wanted)
            place = stop

    async def _compare_one(self, refcounts: Refcounts, cluster: int, wanted: int) -> None:
        result = self._result
        found = await self._found(refcounts, cluster)
        if found or wanted:
            self._note_end(cluster + 1)
        if found == wanted:
            return
        is_leak = found > wanted
        verb = "Leaked" if is_leak else "ERROR"
        result.say(f"{verb} cluster {cluster} refcount={found} reference={wanted}")
        is_fixed = self._fix is Fix.ALL or (is_leak and self._fix is Fix.LEAKS)
        if is_fixed:
            await refcounts.add(cluster, 1, wanted - found)
        if is_leak:
            result.leaks += 1
            result.leaks_fixed += is_fixed
        else:
            result.corruptions += 1
            result.corruptions_fixed += is_fixed

    def _note_end(self, cluster: int) -> None:
        """Take note that all clusters in use so far are before this one."""
        if cluster << self._geometry.cluster_bits > self._result.image_end_offset:
            self._result.image_end_offset = cluster << self._geometry.cluster_bits

    async def _found(self, refcounts: Refcounts, cluster: int) -> int:
        found = refcounts.cached_count(cluster)
        return await refcounts.count(cluster) if found is None else found

    # Flags that follow from refcounts

    async def _check_copied(self, refcounts: Refcounts) -> None:
        fields = self._header.header
        walk = self._references.l2_tables(fields.l1_offset, fields.l1_size, is_active=True)
        silent = self._references
        async for table in walk:
            await self._check_l1_entry(refcounts, table)
            if not silent.is_inside(table.offset, self._geometry.cluster_size):
                continue
            await self._check_l2_entries(refcounts, table)

    async def _check_l1_entry(self, refcounts: Refcounts, table: L2Table) -> None:
        bits = self._geometry.cluster_bits
        users = await self._found(refcounts, table.offset >> bits)
        if (users == 1) == bool(table.entry & COPIED):
            return
        self._result.report(
            f"ERROR OFLAG_COPIED L2 cluster: l1_index={table.number} l1_entry={table.entry:x}"
            f" refcount={users}"
        )
        if self._fix is Fix.ALL:
            entry = table.entry & ~COPIED | (COPIED if users == 1 else 0)
            place = self._header.header.l1_offset + table.number * ENTRY_SIZE
            await self._files.write(place, entry.to_bytes(ENTRY_SIZE))
            self._result.corruptions_fixed += 1

    async def _check_l2_entries(self, refcounts: Refcounts, table: L2Table) -> None:
        geometry = self._geometry
        if geometry.has_data_file:
            return
        wrong = 0
        for index, entry in table.present(geometry.stride):
            place = entry & OFFSET_MASK
            if entry & COMPRESSED:
                is_wrong = bool(entry & COPIED)
            elif not place or place % geometry.cluster_size:
                continue
            else:
                cluster = place >> geometry.cluster_bits
                users = refcounts.cached_count(cluster)
                if users is None:  # asking with `await` each time would take twice as long
                    users = await refcounts.count(cluster)
                is_wrong = (users == 1) != bool(entry & COPIED)
            if is_wrong:
                wrong += 1
                self._result.report(f"ERROR OFLAG_COPIED data cluster: l2_entry={entry:x}")
                table.words[index] ^= COPIED
        if wrong and self._fix is Fix.ALL:
            await self._files.write(table.offset, bytes_of(table.words))
            self._result.corruptions_fixed += wrong

    async def _settle_marks(self) -> None:
        """Take the marks away that an image without faults need not have."""
        marks = Incompatible.DIRTY | Incompatible.CORRUPT
        incompatible = self._header.header.incompatible
        result = self._result
        if self._fix is not Fix.ALL or not incompatible & marks:
            return
        if result.corruptions == result.corruptions_fixed:
            await self._files.flush()
            await self._header.change(incompatible=incompatible & ~marks)


async def repair_dirty(header: HeaderFile, files: Files) -> None:
    """Make refcounts true again after a crash of whoever wrote them late.

    Raises:
        NodeError: That is not possible, as more than refcounts is wrong.
    """
    try:
        result = await check(header, files, Fix.ALL)
    except CorruptionError as error:
        raise NodeError(errno.EIO, str(error)) from error
    if result.corruptions > result.corruptions_fixed:
        raise NodeError(errno.EIO, "the image is dirty and cannot be repaired")
    logger.info("a dirty image was repaired: %d leaks", result.leaks)
