# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""An open image: its parts put together, what comes before its first change, and its end.

reader, writer, zeroer ──▶ tables ──▶ refcounts ──▶ files
▲           ▲
└─ commit ──┘
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Self

from nbdjobs.errors import CommandError
from nbdjobs.nodes.qcow2 import constants
from nbdjobs.nodes.qcow2.bitmaps import mark_changed
from nbdjobs.nodes.qcow2.commit import Committer
from nbdjobs.nodes.qcow2.compressed import CompressedClusters
from nbdjobs.nodes.qcow2.constants import ENTRY_SIZE, OFFSET_MASK, Incompatible
from nbdjobs.nodes.qcow2.files import Files
from nbdjobs.nodes.qcow2.header_file import HeaderFile
from nbdjobs.nodes.qcow2.mapping import Words
from nbdjobs.nodes.qcow2.options import CacheSizes
from nbdjobs.nodes.qcow2.overlap import Metadata, MetadataMap, tables_in
from nbdjobs.nodes.qcow2.reading import Reader
from nbdjobs.nodes.qcow2.reclaim import Reason, Reclaim
from nbdjobs.nodes.qcow2.refcounts import Refcounts
from nbdjobs.nodes.qcow2.snapshot_table import read_snapshots
from nbdjobs.nodes.qcow2.snapshots import Snapshot, find_snapshot
from nbdjobs.nodes.qcow2.tables import Tables
from nbdjobs.nodes.qcow2.writing import Writer
from nbdjobs.nodes.qcow2.zeroing import Zeroer


