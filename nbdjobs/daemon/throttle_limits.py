# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Limits of throttle groups as users write and see them.

They come in two forms that mean the same: the members of `limits`, which may change later, and
older properties that begin with "x-". What is not given stays as it is.

Source: QEMU qapi/block-core.json (ThrottleLimits) and qapi/qom.json (ThrottleGroupProperties).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nbdjobs.errors import CommandError
from nbdjobs.nodes.leaky_bucket import BucketConfig, BucketName, ThrottleConfig
from nbdjobs.qapi.types import UINT64_MAX

_UINT32_MAX: Final = (1 << 32) - 1
_IOPS_SIZE: Final = "iops-size"


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrottleLimits:
    """QAPI `ThrottleLimits`: rates and burst rates per second, lengths of bursts in seconds.

    Attributes:
        iops_size: Bytes that count as one request.
    """

    iops_total: int | None = None
    iops_total_max: int | None = None
    iops_total_max_length: int | None = None
    iops_read: int | None = None
    iops_read_max: int | None = None
    iops_read_max_length: int | None = None
    iops_write: int | None = None
    iops_write_max: int | None = None
    iops_write_max_length: int | None = None
    bps_total: int | None = None
    bps_total_max: int | None = None
    bps_total_max_length: int | None = None
    bps_read: int | None = None
    bps_read_max: int | None = None
    bps_read_max_length: int | None = None
    bps_write: int | None = None
    bps_write_max: int | None = None
    bps_write_max_length: int | None = None
    iops_size: int | None = None


def with_limits(config: ThrottleConfig, limits: ThrottleLimits) -> ThrottleConfig:
    """The config with what `limits` says in it.

    Raises:
        CommandError: A burst is too long, in QEMU's words; the rest is not checked.
    """

    def value_of(name: str) -> int | None:
        value: int | None = getattr(limits, name.replace("-", "_"))
        if value is None or not name.endswith("length"):
            return value
        if value > _UINT32_MAX:
            raise CommandError(f"{name} value must be in the range [0, {_UINT32_MAX}]")
        # QEMU keeps it as an unsigned number, which decides what it says of negative ones.
        return value & UINT64_MAX

    return _changed(config, value_of)


def with_properties(config: ThrottleConfig, properties: object) -> ThrottleConfig:
    """The config with what the properties `x_iops_total`, ... of an object say in it.

    Raises:
        CommandError: One is negative or too large, in QEMU's words; the rest is not checked.
    """

    def value_of(name: str) -> int | None:
        value: int | None = getattr(properties, f"x_{name.replace('-', '_')}")
        if value is None:
            return None
        if value < 0:
            raise CommandError("Property values cannot be negative")
        if name.endswith("length") and value > _UINT32_MAX:
            # Without the space, as QEMU has it.
            raise CommandError(f"x-{name} value must be in therange [0, {_UINT32_MAX}]")
        return value

    return _changed(config, value_of)


def describe(config: ThrottleConfig) -> dict[str, int]:
    """All limits by the names they have in `ThrottleLimits`."""
    described = {
        f"{name}{suffix}": getattr(config.bucket(name), attribute)
        for name in BucketName
        for suffix, attribute in _SUFFIXES.items()
    }
    return described | {_IOPS_SIZE: config.iops_size}


_SUFFIXES: Final = {"": "avg", "-max": "max", "-max-length": "burst_length"}


def _changed(config: ThrottleConfig, value_of: Callable[[str], int | None]) -> ThrottleConfig:
    values = describe(config)
    for name in values:
        given = value_of(name)
        if given is not None:
            values[name] = given
    buckets = {
        name: BucketConfig(*(values[f"{name}{suffix}"] for suffix in _SUFFIXES))
        for name in BucketName
    }
    return ThrottleConfig(buckets, values[_IOPS_SIZE])
