# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Making a new image: where everything goes is worked out first, then it is written.

    header │ refcount table │ refcount blocks │ L1 table │ keys │ L2 tables │ data
                                                          │      └─ only if preallocated ─┘
                                                          └─ only if encrypted by LUKS

There are no gaps, so every refcount is one. The header comes last: until then the file is no
image at all.

Source: QEMU qapi/block-core.json (BlockdevCreateOptionsQcow2), and the texts of its storage
daemon.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from nbdjobs.errors import CommandError
from nbdjobs.nodes.config import MAX_SIZE, SECTOR
from nbdjobs.nodes.crypto.luks import FilledSlot
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.preallocation import Preallocation
from nbdjobs.nodes.qcow2 import constants
from nbdjobs.nodes.qcow2.constants import (
    COPIED,
    ENTRY_SIZE,
    Autoclear,
    Compatible,
    CompressionType,
    Encryption,
    ExtensionType,
    Incompatible,
)
from nbdjobs.nodes.qcow2.extensions import (
    Extension,
    encryption_pointer,
    feature_table,
    pack_extensions,
)
from nbdjobs.nodes.qcow2.files import bytes_of
from nbdjobs.nodes.qcow2.geometry import Geometry
from nbdjobs.nodes.qcow2.header import V3_LENGTH, Header, additional_for
from nbdjobs.nodes.qcow2.mapping import Words
from nbdjobs.nodes.qcow2.refcount_table import unpack_block

