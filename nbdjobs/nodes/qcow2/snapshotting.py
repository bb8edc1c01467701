# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots are taken, deleted and applied, while no request is in flight.

A snapshot is a copy of the L1 table. What both tables lead to is counted twice from then on, and
is copied before it is changed:

    active L1 ──▶ L2 ──▶ data           active L1 ──┐
                                 take               ├──▶ L2 ──▶ data    counted twice, not COPIED
                                        its copy  ──┘

Each change takes effect by one write of the header, with the snapshot table or the L1 table that
it leads to stable before. Counters go up before that write and down after it, so whatever a crash
leaves counts too much, never too little. The flags that follow from counters (COPIED) cannot
change at the same instant: meanwhile images of version 3 are marked as dirty, and who opens one
after a crash repairs it.

Source: QEMU `docs/interop/qcow2`; `block/qcow2-snapshot.c` for the behaviour.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final, NamedTuple

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.qcow2 import constants
from nbdjobs.nodes.qcow2.constants import COMPRESSED, COPIED, ENTRY_SIZE, OFFSET_MASK, Incompatible
from nbdjobs.nodes.qcow2.errors import CorruptionError
from nbdjobs.nodes.qcow2.files import bytes_of
from nbdjobs.nodes.qcow2.image import Image
from nbdjobs.nodes.qcow2.mapping import Words
from nbdjobs.nodes.qcow2.overlap import Metadata
from nbdjobs.nodes.qcow2.reclaim import Freed, Reason
from nbdjobs.nodes.qcow2.snapshots import Snapshot

MAX_NAME: Final = 255
"""Bytes of a name that QEMU keeps."""


class _Table(NamedTuple):
    """An L2 table.

    Attributes:
        number: Of the entry of L1 that leads to it.
        offset: Where it is in the file.
        words: Its entries.
    """

    number: int
    offset: int
    words: Words


async def take(image: Image, name: str, date_ns: int, size: int) -> None:
    """Take a snapshot of the disk as it is.

    Args:
        image: The image.
        name: What users call it, cut to 255 bytes.
        date_ns: Nanoseconds since the epoch.
        size: Bytes of the disk.

    Raises:
        NodeError: It failed, and there is no new snapshot.
        CorruptionError: The image is damaged.
    """
    if len(image.snapshots) >= constants.MAX_SNAPSHOTS:
        raise NodeError(errno.EFBIG)
    await _settle(image)
    is_clean = await _mark(image)
    await _count_in(image, image.tables.l1, is_clean)
    await image.refcounts.write_back()
    await image.files.flush()
    await _settle_flags(image)
    l1_offset = await _write_table(image, bytes_of(image.tables.l1))
    snapshot = Snapshot.new(
        identifier=_next_identifier(image.snapshots),
        name=name.encode(errors="surrogateescape")[:MAX_NAME],
        l1_offset=l1_offset,
        l1_size=len(image.tables.l1),
        date_ns=date_ns,
        size=size,
    )
    await _replace_list(image, (*image.snapshots, snapshot), marks=_without_mark(image, is_clean))


async def delete(image: Image, snapshot: Snapshot) -> None:
    """Delete a snapshot of the image.

    Raises:
        NodeError: It failed. If it is gone from the list, space may be lost that a check finds.
        CorruptionError: The image is damaged.
    """
    await _settle(image)
    l1 = await image.files.read_words(snapshot.l1_offset, snapshot.l1_size)
    is_clean = _may_mark(image)
    marks = image.header.header.incompatible | (Incompatible.DIRTY if is_clean else 0)
    kept = tuple(each for each in image.snapshots if each is not snapshot)
    await _replace_list(image, kept, marks=marks)
    await _count_off(image, l1, Reason.SNAPSHOT)
    await _release(image, snapshot.l1_offset, snapshot.l1_size * ENTRY_SIZE, Reason.SNAPSHOT)
    await _finish(image, is_clean)


