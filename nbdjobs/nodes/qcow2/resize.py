# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Changing the size of the disk; no request is in flight meanwhile.

What is new must read as zeroes: what the backing file has there, and what the old last cluster
holds behind the old end, is covered before the header tells of the new size. What is cut off
goes from the mapping before the header tells of that.

Source: QEMU `block/qcow2.c` (qcow2_co_truncate) for the conditions and their texts.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.config import SECTOR
from nbdjobs.nodes.qcow2.constants import COMPRESSED, ENTRY_SIZE, MAX_L1_BYTES, OFFSET_MASK
from nbdjobs.nodes.qcow2.files import bytes_of
from nbdjobs.nodes.qcow2.image import Image
from nbdjobs.nodes.qcow2.overlap import Metadata
from nbdjobs.nodes.qcow2.reclaim import Reason
from nbdjobs.nodes.qcow2.unbroken import unbroken
from nbdjobs.nodes.rounding import round_up


async def resize(image: Image, old: int, new: int, set_size: Callable[[int], None]) -> None:
    """Make the disk `new` bytes long. Cancelling takes effect only when that is done.

    Args:
        image: The image.
        old: Its size now.
        new: Its size then.
        set_size: Tells the node which range is inside the disk.

    Raises:
        CommandError: That is not possible; nothing has changed.
        NodeError: It failed; the disk is as large as before, but a part to be cut off may read as
            zeroes already.
        CorruptionError: The image is damaged.
    """
    _check(image, new)
    await unbroken(_resize(image, old, new, set_size))


async def _resize(image: Image, old: int, new: int, set_size: Callable[[int], None]) -> None:
    try:
        if new > old:
            await _grow(image, old, new, set_size)
        elif new < old:
            await _cut(image, old, new)
        await image.flush()
        await image.header.change(size=new)
    except BaseException:
        set_size(old)
        raise
    set_size(new)


def _check(image: Image, new: int) -> None:
    header = image.header.header
    if new % SECTOR:
        raise CommandError(f"The new size must be a multiple of {SECTOR}")
    if image.snapshots and header.version < 3:
        raise CommandError("Can't resize a version 2 image which has snapshots")
    if header.bitmaps is not None:
        raise CommandError("Can't resize an image which has bitmaps")
    if image.geometry.l1_entries(new) * ENTRY_SIZE > MAX_L1_BYTES:
        raise CommandError("Failed to grow the L1 table: File too large")


async def _grow(image: Image, old: int, new: int, set_size: Callable[[int], None]) -> None:
    entries = image.geometry.l1_entries(new)
    if entries > len(image.tables.l1):
        await _grow_l1(image, entries)
    if image.header.header.is_data_file_raw:
        await image.files.data.truncate(new)
    set_size(new)
    end = min(round_up(old, image.geometry.cluster_size), new)
    await image.zeroer.write_zeroes(old, end)
    backing = image.files.backing
    hidden = 0 if backing is None else min(backing.size, new)
    if hidden > end:
        try:
            await image.zeroer.zero(end, hidden - end, may_unmap=True, fast_only=False)
        except NodeError as error:
            if error.errno != errno.ENOTSUP:
                raise
            await image.zeroer.write_zeroes(end, hidden)


async def _grow_l1(image: Image, entries: int) -> None:
    """Move the L1 table to where it has room for more."""
    geometry, tables, header = image.geometry, image.tables, image.header
    clusters = geometry.clusters(entries * ENTRY_SIZE)
    await image.committer.run()
    first = await image.refcounts.allocate_table(clusters)
    image.refcounts.claim_virgin(first, clusters)
    grown = tables.l1[:]
    grown.extend([0] * (entries - len(grown)))
    offset = first << geometry.cluster_bits
    old_offset, old_size = header.header.l1_offset, header.header.l1_size
    try:
        content = bytes_of(grown).ljust(clusters << geometry.cluster_bits, b"\0")
        await image.refcounts.write_back()
        await image.files.write(offset, content)
        await image.files.file.flush()
        await header.change(l1_offset=offset, l1_size=entries)
    except BaseException:
        image.refcounts.release(first, clusters)
        raise
    tables.l1 = grown
    image.metadata.set_area(Metadata.ACTIVE_L1, offset, entries * ENTRY_SIZE)
    if old_size:
        image.reclaim.drop(
            old_offset >> geometry.cluster_bits, geometry.clusters(old_size * ENTRY_SIZE)
        )


async def _cut(image: Image, old: int, new: int) -> None:
    """Take everything behind the new end out of the mapping."""
    geometry, tables = image.geometry, image.tables
    begin = round_up(new, geometry.cluster_size)
    end = round_up(old, geometry.cluster_size)
    while begin < end:
        number = begin >> tables.slice_shift
        stop = min(end, (number + 1) << tables.slice_shift)
        if await tables.slice(number) is not None:
            slice_ = await tables.writable_slice(number)
            first = (begin >> geometry.cluster_bits) & tables.index_mask
            count = (stop - begin) >> geometry.cluster_bits
            for index in range(first * geometry.stride, (first + count) * geometry.stride):
                entry = slice_.words[index]
                is_bitmap = geometry.stride == 2 and index % 2
                if entry & (OFFSET_MASK | COMPRESSED) and not is_bitmap:
                    image.writer.drop(entry, Reason.REQUEST)
                slice_.words[index] = 0
            tables.mark(number, slice_)
        begin = stop
    await image.flush()
    _drop_tables(image, geometry.l1_entries(new))
    if image.header.header.is_data_file_raw:
        await image.files.data.truncate(new)


def _drop_tables(image: Image, kept: int) -> None:
    """Give up L2 tables that describe nothing any more, and forget what is cached of them."""
    tables, bits = image.tables, image.geometry.cluster_bits
    shift = image.geometry.l1_shift - tables.slice_shift
    for number in [number for number in tables.slices if number >> shift >= kept]:
        del tables.slices[number]
    for index in range(kept, len(tables.l1)):
        entry = tables.l1[index]
        if entry:
            cluster = (entry & OFFSET_MASK) >> bits
            image.metadata.l2_tables.discard(cluster)
            image.reclaim.drop(cluster)
            tables.l1[index] = 0
            tables.mark_l1(index)