DEFAULT_CLUSTER_SIZE: Final = 65536
DEFAULT_REFCOUNT_BITS: Final = 16
_LEVEL: Final = "compatibility level 1.1 and above (use version=v3 or greater)"
_ZEROES: Final = memoryview(bytes(1024 * 1024))
_LONGEST_WRITE: Final = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateOptions:
    """What the new image is like.

    Attributes:
        size: Bytes of the disk.
        version: 2 or 3.
        cluster_size: Bytes, a power of two from 512 to 2 MiB.
        refcount_bits: Width of a refcount, a power of two from 1 to 64.
        backing_file: Name of the backing file, as it will stand in the image.
        backing_format: Its driver.
        preallocation: What is there from the beginning.
        is_lazy: Refcounts may be written late.
        is_extended: Subclusters are told apart.
        data_file: Name of the external data file, as it will stand in the image.
        is_data_file_raw: That file is a raw image of the disk at any time.
        compression: How clusters will be compressed.
        encryption: How guest clusters will be encrypted; a preallocated disk reads as noise then.
        keys: Header and first key of the LUKS volume, for that method.
    """

    size: int
    version: int = 3
    cluster_size: int = DEFAULT_CLUSTER_SIZE
    refcount_bits: int = DEFAULT_REFCOUNT_BITS
    backing_file: str | None = None
    backing_format: str | None = None
    preallocation: Preallocation = Preallocation.OFF
    is_lazy: bool = False
    is_extended: bool = False
    data_file: str | None = None
    is_data_file_raw: bool = False
    compression: CompressionType = CompressionType.ZLIB
    encryption: Encryption = Encryption.NONE
    keys: FilledSlot | None = None

    def check(self) -> None:
        """Refuse what cannot be or does not go together.

        Raises:
            CommandError: In QEMU's words.
        """
        if self.size % SECTOR:
            raise CommandError(f"Image size must be a multiple of {SECTOR} bytes")
        if self.size < 0:
            raise CommandError("Could not resize image: Image size cannot be negative")
        if self.size > MAX_SIZE:
            raise CommandError(
                f"Could not resize image: offset({self.size}) exceeds maximum({MAX_SIZE})"
            )
        self._check_widths()
        if self.version < 3:
            self._check_version_2()
        if self.is_extended and self.cluster_size < 1 << constants.MIN_EXTENDED_CLUSTER_BITS:
            raise CommandError(
                "Extended L2 entries are only supported with cluster sizes of at least"
                f" {1 << constants.MIN_EXTENDED_CLUSTER_BITS} bytes"
            )
        is_preallocated = self.preallocation is not Preallocation.OFF
        if is_preallocated and self.backing_file is not None and not self.is_extended:
            raise CommandError(
                "Backing file and preallocation can only be used at the same time if"
                " extended_l2 is on"
            )
        if self.backing_format is not None and self.backing_file is None:
            raise CommandError("Backing format cannot be used without backing file")
        if self.is_data_file_raw and self.data_file is None:
            raise CommandError("data-file-raw requires data-file")
        if self.is_data_file_raw and self.backing_file is not None:
            raise CommandError("Backing file and data-file-raw cannot be used at the same time")
        name = self.backing_file
        if name is not None and len(_encoded(name)) > constants.MAX_BACKING_NAME:
            raise self._no_backing_file("Invalid argument")
        geometry = self.geometry
        if geometry.l1_entries(self.size) * ENTRY_SIZE > constants.MAX_L1_BYTES:
            raise CommandError(
                "Could not resize image: Failed to grow the L1 table: File too large"
            )

    def _no_backing_file(self, reason: str) -> CommandError:
        return CommandError(
            f"Could not assign backing file '{self.backing_file}' with format"
            f" '{self.backing_format or '(null)'}': {reason}"
        )

    def check_header(self, length: int) -> None:
        """Refuse a header that does not fit into a cluster."""
        if length > self.cluster_size:
            raise self._no_backing_file("No space left on device")

    def _check_widths(self) -> None:
        size, bits = self.cluster_size, self.refcount_bits
        smallest, largest = 1 << constants.MIN_CLUSTER_BITS, 1 << constants.MAX_CLUSTER_BITS
        if not smallest <= size <= largest or size & (size - 1):
            raise CommandError(
                f"Cluster size must be a power of two between {smallest} and {largest // 1024}k"
            )
        if not 1 <= bits <= 64 or bits & (bits - 1):
            raise CommandError("Refcount width must be a power of two and may not exceed 64 bits")

    def _check_version_2(self) -> None:
        if self.refcount_bits != DEFAULT_REFCOUNT_BITS:
            raise CommandError(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above"
                " (use version=v3 or greater)"
            )
        wanted = {
            "Lazy refcounts only supported with": self.is_lazy,
            "External data files are only supported with": self.data_file is not None,
            "Extended L2 entries are only supported with": self.is_extended,
            "Non-zlib compression type is only supported with": self.compression
            is not CompressionType.ZLIB,
        }
        for what, is_wanted in wanted.items():
            if is_wanted:
                raise CommandError(f"{what} {_LEVEL}")

    @property
    def geometry(self) -> Geometry:
        """Sizes that follow."""
        return Geometry(
            version=self.version,
            cluster_bits=self.cluster_size.bit_length() - 1,
            refcount_order=self.refcount_bits.bit_length() - 1,
            is_extended=self.is_extended,
            has_data_file=self.data_file is not None,
        )

    @property
    def is_mapped(self) -> bool:
        """Whether all of the disk is in the L2 tables from the beginning."""
        # What is read from a raw data file must always be what the disk holds.
        return self.preallocation is not Preallocation.OFF or self.is_data_file_raw

    @property
    def keys_length(self) -> int:
        """Bytes that the LUKS header takes up with all of its key slots."""
        return 0 if self.keys is None else self.keys.header.payload_offset


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of a new image are, in clusters.

    Attributes:
        table_clusters: Of the refcount table, which begins at cluster 1.
        blocks: Refcount blocks, which follow it.
        l1_clusters: Of the L1 table, which follows them.
        keys_clusters: Of the LUKS header and its keys, which follow it.
        l2_tables: L2 tables, which follow them.
        data_clusters: Clusters of data, at the end.
    """

    table_clusters: int
    blocks: int
    l1_clusters: int
    keys_clusters: int
    l2_tables: int
    data_clusters: int

    @property
    def l1_start(self) -> int:
        """First cluster of the L1 table."""
        return 1 + self.table_clusters + self.blocks

    @property
    def keys_start(self) -> int:
        """First cluster of the LUKS header."""
        return self.l1_start + self.l1_clusters

    @property
    def l2_start(self) -> int:
        """First L2 table."""
        return self.keys_start + self.keys_clusters

    @property
    def data_start(self) -> int:
        """First cluster of data."""
        return self.l2_start + self.l2_tables

    @property
    def end(self) -> int:
        """Behind the last cluster."""
        return self.data_start + self.data_clusters


def plan(options: CreateOptions) -> Layout:
    """Work out where everything goes."""
    geometry = options.geometry
    entries = geometry.l1_entries(options.size)
    l1_clusters = max(geometry.clusters(entries * ENTRY_SIZE), 1)
    keys = geometry.clusters(options.keys_length)
    l2_tables = entries if options.is_mapped else 0
    has_data = options.is_mapped and options.data_file is None
    data = geometry.clusters(options.size) if has_data else 0
    table_clusters = blocks = 1
    while True:
        total = 1 + table_clusters + blocks + l1_clusters + keys + l2_tables + data
        needed = -(-total // geometry.refcounts_per_block)
        needed_table = geometry.clusters(needed * ENTRY_SIZE)
        if (needed, needed_table) == (blocks, table_clusters):
            return Layout(table_clusters, blocks, l1_clusters, keys, l2_tables, data)
        blocks, table_clusters = max(needed, blocks), max(needed_table, table_clusters)
        if table_clusters * geometry.cluster_size > constants.MAX_REFCOUNT_TABLE_BYTES:
            raise CommandError("Could not resize image: File too large")


def header_of(options: CreateOptions, layout: Layout) -> Header:
    """The header of a new image."""
    geometry = options.geometry
    bits = geometry.cluster_bits
    extensions = []
    if options.backing_format is not None:
        format_name = options.backing_format.encode()
        extensions.append(Extension(ExtensionType.BACKING_FORMAT, format_name))
    if options.data_file is not None:
        extensions.append(Extension(ExtensionType.DATA_FILE, _encoded(options.data_file)))
    if options.keys is not None:
        place = layout.keys_start << bits
        extensions.append(encryption_pointer(place, options.keys_length))
    name = None if options.backing_file is None else _encoded(options.backing_file)
    additional = additional_for(options.compression) if options.version > 2 else b""
    if options.version > 2:
        with_names = [*extensions, feature_table()]
        fixed = V3_LENGTH + len(additional) + len(name or b"")
        if fixed + len(pack_extensions(with_names)) <= options.cluster_size:
            extensions = with_names
        options.check_header(fixed + len(pack_extensions(extensions)))
    header = Header(
        version=options.version,
        cluster_bits=bits,
        size=options.size,
        crypt_method=options.encryption,
        l1_size=geometry.l1_entries(options.size),
        l1_offset=layout.l1_start << bits,
        refcount_table_offset=1 << bits,
        refcount_table_clusters=layout.table_clusters,
        incompatible=_incompatible(options),
        compatible=Compatible.LAZY_REFCOUNTS if options.is_lazy else 0,
        autoclear=Autoclear.RAW_DATA_FILE if options.is_data_file_raw else 0,
        refcount_order=geometry.refcount_order,
        additional=additional,
        extensions=tuple(extensions),
        backing_file=name,
    )
    header.check()
    return header


def _incompatible(options: CreateOptions) -> int:
    features = 0
    if options.data_file is not None:
        features |= Incompatible.DATA_FILE
    if options.compression is not CompressionType.ZLIB:
        features |= Incompatible.COMPRESSION
    if options.is_extended:
        features |= Incompatible.EXTENDED_L2
    return features


def metadata_of(options: CreateOptions, layout: Layout) -> Iterator[tuple[int, bytes]]:
    """All of a new image but its header and data: offsets and content, a cluster at a time."""
    geometry = options.geometry
    size = geometry.cluster_size
    first = 1 + layout.table_clusters
    places = (range(first, first + layout.blocks), range(layout.l2_start, layout.data_start))
    yield from _words(1, layout.table_clusters, size, [place * size for place in places[0]])
    for number in range(layout.blocks):
        block = unpack_block(bytes(size), geometry.refcount_order)
        begin = number * len(block)
        for position in range(min(len(block), layout.end - begin)):
            block[position] = 1
        yield (first + number) * size, block.pack()
    l1 = [place * size | COPIED for place in places[1]]
    yield from _words(layout.l1_start, layout.l1_clusters, size, l1)
    if options.keys is not None:
        keys = options.keys.area().ljust(layout.keys_clusters * size, b"\0")
        for begin in range(0, len(keys), size):
            yield layout.keys_start * size + begin, keys[begin : begin + size]
    for number, place in enumerate(places[1]):
        yield place * size, bytes_of(_l2_table(options, layout, number))


def _words(first: int, clusters: int, size: int, words: list[int]) -> Iterator[tuple[int, bytes]]:
    """A table that may take several clusters."""
    step = size // ENTRY_SIZE
    for number in range(clusters):
        part = array("Q", words[number * step : (number + 1) * step])
        yield (first + number) * size, bytes_of(part).ljust(size, b"\0")


def _l2_table(options: CreateOptions, layout: Layout, number: int) -> Words:
    geometry = options.geometry
    words = array("Q", bytes(geometry.cluster_size))
    first = number * geometry.l2_entries
    count = min(geometry.l2_entries, geometry.clusters(options.size) - first)
    start = first if options.data_file is not None else layout.data_start + first
    for index in range(count):
        # Of extended entries the bitmap stays empty: reads still see the backing file.
        words[index * geometry.stride] = (start + index) * geometry.cluster_size | COPIED
    if geometry.is_extended and options.is_data_file_raw:
        for index in range(count):
            words[2 * index + 1] = (1 << constants.SUBCLUSTERS) - 1
    return words


def empty_image(options: CreateOptions) -> bytes:
    """A whole new image that is not preallocated, as bytes."""
    options.check()
    layout = plan(options)
    image = bytearray(layout.end * options.cluster_size)
    for offset, data in metadata_of(options, layout):
        image[offset : offset + len(data)] = data
    header = header_of(options, layout).pack()
    image[: len(header)] = header
    return bytes(image)


async def create(options: CreateOptions, file: Node, data_file: Node | None = None) -> None:
    """Make a new image in a file, whose content is lost.

    The caller may write to the nodes and resize them, and nobody else uses them. Failing or being
    cancelled leaves a file that is no image.

    Args:
        options: What the image is like.
        file: Where it goes.
        data_file: The external data file, given if `options` names one.

    Raises:
        CommandError: The options do not fit, in QEMU's words; nothing has changed. Or the file
            cannot be resized.
        NodeError: Writing failed.
    """
    options.check()
    layout = plan(options)
    header = header_of(options, layout)
    packed = header.pack().ljust(options.cluster_size, b"\0")
    await file.truncate(0)
    await file.truncate(layout.end * options.cluster_size)
    await _write_all(file, metadata_of(options, layout))
    if data_file is not None and options.is_mapped:
        await data_file.truncate(options.size)
        await fill(options.preallocation, data_file, 0, options.size)
    elif layout.data_clusters:
        begin = layout.data_start * options.cluster_size
        await fill(options.preallocation, file, begin, layout.data_clusters * options.cluster_size)
    if data_file is not None:
        await data_file.flush()
    await file.flush()
    await file.pwrite(0, memoryview(packed))
    await file.flush()


async def _write_all(file: Node, parts: Iterator[tuple[int, bytes]]) -> None:
    """Write parts that follow each other, several at a time."""
    pending = bytearray()
    begin = 0
    for offset, data in parts:
        if pending and (offset != begin + len(pending) or len(pending) >= _LONGEST_WRITE):
            await file.pwrite(begin, memoryview(bytes(pending)))
            pending.clear()
        if not pending:
            begin = offset
        pending += data
    if pending:
        await file.pwrite(begin, memoryview(bytes(pending)))


async def fill(preallocation: Preallocation, node: Node, offset: int, length: int) -> None:
    """Take the space for data, or write all of it."""
    if preallocation is Preallocation.FALLOC:
        await node.pwrite_zeroes(offset, length, may_unmap=False)
    elif preallocation is Preallocation.FULL:
        for begin in range(offset, offset + length, len(_ZEROES)):
            count = min(len(_ZEROES), offset + length - begin)
            await node.pwrite(begin, _ZEROES[:count])


def _encoded(name: str) -> bytes:
    return name.encode(errors="surrogateescape")