async def apply(image: Image, snapshot: Snapshot, set_size: Callable[[int], None]) -> None:
    """Make the disk what it was when a snapshot was taken; the snapshot stays.

    Args:
        image: The image.
        snapshot: One of its snapshots.
        set_size: Tells the node which range is inside the disk.

    Raises:
        CommandError: The disk had another size, and that cannot be changed back.
        NodeError: It failed. The disk is as it was before or as it is to be, and space may be
            lost that a check finds.
        CorruptionError: The image is damaged.
    """
    header, geometry = image.header, image.geometry
    size = header.header.size if snapshot.size is None else snapshot.size
    if size != header.header.size and header.header.bitmaps is not None:
        raise CommandError("Can't resize an image which has bitmaps")
    await _settle(image)
    new = await image.files.read_words(snapshot.l1_offset, snapshot.l1_size)
    new.extend([0] * (geometry.l1_entries(size) - len(new)))
    for index, entry in enumerate(new):
        new[index] = entry & ~COPIED
    is_clean = await _mark(image)
    await _count_in(image, new, is_clean)
    offset = await _write_table(image, bytes_of(new))
    await image.refcounts.write_back()
    await image.files.flush()
    before = header.header
    old = image.tables.l1
    await header.change(l1_offset=offset, l1_size=len(new), size=size)
    image.tables.slices.clear()
    image.tables.l1 = new
    set_size(size)
    image.metadata.set_area(Metadata.ACTIVE_L1, offset, len(new) * ENTRY_SIZE)
    image.metadata.l2_tables = {
        (entry & OFFSET_MASK) >> geometry.cluster_bits for entry in new if entry
    }
    await _count_off(image, old, Reason.OTHER)
    await _release(image, before.l1_offset, before.l1_size * ENTRY_SIZE, Reason.OTHER)
    await _finish(image, is_clean)


# The order of things


async def _settle(image: Image) -> None:
    """Bring the tables to stable storage, and free what waits for that."""
    await image.prepare()
    await image.flush()
    await image.committer.reclaim()


def _may_mark(image: Image) -> bool:
    fields = image.header.header
    return fields.version > 2 and not fields.incompatible & Incompatible.DIRTY


async def _mark(image: Image) -> bool:
    """Mark the image as dirty; returns whether it was not before, so that the mark may go."""
    if not _may_mark(image):
        return False
    marks = image.header.header.incompatible | Incompatible.DIRTY
    await image.header.change(incompatible=marks)
    return True


def _without_mark(image: Image, is_clean: bool) -> int:
    marks = image.header.header.incompatible
    return marks & ~Incompatible.DIRTY if is_clean else marks


async def _finish(image: Image, is_clean: bool) -> None:
    """Let flags follow the counters, and take the mark away."""
    await image.refcounts.write_back()
    await image.files.flush()
    await _settle_flags(image)
    if is_clean:
        await image.header.change(incompatible=_without_mark(image, is_clean))


async def _replace_list(image: Image, snapshots: tuple[Snapshot, ...], *, marks: int) -> None:
    """Write a new table of snapshots, and let the header lead to it."""
    fields = image.header.header
    packed = b"".join(snapshot.pack() for snapshot in snapshots)
    if len(packed) > constants.MAX_SNAPSHOT_TABLE_BYTES:
        raise NodeError(errno.EFBIG)
    old_length = sum(len(snapshot.pack()) for snapshot in image.snapshots)
    offset = await _write_table(image, packed)
    await image.refcounts.write_back()
    await image.files.flush()
    await image.header.change(
        snapshot_count=len(snapshots), snapshots_offset=offset, incompatible=marks
    )
    image.set_snapshots(snapshots)
    await _release(image, fields.snapshots_offset, old_length, Reason.OTHER)


async def _write_table(image: Image, content: bytes) -> int:
    """Write a structure of one piece to clusters of its own; returns its offset, 0 for nothing."""
    if not content:
        return 0
    geometry = image.geometry
    clusters = geometry.clusters(len(content))
    first = await image.refcounts.allocate_table(clusters)
    image.refcounts.claim_virgin(first, clusters)
    offset = first << geometry.cluster_bits
    try:
        await image.files.write(offset, content.ljust(clusters << geometry.cluster_bits, b"\0"))
    except BaseException:
        image.refcounts.release(first, clusters)
        raise
    return offset


# Counters


async def _count_in(image: Image, l1: Words, is_clean: bool) -> None:
    """Count everything that an L1 table leads to once more; a failure leaves all as it was."""
    done = 0
    try:
        async for table in _tables(image, l1):
            for first, count in _references(image, table):
                await _check_counters(image, first, count)
                await image.refcounts.add(first, count, 1)
                done += 1
    except BaseException:
        async for table in _tables(image, l1):
            for first, count in _references(image, table):
                if done:
                    await image.refcounts.add(first, count, -1)
                    done -= 1
        await image.refcounts.write_back()
        await image.files.flush()
        if is_clean:
            await image.header.change(incompatible=_without_mark(image, is_clean))
        raise