class Image:
    """The parts of one open image.

    Attributes:
        header: The header.
        geometry: Sizes that follow from it.
        files: The nodes below.
        snapshots: The internal snapshots.
        reclaim: Clusters on their way to being free.
        refcounts: Which clusters are in use.
        tables: The mapping.
        committer: Brings changes of both to stable storage.
        compressed: Compressed clusters.
        reader: Reads.
        writer: Writes.
        zeroer: Writes zeroes and discards.
        is_prepared: Nothing has to happen any more before a change.
    """

    def __init__(
        self,
        header: HeaderFile,
        files: Files,
        l1: Words,
        refcount_table: Words,
        snapshots: tuple[Snapshot, ...],
        *,
        name: str,
        sizes: CacheSizes,
        checked: Iterable[Metadata],
        discarded: Iterable[Reason],
        disk_size: Callable[[], int],
        is_lazy: bool,
    ):
        self.header = header
        self.files = files
        self.snapshots = snapshots
        self.geometry = geometry = header.header.geometry
        self.is_lazy = is_lazy
        self._preparing = asyncio.Lock()
        self.is_prepared = not is_lazy and header.header.bitmaps is None
        self.reclaim = Reclaim(discarded)
        self.metadata = self._map_metadata(l1, refcount_table, checked)
        self.refcounts = Refcounts(
            geometry,
            files,
            header,
            refcount_table,
            self.metadata,
            self.reclaim,
            sizes.refcount_blocks,
        )
        self.refcounts.virgin = geometry.clusters(files.file.size)
        self.tables = Tables(
            geometry,
            files,
            l1,
            self.refcounts,
            self.reclaim,
            self.metadata,
            sizes.slice_size,
            sizes.slices,
            commit=lambda: self.committer.run(),
            changed=lambda: self.committer.changed(),
        )
        self.compressed = CompressedClusters(
            geometry, files, self.refcounts, header.header.compression_type, name
        )
        self.committer = Committer(
            files,
            header,
            self.refcounts,
            self.tables,
            self.reclaim,
            cluster_bits=geometry.cluster_bits,
            on_freed=self.compressed.forget,
            is_lazy=is_lazy,
        )
        self.reclaim.changed = self.committer.changed
        self.reader = Reader(geometry, files, self.tables, self.compressed)
        self.writer = Writer(
            geometry,
            files,
            self.tables,
            self.refcounts,
            self.reclaim,
            self.metadata,
            self.reader,
            self.compressed,
            disk_size,
        )
        self.zeroer = Zeroer(
            geometry,
            files,
            self.tables,
            self.reader,
            self.writer,
            self.reclaim,
            disk_size,
            is_data_file_raw=header.header.is_data_file_raw,
        )

    @classmethod
    async def open(
        cls,
        header: HeaderFile,
        files: Files,
        *,
        name: str,
        sizes: CacheSizes,
        checked: Iterable[Metadata],
        discarded: Iterable[Reason],
        disk_size: Callable[[], int],
        is_lazy: bool,
        shown: str | None = None,
    ) -> Self:
        """Read the tables that are kept in memory whole.

        With `shown`, the snapshot of that id or name is read in place of the disk as it is.

        Raises:
            CommandError: One of them cannot be true, or there is no such snapshot.
            NodeError: One of them cannot be read.
        """
        fields = header.header
        # Writing them would make the file as large as a damaged header wants.
        if fields.l1_size and fields.l1_offset >= files.file.size:
            raise CommandError("Active L1 table offset invalid")
        if fields.refcount_table_offset >= files.file.size:
            raise CommandError("Reference count table offset invalid")
        snapshots = await read_snapshots(header.header, files)
        l1 = await _read_l1(header, files, snapshots, shown)
        count = (fields.refcount_table_clusters << fields.cluster_bits) // ENTRY_SIZE
        table = await files.read_words(fields.refcount_table_offset, count)
        return cls(
            header,
            files,
            l1,
            table,
            snapshots,
            name=name,
            sizes=sizes,
            checked=checked,
            discarded=discarded,
            disk_size=disk_size,
            is_lazy=is_lazy,
        )

    def _map_metadata(
        self, l1: Words, refcount_table: Words, checked: Iterable[Metadata]
    ) -> MetadataMap:
        fields, bits = self.header.header, self.geometry.cluster_bits
        found = MetadataMap(bits, checked)
        found.set_area(Metadata.HEADER, 0, 1)
        found.set_area(Metadata.ACTIVE_L1, fields.l1_offset, len(l1) * ENTRY_SIZE)
        found.set_area(
            Metadata.REFCOUNT_TABLE,
            fields.refcount_table_offset,
            fields.refcount_table_clusters << bits,
        )
        self._map_snapshots(found, self.snapshots)
        bitmaps = fields.bitmaps
        if bitmaps is not None:
            found.set_area(
                Metadata.BITMAP_DIRECTORY, bitmaps.directory_offset, bitmaps.directory_size
            )
        found.l2_tables = tables_in(l1, bits, OFFSET_MASK)
        found.refcount_blocks = tables_in(refcount_table, bits, constants.REFCOUNT_OFFSET_MASK)
        return found

    def _map_snapshots(self, found: MetadataMap, snapshots: tuple[Snapshot, ...]) -> None:
        length = sum(len(snapshot.pack()) for snapshot in snapshots)
        found.set_area(Metadata.SNAPSHOT_TABLE, self.header.header.snapshots_offset, length)
        for number, snapshot in enumerate(snapshots):
            length = snapshot.l1_size * ENTRY_SIZE
            found.set_area(Metadata.INACTIVE_L1, snapshot.l1_offset, length, number)

    def set_snapshots(self, snapshots: tuple[Snapshot, ...]) -> None:
        """Take note of other snapshots, to which the header leads."""
        for number in range(len(self.snapshots)):
            self.metadata.set_area(Metadata.INACTIVE_L1, 0, 0, number)
        self.snapshots = snapshots
        self._map_snapshots(self.metadata, snapshots)

    # The first change, and the end

    async def prepare(self) -> None:
        """Make stable what others have to know before the image changes."""
        async with self._preparing:
            if self.is_prepared:
                return
            await self._mark_bitmaps()
            if self.is_lazy:
                incompatible = self.header.header.incompatible | Incompatible.DIRTY
                await self.header.change(incompatible=incompatible)
            self.is_prepared = True

    async def _mark_bitmaps(self) -> None:
        bitmaps = self.header.header.bitmaps
        if bitmaps is None:
            return
        directory = await self.files.read(bitmaps.directory_offset, bitmaps.directory_size)
        try:
            marked = mark_changed(directory, bitmaps.count)
        except CommandError:
            # Nobody can use them, so nobody can be misled.
            return
        if marked is not None:
            await self.files.write(bitmaps.directory_offset, marked)
            await self.files.file.flush()

    async def flush(self) -> None:
        """Bring everything to stable storage that completed requests have changed."""
        await self.committer.run()
        await self.files.flush()

    async def finish(self) -> None:
        """Write all that was put off; no request is in flight.

        Raises:
            NodeError: Something could not be written.
        """
        await self.flush()
        await self.committer.reclaim()
        await self.refcounts.write_back()
        await self.files.flush()
        dirty = Incompatible.DIRTY
        if self.header.header.incompatible & dirty and self.is_lazy:
            await self.header.change(incompatible=self.header.header.incompatible & ~dirty)
            self.is_prepared = False

    async def close(self) -> None:
        """Let go of threads."""
        await self.committer.idle()
        self.compressed.close()


async def _read_l1(
    header: HeaderFile, files: Files, snapshots: tuple[Snapshot, ...], shown: str | None
) -> Words:
    fields = header.header
    if shown is None:
        return await files.read_words(fields.l1_offset, fields.l1_size)
    snapshot = find_snapshot(snapshots, shown)
    if snapshot is None:
        raise CommandError(f"Snapshot '{shown}' does not exist in the image")
    l1 = await files.read_words(snapshot.l1_offset, snapshot.l1_size)
    size = fields.size if snapshot.size is None else snapshot.size
    l1.extend([0] * (fields.geometry.l1_entries(size) - len(l1)))
    return l1
