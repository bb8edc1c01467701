# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What queries about nodes and devices answer: QAPI types, and how a node becomes one.

Source: QEMU qapi/block-core.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from nbdjobs.daemon import io_throttle
from nbdjobs.errors import CommandError
from nbdjobs.nodes.accounting import Accounting
from nbdjobs.nodes.config import DetectZeroes
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.error_policy import IoStatus
from nbdjobs.nodes.file import FileNode
from nbdjobs.nodes.graph import Graph, Role
from nbdjobs.nodes.latency import Histogram
from nbdjobs.nodes.luks import LuksNode
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.qcow2.chain import combine
from nbdjobs.nodes.qcow2.constants import Incompatible
from nbdjobs.nodes.qcow2.node import Qcow2Node
from nbdjobs.nodes.raw import RawNode
from nbdjobs.nodes.snapshot_access import SnapshotAccess
from nbdjobs.qapi.types import INT64_MAX, Uint64, flat_union, member
from nbdjobs.qmp.commands.format_info import ImageInfoSpecific, describe_format
from nbdjobs.qmp.commands.snapshot_info import SnapshotInfo, list_snapshots


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """An image and what is known of it; sizes in bytes."""

    filename: str
    format: str
    dirty_flag: bool | None = None
    actual_size: int | None = None
    virtual_size: int
    cluster_size: int | None = None
    encrypted: bool | None = None
    compressed: bool | None = None
    backing_filename: str | None = None
    full_backing_filename: str | None = None
    backing_filename_format: str | None = None
    snapshots: list[SnapshotInfo] | None = None
    backing_image: ImageInfo | None = None
    format_specific: ImageInfoSpecific | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockdevCacheInfo:
    """How caches are used."""

    writeback: bool
    direct: bool
    no_flush: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDeviceInfo:
    """A node as `query-named-block-nodes` and `query-block` show it.

    The limits, from `bps` to `group`, are those of the device (see `daemon.io_throttle`).
    """

    file: str
    node_name: str | None = None
    ro: bool
    drv: str
    backing_file: str | None = field(default=None, metadata=member("backing_file"))
    backing_file_depth: int = field(metadata=member("backing_file_depth"))
    encrypted: bool
    detect_zeroes: DetectZeroes = field(metadata=member("detect_zeroes"))
    bps: int
    bps_rd: int = field(metadata=member("bps_rd"))
    bps_wr: int = field(metadata=member("bps_wr"))
    iops: int
    iops_rd: int = field(metadata=member("iops_rd"))
    iops_wr: int = field(metadata=member("iops_wr"))
    image: ImageInfo
    bps_max: int | None = field(default=None, metadata=member("bps_max"))
    bps_rd_max: int | None = field(default=None, metadata=member("bps_rd_max"))
    bps_wr_max: int | None = field(default=None, metadata=member("bps_wr_max"))
    iops_max: int | None = field(default=None, metadata=member("iops_max"))
    iops_rd_max: int | None = field(default=None, metadata=member("iops_rd_max"))
    iops_wr_max: int | None = field(default=None, metadata=member("iops_wr_max"))
    bps_max_length: int | None = field(default=None, metadata=member("bps_max_length"))
    bps_rd_max_length: int | None = field(default=None, metadata=member("bps_rd_max_length"))
    bps_wr_max_length: int | None = field(default=None, metadata=member("bps_wr_max_length"))
    iops_max_length: int | None = field(default=None, metadata=member("iops_max_length"))
    iops_rd_max_length: int | None = field(default=None, metadata=member("iops_rd_max_length"))
    iops_wr_max_length: int | None = field(default=None, metadata=member("iops_wr_max_length"))
    iops_size: int | None = field(default=None, metadata=member("iops_size"))
    group: str | None = None
    cache: BlockdevCacheInfo
    write_threshold: int = field(metadata=member("write_threshold"))
    active: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInfo:
    """A device.

    Attributes:
        device: Its name; those of exports have none.
        qdev: The export's id.
        io_status: Whether an error has stopped it; only where errors may do that.
    """

    device: str
    qdev: str | None = None
    type: str
    removable: bool
    locked: bool
    inserted: BlockDeviceInfo | None = None
    tray_open: bool | None = field(default=None, metadata=member("tray_open"))
    io_status: IoStatus | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDeviceTimedStats:
    """Statistics of an interval; nbdjobs keeps none yet, so the list of them is empty."""

    interval_length: int = field(metadata=member("interval_length"))
    min_rd_latency_ns: int = field(metadata=member("min_rd_latency_ns"))
    max_rd_latency_ns: int = field(metadata=member("max_rd_latency_ns"))
    avg_rd_latency_ns: int = field(metadata=member("avg_rd_latency_ns"))
    min_wr_latency_ns: int = field(metadata=member("min_wr_latency_ns"))
    max_wr_latency_ns: int = field(metadata=member("max_wr_latency_ns"))
    avg_wr_latency_ns: int = field(metadata=member("avg_wr_latency_ns"))
    min_flush_latency_ns: int = field(metadata=member("min_flush_latency_ns"))
    max_flush_latency_ns: int = field(metadata=member("max_flush_latency_ns"))
    avg_flush_latency_ns: int = field(metadata=member("avg_flush_latency_ns"))
    avg_rd_queue_depth: float = field(metadata=member("avg_rd_queue_depth"))
    avg_wr_queue_depth: float = field(metadata=member("avg_wr_queue_depth"))


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLatencyHistogramInfo:
    """How many requests took how long; boundaries in nanoseconds, and one bin more than them."""

    boundaries: list[Uint64]
    bins: list[Uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDeviceStats:
    """What was done to a device: counts, bytes, nanoseconds."""

    rd_bytes: int = field(metadata=member("rd_bytes"))
    wr_bytes: int = field(metadata=member("wr_bytes"))
    unmap_bytes: int = field(metadata=member("unmap_bytes"))
    rd_operations: int = field(metadata=member("rd_operations"))
    wr_operations: int = field(metadata=member("wr_operations"))
    flush_operations: int = field(metadata=member("flush_operations"))
    unmap_operations: int = field(metadata=member("unmap_operations"))
    rd_total_time_ns: int = field(metadata=member("rd_total_time_ns"))
    wr_total_time_ns: int = field(metadata=member("wr_total_time_ns"))
    flush_total_time_ns: int = field(metadata=member("flush_total_time_ns"))
    unmap_total_time_ns: int = field(metadata=member("unmap_total_time_ns"))
    wr_highest_offset: int = field(metadata=member("wr_highest_offset"))
    rd_merged: int = field(metadata=member("rd_merged"))
    wr_merged: int = field(metadata=member("wr_merged"))
    unmap_merged: int = field(metadata=member("unmap_merged"))
    idle_time_ns: int | None = field(default=None, metadata=member("idle_time_ns"))
    failed_rd_operations: int = field(metadata=member("failed_rd_operations"))
    failed_wr_operations: int = field(metadata=member("failed_wr_operations"))
    failed_flush_operations: int = field(metadata=member("failed_flush_operations"))
    failed_unmap_operations: int = field(metadata=member("failed_unmap_operations"))
    invalid_rd_operations: int = field(metadata=member("invalid_rd_operations"))
    invalid_wr_operations: int = field(metadata=member("invalid_wr_operations"))
    invalid_flush_operations: int = field(metadata=member("invalid_flush_operations"))
    invalid_unmap_operations: int = field(metadata=member("invalid_unmap_operations"))
    account_invalid: bool = field(metadata=member("account_invalid"))
    account_failed: bool = field(metadata=member("account_failed"))
    timed_stats: list[BlockDeviceTimedStats] = field(metadata=member("timed_stats"))
    rd_latency_histogram: BlockLatencyHistogramInfo | None = field(
        default=None, metadata=member("rd_latency_histogram")
    )
    wr_latency_histogram: BlockLatencyHistogramInfo | None = field(
        default=None, metadata=member("wr_latency_histogram")
    )
    flush_latency_histogram: BlockLatencyHistogramInfo | None = field(
        default=None, metadata=member("flush_latency_histogram")
    )


@flat_union(
    "driver", lambda: {"file": BlockStatsSpecificFile, "host_device": BlockStatsSpecificFile}
)
@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStatsSpecific:
    """Statistics that only some drivers have."""

    driver: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStatsSpecificFile(BlockStatsSpecific):
    """Discards of a file or block device."""

    discard_nb_ok: Uint64
    discard_nb_failed: Uint64
    discard_bytes_ok: Uint64


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStats:
    """Statistics of a device or node, and of the node below it."""

    device: str | None = None
    qdev: str | None = None
    node_name: str | None = None
    stats: BlockDeviceStats
    driver_specific: BlockStatsSpecific | None = None
    parent: BlockStats | None = None
    backing: BlockStats | None = None


def describe_node(node: Node, *, flat: bool = False) -> BlockDeviceInfo:
    """A node as queries show it."""
    cache = node.config.cache
    return BlockDeviceInfo(
        file=node.filename,
        node_name=node.name,
        ro=node.is_read_only,
        drv=node.driver,
        backing_file=backing.filename if (backing := _backing(node)) is not None else None,
        backing_file_depth=0 if flat else _depth_of(node),
        encrypted=node.is_encrypted,
        detect_zeroes=node.config.detect_zeroes,
        bps=0,
        bps_rd=0,
        bps_wr=0,
        iops=0,
        iops_rd=0,
        iops_wr=0,
        image=describe_image(node, flat=flat),
        cache=BlockdevCacheInfo(
            writeback=cache.is_writeback, direct=cache.is_direct, no_flush=cache.is_no_flush
        ),
        write_threshold=_signed(node.write_threshold),
        active=node.is_active,
    )


def _signed(number: int) -> int:
    """Of a number of 64 bits that QEMU shows with a sign."""
    return number - (1 << 64) if number > INT64_MAX else number


def describe_image(node: Node, *, flat: bool = False) -> ImageInfo:
    """The image that a node shows; with `flat`, without those below it."""
    below = None if flat else _next_below(node)
    name, full_name, driver = _backing_names(node)
    return ImageInfo(
        filename=node.filename,
        format=node.driver,
        dirty_flag=_is_dirty(node) if _is_in_file(node) else None,
        actual_size=node.allocated_size,
        virtual_size=node.size,
        cluster_size=_cluster_size(node) or None,
        encrypted=node.is_encrypted or None,
        backing_filename=name,
        full_backing_filename=full_name,
        backing_filename_format=driver,
        snapshots=list_snapshots(node),
        backing_image=None if below is None else describe_image(below),
        format_specific=describe_format(node),
    )


def _next_below(node: Node) -> Node | None:
    """The backing node, or what a filter shows; QEMU treats both alike here."""
    if node.is_filter:
        return next(edge.node for edge in node.edges.values() if edge.is_primary)
    return _backing(node)


def _backing(node: Node) -> Node | None:
    """The node that is read where this one has nothing."""
    return next((edge.node for edge in node.edges.values() if edge.role is Role.BACKING), None)


def _depth_of(node: Node) -> int:
    """How many nodes are below each other."""
    below = _next_below(node)
    return 0 if below is None else 1 + _depth_of(below)


def _backing_names(node: Node) -> tuple[str | None, str | None, str | None]:
    """What an image says of its backing file: the name, seen from here, and the format."""
    if not isinstance(node, Qcow2Node) or not node.header.backing_file:
        return None, None, None
    name = node.header.backing_file.decode(errors="replace")
    try:
        full = combine(node.filename, name)
    except CommandError:
        full = None
    return name, full, node.header.backing_format


def _cluster_size(node: Node) -> int:
    """That of the image that a filter or a raw node shows."""
    while node.is_filter or isinstance(node, RawNode):
        node = next(edge.node for edge in node.edges.values() if edge.is_primary)
    return node.cluster_size


def _is_dirty(node: Node) -> bool:
    """Whether refcounts of the image need not be right."""
    if isinstance(node, Qcow2Node):
        return bool(node.header.incompatible & Incompatible.DIRTY)
    file = node.edges.get("file")
    return file is not None and not isinstance(node, LuksNode) and _is_dirty(file.node)


def _is_in_file(node: Node) -> bool:
    """Whether the content is in a file, so that QEMU knows whether its format is in order."""
    if isinstance(node, SnapshotAccess):
        return False  # it shows other content than its child's, and QEMU asks no further
    children = (node.edges.get("file"), node.edges.get("image"))
    return isinstance(node, FileNode) or any(each and _is_in_file(each.node) for each in children)


def describe_device(graph: Graph, device: Device, export_id: str | None = None) -> BlockInfo:
    """A device as `query-block` shows it."""
    errors = device.errors
    return BlockInfo(
        device=device.name,
        qdev=export_id,
        type="unknown",
        removable=False,
        locked=False,
        inserted=_with_limits(describe_node(device.node), graph, device),
        io_status=errors.io_status if errors is not None and errors.policy.may_stop else None,
    )


def _with_limits(info: BlockDeviceInfo, graph: Graph, device: Device) -> BlockDeviceInfo:
    group = device.limiting_group
    if group is None:
        return info
    limits: dict[str, Any] = {**io_throttle.describe(group.config)}
    return replace(info, group=io_throttle.name_of(graph, group), **limits)


def describe_device_stats(device: Device, export_id: str = "") -> BlockStats:
    """A device and the nodes below it as `query-blockstats` shows them."""
    below = describe_node_stats(device.node)
    return BlockStats(
        device=device.name,
        qdev=export_id,
        node_name=device.node.name,
        stats=_describe_accounting(device.accounting),
        driver_specific=below.driver_specific,
        parent=below.parent,
    )


def describe_node_stats(node: Node) -> BlockStats:
    """A node as `query-blockstats` shows it: requests are accounted at devices, not here."""
    below = next((edge.node for edge in node.edges.values() if edge.is_primary), None)
    return BlockStats(
        node_name=node.name,
        stats=replace(
            _describe_accounting(Accounting()),
            wr_highest_offset=node.highest_offset_written,
            account_invalid=False,
            account_failed=False,
        ),
        driver_specific=_describe_specific(node),
        parent=None if below is None else describe_node_stats(below),
    )


def _describe_specific(node: Node) -> BlockStatsSpecific | None:
    if not isinstance(node, FileNode):
        return None
    return BlockStatsSpecificFile(
        driver=node.driver,
        discard_nb_ok=node.discard_stats.discard_nb_ok,
        discard_nb_failed=node.discard_stats.discard_nb_failed,
        discard_bytes_ok=node.discard_stats.discard_bytes_ok,
    )


def _describe_accounting(accounting: Accounting) -> BlockDeviceStats:
    """A device's accounts as `query-blockstats` shows them."""
    read, write = accounting.read, accounting.write
    unmap, flush = accounting.unmap, accounting.flush
    return BlockDeviceStats(
        rd_bytes=read.length,
        wr_bytes=write.length,
        unmap_bytes=unmap.length,
        rd_operations=read.operations,
        wr_operations=write.operations,
        flush_operations=flush.operations,
        unmap_operations=unmap.operations,
        rd_total_time_ns=read.total_time_ns,
        wr_total_time_ns=write.total_time_ns,
        flush_total_time_ns=flush.total_time_ns,
        unmap_total_time_ns=unmap.total_time_ns,
        wr_highest_offset=accounting.highest_offset_written,
        rd_merged=0,
        wr_merged=0,
        unmap_merged=0,
        idle_time_ns=accounting.idle_time_ns,
        failed_rd_operations=read.failed,
        failed_wr_operations=write.failed,
        failed_flush_operations=flush.failed,
        failed_unmap_operations=unmap.failed,
        invalid_rd_operations=read.invalid,
        invalid_wr_operations=write.invalid,
        invalid_flush_operations=flush.invalid,
        invalid_unmap_operations=unmap.invalid,
        account_invalid=True,
        account_failed=True,
        timed_stats=[],
        rd_latency_histogram=_describe_histogram(read.histogram),
        wr_latency_histogram=_describe_histogram(write.histogram),
        flush_latency_histogram=_describe_histogram(flush.histogram),
    )


def _describe_histogram(histogram: Histogram | None) -> BlockLatencyHistogramInfo | None:
    if histogram is None:
        return None
    return BlockLatencyHistogramInfo(boundaries=list(histogram.boundaries), bins=histogram.bins)