async def _check_counters(image: Image, first: int, count: int) -> None:
    """Refuse clusters that are not counted, or that cannot be counted once more."""
    refcounts = image.refcounts
    for cluster in range(first, first + count):
        found = refcounts.cached_count(cluster)
        users = await refcounts.count(cluster) if found is None else found
        if not users:
            offset = cluster << image.geometry.cluster_bits
            raise CorruptionError("Cluster in use has no refcount", offset=offset, is_fatal=False)
        if users >= image.geometry.max_refcount:
            raise NodeError(errno.EINVAL)


async def _count_off(image: Image, l1: Words, reason: Reason) -> None:
    """Count everything off that an L1 table leads to, which is not in the file any more."""
    may_discard = image.reclaim.may_discard(reason)
    async for table in _tables(image, l1):
        await image.committer.count_off(
            [Freed(first, count, may_discard) for first, count in _references(image, table)]
        )


async def _release(image: Image, offset: int, length: int, reason: Reason) -> None:
    if length:
        geometry = image.geometry
        first, clusters = offset >> geometry.cluster_bits, geometry.clusters(length)
        await image.committer.count_off([Freed(first, clusters, image.reclaim.may_discard(reason))])


async def _tables(image: Image, l1: Words) -> AsyncIterator[_Table]:
    """The L2 tables of an L1 table, as they are in the file."""
    size = image.geometry.cluster_size
    for index, entry in enumerate(l1):
        offset = entry & OFFSET_MASK
        if not offset:
            continue
        _check_place(image, offset, "L2 table")
        yield _Table(index, offset, await image.files.read_words(offset, size // ENTRY_SIZE))


def _references(image: Image, table: _Table) -> Iterator[tuple[int, int]]:
    """The table itself and what its entries refer to: clusters, where they follow each other.

    No run goes beyond what one refcount block counts.
    """
    geometry = image.geometry
    bits, per_block = geometry.cluster_bits, geometry.refcounts_per_block
    first, count = table.offset >> bits, 1
    for entry in table.words[:: geometry.stride]:
        if entry & COMPRESSED:
            begin, length = image.compressed.users(entry)
            _check_place(image, begin << bits, "compressed cluster")
            for cluster in range(begin, begin + length):
                yield cluster, 1
            continue
        offset = entry & OFFSET_MASK
        if not offset:
            continue
        cluster = offset >> bits
        if cluster == first + count and cluster % per_block:
            _check_place(image, offset, "data cluster")
            count += 1
            continue
        yield first, count
        _check_place(image, offset, "data cluster")
        first, count = cluster, 1
    yield first, count


def _check_place(image: Image, offset: int, what: str) -> None:
    """Refuse places where nothing can be, before counters are made for them."""
    if offset % image.geometry.cluster_size:
        raise CorruptionError(f"{what} offset {offset:#x} unaligned", offset=offset)
    if offset > image.files.file.size:
        raise CorruptionError(f"{what} offset {offset:#x} is outside of the image", offset=offset)


# Flags


async def _settle_flags(image: Image) -> None:
    """Let COPIED say of all that the active tables refer to whether it is counted once."""
    tables, bits = image.tables, image.geometry.cluster_bits
    l1 = tables.l1[:]
    async for table in _tables(image, tables.l1):
        users = await image.refcounts.count(table.offset >> bits)
        entry = l1[table.number]
        # The entries of a table that was shared before and still is are all shared, too.
        if entry & COPIED or users == 1:
            changed = await _flagged(image, table.words)
            if changed != table.words:
                await image.files.write(table.offset, bytes_of(changed))
        l1[table.number] = entry & ~COPIED | (COPIED if users == 1 else 0)
    if l1:
        await image.files.write(image.header.header.l1_offset, bytes_of(l1))
    await image.files.flush()
    tables.slices.clear()
    tables.l1 = l1


async def _flagged(image: Image, words: Words) -> Words:
    """Entries of an L2 table with the flags that follow from the counters."""
    geometry, refcounts = image.geometry, image.refcounts
    changed = array("Q", words)
    for index in range(0, len(words), geometry.stride):
        entry = words[index]
        if entry & COMPRESSED or not entry & OFFSET_MASK:
            continue
        cluster = (entry & OFFSET_MASK) >> geometry.cluster_bits
        found = refcounts.cached_count(cluster)
        users = await refcounts.count(cluster) if found is None else found
        changed[index] = entry & ~COPIED | (COPIED if users == 1 else 0)
    return changed


def _next_identifier(snapshots: tuple[Snapshot, ...]) -> bytes:
    """One more than the greatest number among the identifiers."""
    numbers = [int(each.identifier) for each in snapshots if each.identifier.isdigit()]
    return str(max(numbers, default=0) + 1).encode()
