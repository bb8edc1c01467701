# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Options of the driver, and how much memory they give to the caches.

Source: QEMU qapi/block-core.json (BlockdevOptionsQcow2), `docs/qcow2-cache.txt`, and the texts of
its storage daemon.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Annotated, Final, NamedTuple

from nbdjobs.errors import CommandError
from nbdjobs.nodes.options import BlockdevOptions, BlockdevRef
from nbdjobs.nodes.qcow2.constants import ENTRY_SIZE
from nbdjobs.nodes.qcow2.geometry import Geometry
from nbdjobs.nodes.qcow2.overlap import Metadata
from nbdjobs.qapi.types import Alternate, Null, flat_union

BlockdevRefOrNull = Annotated[str | BlockdevOptions | Null, Alternate("BlockdevRefOrNull")]
"""A child, or the wish for none."""


class OverlapCheckMode(StrEnum):
    """QAPI `Qcow2OverlapCheckMode`."""

    NONE = "none"
    CONSTANT = "constant"
    CACHED = "cached"
    ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapCheckFlags:
    """Which metadata is kept safe from damaged mappings (QAPI `Qcow2OverlapCheckFlags`).

    A flag that is left out is as in the template. The L2 tables of snapshots are not checked.
    """

    template: OverlapCheckMode | None = None
    main_header: bool | None = None
    active_l1: bool | None = None
    active_l2: bool | None = None
    refcount_table: bool | None = None
    refcount_block: bool | None = None
    snapshot_table: bool | None = None
    inactive_l1: bool | None = None
    inactive_l2: bool | None = None
    bitmap_directory: bool | None = None


MUTABLE_OPTIONS: Final = frozenset(
    {
        "lazy-refcounts",
        "pass-discard-request",
        "pass-discard-snapshot",
        "pass-discard-other",
        "overlap-check",
        "cache-size",
        "l2-cache-size",
        "l2-cache-entry-size",
        "refcount-cache-size",
        "cache-clean-interval",
    }
)
"""QAPI names of what `blockdev-reopen` may change."""

OverlapChecks = Annotated[OverlapCheckFlags | OverlapCheckMode, Alternate("Qcow2OverlapChecks")]

_FLAGS: Final = {
    "main_header": Metadata.HEADER,
    "active_l1": Metadata.ACTIVE_L1,
    "active_l2": Metadata.ACTIVE_L2,
    "refcount_table": Metadata.REFCOUNT_TABLE,
    "refcount_block": Metadata.REFCOUNT_BLOCK,
    "snapshot_table": Metadata.SNAPSHOT_TABLE,
    "inactive_l1": Metadata.INACTIVE_L1,
    "bitmap_directory": Metadata.BITMAP_DIRECTORY,
}
_VARYING: Final = frozenset({Metadata.ACTIVE_L2, Metadata.REFCOUNT_BLOCK, Metadata.INACTIVE_L1})
_ALL: Final = frozenset(_FLAGS.values())

_TEMPLATES: Final = {
    OverlapCheckMode.NONE: frozenset[Metadata](),
    OverlapCheckMode.CONSTANT: _ALL - _VARYING,
    OverlapCheckMode.CACHED: _ALL,
    OverlapCheckMode.ALL: _ALL,
}


@flat_union("format", lambda: {"aes": QCryptoBlockOptions, "luks": QCryptoBlockOptions})
@dataclass(frozen=True, slots=True, kw_only=True)
class BlockdevQcow2Encryption:
    """How the image is encrypted (QAPI `BlockdevQcow2Encryption`).

    Attributes:
        format: The method, which has to be that of the image.
    """

    format: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QCryptoBlockOptions(BlockdevQcow2Encryption):
    """Where the key is; the same for both methods.

    Attributes:
        key_secret: Name of the object with the password.
    """

    key_secret: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Qcow2Options(BlockdevOptions):
    """Options of the driver (QAPI `BlockdevOptionsQcow2`); sizes in bytes.

    Attributes:
        file: The image file.
        backing: What is below it; what the image says if not given, nothing if null.
        lazy_refcounts: Write refcounts late, under the dirty bit; what the image says by default.
        pass_discard_request: Let the storage discard what guests discard; as `discard` says by
            default.
        pass_discard_snapshot: Likewise for what the deletion of snapshots makes free.
        pass_discard_other: Likewise for all else.
        overlap_check: Which metadata is kept safe from damaged mappings.
        cache_size: Memory for both caches together.
        l2_cache_size: Memory for L2 tables; by default up to 32 MiB, as much as the disk needs.
        l2_cache_entry_size: What is read and written of an L2 table at a time.
        refcount_cache_size: Memory for refcounts.
        cache_clean_interval: Seconds after which unused parts of L2 tables are forgotten; 0 for
            never.
        encrypt: The password, if the image is encrypted.
        data_file: The external data file, if the image has one.
        snapshot: Id or name of an internal snapshot that is read in place of the disk as it is.
    """

    file: BlockdevRef
    backing: BlockdevRefOrNull | None = None
    lazy_refcounts: bool | None = None
    pass_discard_request: bool | None = None
    pass_discard_snapshot: bool | None = None
    pass_discard_other: bool | None = None
    overlap_check: OverlapChecks | None = None
    cache_size: int | None = None
    l2_cache_size: int | None = None
    l2_cache_entry_size: int | None = None
    refcount_cache_size: int | None = None
    cache_clean_interval: int | None = None
    encrypt: BlockdevQcow2Encryption | None = None
    data_file: BlockdevRef | None = None
    snapshot: str | None = None

    @property
    def checked_metadata(self) -> frozenset[Metadata]:
        """What writes are kept away from."""
        chosen = self.overlap_check
        if chosen is None:
            return _TEMPLATES[OverlapCheckMode.CACHED]
        if isinstance(chosen, OverlapCheckMode):
            return _TEMPLATES[chosen]
        checked = set(_TEMPLATES[chosen.template or OverlapCheckMode.CACHED])
        for flag in fields(chosen):
            wanted = getattr(chosen, flag.name)
            if flag.name in _FLAGS and wanted is not None:
                (checked.add if wanted else checked.discard)(_FLAGS[flag.name])
        return frozenset(checked)


