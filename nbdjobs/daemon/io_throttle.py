# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Limits on the requests of a device, as users set them and see them.

Devices that name the same group share its limits, and so do `throttle` nodes that name it. A
group that no object stands for is there as long as somebody uses it.

Source: QEMU qapi/block-core.json (BlockIOThrottle).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from nbdjobs.nodes.device import Device
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.leaky_bucket import BucketConfig, BucketName, ThrottleConfig
from nbdjobs.nodes.throttle_group import ThrottleGroup
from nbdjobs.qapi.types import UINT64_MAX, member

MEMBERS: Final = {
    BucketName.BPS_TOTAL: "bps",
    BucketName.BPS_READ: "bps_rd",
    BucketName.BPS_WRITE: "bps_wr",
    BucketName.IOPS_TOTAL: "iops",
    BucketName.IOPS_READ: "iops_rd",
    BucketName.IOPS_WRITE: "iops_wr",
}
"""What the limits are called here; with `_max` and `_max_length` they are those of bursts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockIOThrottle:
    """QAPI `BlockIOThrottle`: rates and burst rates per second, lengths of bursts in seconds.

    Attributes:
        device: Name of a device.
        id: Id of an export.
        iops_size: Bytes that count as one request.
        group: Whose limits they are; the device alone unless given.
    """

    device: str | None = field(default=None, metadata=member(features=("deprecated",)))
    id: str | None = None
    bps: int
    bps_rd: int = field(metadata=member("bps_rd"))
    bps_wr: int = field(metadata=member("bps_wr"))
    iops: int
    iops_rd: int = field(metadata=member("iops_rd"))
    iops_wr: int = field(metadata=member("iops_wr"))
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


def set_io_throttle(graph: Graph, device: Device, arguments: BlockIOThrottle) -> None:
    """Change the limits of a device, at once, and with them those of its group.

    Without any limit the device leaves its group, and what waits there begins.

    Raises:
        CommandError: They do not go together, in QEMU's words; nothing has changed.
    """
    config = _config(arguments)
    config.check()
    if not any(bucket.avg for bucket in config.buckets.values()):
        device.limit_by(None)
        return
    group = device.limiting_group
    if group is None or arguments.group is not None:
        name = arguments.group or arguments.device or arguments.id
        assert name is not None, "one of them has named the device"
        group = _group(graph, name)
        device.limit_by(group)
    group.set_config(config)


def name_of(graph: Graph, group: ThrottleGroup) -> str:
    """What users call a group that somebody uses."""
    return next(name for name, each in graph.throttle_groups.items() if each is group)


def describe(config: ThrottleConfig) -> dict[str, int]:
    """Limits by their names here; bursts and the size of requests only where they are set."""
    described: dict[str, int] = {}
    for name, shown in MEMBERS.items():
        bucket = config.bucket(name)
        described[shown] = bucket.avg
        if bucket.max:
            described[f"{shown}_max"] = bucket.max
            described[f"{shown}_max_length"] = bucket.burst_length
    return described | ({"iops_size": config.iops_size} if config.iops_size else {})


def _group(graph: Graph, name: str) -> ThrottleGroup:
    """The group of that name; a new one goes when its last member has left."""
    groups = graph.throttle_groups
    if name not in groups:
        groups[name] = ThrottleGroup(ThrottleConfig(), on_unused=lambda: groups.pop(name))
    return groups[name]


def _config(arguments: BlockIOThrottle) -> ThrottleConfig:
    def given(name: str) -> int | None:
        value: int | None = getattr(arguments, name)
        return value

    def burst_length(name: str) -> int:
        length = given(f"{name}_max_length")
        # QEMU keeps it as an unsigned number, which decides what it says of negative ones.
        return 1 if length is None else length & UINT64_MAX

    buckets = {
        bucket: BucketConfig(given(name) or 0, given(f"{name}_max") or 0, burst_length(name))
        for bucket, name in MEMBERS.items()
    }
    return ThrottleConfig(buckets, arguments.iops_size or 0)
