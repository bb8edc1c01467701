# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Numbers of the format, and the limits that QEMU sets to what it opens.

Source: QEMU `docs/interop/qcow2`; the limits are those that it calls implementation limits.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag, StrEnum
from typing import Final

MAGIC: Final = 0x514649FB
"""The letters "QFI" and 0xfb."""

ENTRY_SIZE: Final = 8
"""Bytes of an entry of the L1 table, the refcount table and a standard L2 table."""

MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
MIN_EXTENDED_CLUSTER_BITS: Final = 14
"""Subclusters are a 32nd of a cluster and must not be smaller than 512 bytes."""

SUBCLUSTERS: Final = 32
"""Parts of a cluster that extended L2 entries tell apart."""

MAX_L1_BYTES: Final = 32 * 1024 * 1024
MAX_REFCOUNT_TABLE_BYTES: Final = 8 * 1024 * 1024
MAX_SNAPSHOTS: Final = 65536
MAX_SNAPSHOT_TABLE_BYTES: Final = 1024 * MAX_SNAPSHOTS
MAX_BITMAPS: Final = 65535
MAX_BITMAP_DIRECTORY_BYTES: Final = 1024 * MAX_BITMAPS
MAX_BACKING_NAME: Final = 1023
MAX_FORMAT_NAME: Final = 15
MAX_REFCOUNT_ORDER: Final = 6

COPIED: Final = 1 << 63
"""In L1 and L2 entries: the refcount is one, so what it points to may be changed in place."""

COMPRESSED: Final = 1 << 62
ZERO: Final = 1
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
"""Bits 9 to 55 of L1 and L2 entries."""

REFCOUNT_OFFSET_MASK: Final = 0xFFFF_FFFF_FFFF_FE00
SECTOR: Final = 512
"""Unit in which compressed clusters state their length."""


class Incompatible(IntFlag):
    """Features without which an image cannot be opened."""

    DIRTY = 1
    """Refcounts may be inconsistent."""

    CORRUPT = 2
    """Any structure may be corrupt: no more writes."""

    DATA_FILE = 4
    """Guest clusters are in another file, at their guest offsets."""

    COMPRESSION = 8
    """The header says how clusters are compressed, and it is not deflate."""

    EXTENDED_L2 = 16
    """L2 entries have 16 bytes and tell subclusters apart."""


class Compatible(IntFlag):
    """Features that may be ignored."""

    LAZY_REFCOUNTS = 1
    """Refcounts may be written late, under the dirty bit."""


class Autoclear(IntFlag):
    """Features whose bits a writer that does not know them clears."""

    BITMAPS = 1
    """The bitmaps extension is consistent."""

    RAW_DATA_FILE = 2
    """The external data file is a raw image of the disk by itself."""


INCOMPATIBLE_ALL: Final = 31
AUTOCLEAR_ALL: Final = 3


class ExtensionType(IntEnum):
    """Header extensions that have a meaning here; others are carried along."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    ENCRYPTION = 0x0537BE77
    DATA_FILE = 0x44415441


class Encryption(IntEnum):
    """How the payload is encrypted."""

    NONE = 0
    AES = 1
    LUKS = 2


class CompressionType(StrEnum):
    """How compressed clusters are compressed (QAPI `Qcow2CompressionType`)."""

    ZLIB = "zlib"
    ZSTD = "zstd"


COMPRESSION_NUMBERS: Final = {CompressionType.ZLIB: 0, CompressionType.ZSTD: 1}