DEFAULT_L2_CACHE: Final = 32 * 1024 * 1024
_DEFAULT_SLICE: Final = 4096
_MIN_SLICES: Final = 4
_MIN_REFCOUNT_BLOCKS: Final = 4
_MAX_INTERVAL: Final = (1 << 32) - 1
DEFAULT_CLEAN_INTERVAL: Final = 600


class CacheSizes(NamedTuple):
    """How much is cached.

    Attributes:
        slice_size: Bytes of what is read and written of an L2 table at a time.
        slices: How many of them.
        refcount_blocks: How many refcount blocks.
    """

    slice_size: int
    slices: int
    refcount_blocks: int


def check_cache_options(options: Qcow2Options) -> None:
    """Refuse what cannot be, whatever the image.

    Raises:
        CommandError: In QEMU's words.
    """
    for name in ("cache_size", "l2_cache_size", "l2_cache_entry_size", "refcount_cache_size"):
        value = getattr(options, name)
        if value is not None and value < 0:
            shown = name.replace("_", "-")
            raise CommandError(f"Parameter '{shown}' expects a non-negative number below 2^64")
    interval = options.cache_clean_interval
    if interval is not None and not 0 <= interval <= _MAX_INTERVAL:
        raise CommandError("Cache clean interval too big")


def cache_sizes(options: Qcow2Options, geometry: Geometry, disk_size: int) -> CacheSizes:
    """Share out the memory.

    Raises:
        CommandError: The options contradict each other, in QEMU's words.
    """
    slice_size = options.l2_cache_entry_size
    if slice_size is None:
        slice_size = min(_DEFAULT_SLICE, geometry.cluster_size)
    if not 512 <= slice_size <= geometry.cluster_size or slice_size & (slice_size - 1):
        raise CommandError(
            "L2 cache entry size must be a power of two between 512 and the cluster size"
            f" ({geometry.cluster_size})"
        )
    l2_size, refcount_size = _shares(options, geometry, disk_size)
    return CacheSizes(
        slice_size,
        max(l2_size // slice_size, _MIN_SLICES),
        max(refcount_size // geometry.cluster_size, _MIN_REFCOUNT_BLOCKS),
    )


def _shares(options: Qcow2Options, geometry: Geometry, disk_size: int) -> tuple[int, int]:
    """Bytes for L2 tables and for refcounts."""
    total, l2_size, refcount_size = (
        options.cache_size,
        options.l2_cache_size,
        options.refcount_cache_size,
    )
    wanted = geometry.clusters(disk_size) * ENTRY_SIZE * geometry.stride
    least = _MIN_REFCOUNT_BLOCKS * geometry.cluster_size
    if total is None:
        most = DEFAULT_L2_CACHE if l2_size is None else l2_size
        return min(most, wanted), least if refcount_size is None else refcount_size
    if l2_size is not None and refcount_size is not None:
        raise CommandError(
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
        )
    if l2_size is not None and l2_size > total:
        raise CommandError("l2-cache-size may not exceed cache-size")
    if refcount_size is not None and refcount_size > total:
        raise CommandError("refcount-cache-size may not exceed cache-size")
    if l2_size is not None:
        return min(l2_size, wanted), total - l2_size
    if refcount_size is None:
        refcount_size = total - wanted if wanted + least <= total else min(total, least)
    return min(total - refcount_size, wanted), refcount_size
