# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Properties of user-created objects, as `--object` and `object-add` take them.

Source: QEMU qapi/qom.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from nbdjobs.daemon.throttle_limits import ThrottleLimits
from nbdjobs.errors import CommandError
from nbdjobs.qapi.types import INT64_MAX, flat_union, member

_POOL: Final = "thread-pool"


@flat_union(
    "qom-type",
    lambda: {
        "iothread": IothreadProperties,
        "secret": SecretProperties,
        "throttle-group": ThrottleGroupProperties,
    },
)
@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectOptions:
    """Properties of an object (QAPI `ObjectOptions`)."""

    qom_type: str
    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IothreadProperties(ObjectOptions):
    """A thread for requests: accepted, so that scripts work, while one event loop serves all."""

    aio_max_batch: int = 0
    thread_pool_min: int = 0
    thread_pool_max: int = 64
    poll_max_ns: int = 32768
    poll_grow: int = 0
    poll_shrink: int = 0

    def check(self) -> None:
        """Raise `CommandError` in QEMU's words unless the numbers go together."""
        for name in _NUMBERS:
            if getattr(self, name.replace("-", "_")) < 0:
                raise CommandError(f"{name} value must be in range [0, {INT64_MAX}]")
        if self.thread_pool_min > self.thread_pool_max or not self.thread_pool_max:
            raise CommandError(f"bad {_POOL}-min/{_POOL}-max values")


_NUMBERS: Final = (
    "aio-max-batch",
    f"{_POOL}-min",
    f"{_POOL}-max",
    "poll-max-ns",
    "poll-grow",
    "poll-shrink",
)


class QCryptoSecretFormat(StrEnum):
    """How a secret is written."""

    RAW = "raw"
    BASE64 = "base64"


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretProperties(ObjectOptions):
    """A password or key, given in the option or in a file, which may be encrypted by another."""

    loaded: bool | None = field(default=None, metadata=member(features=("deprecated",)))
    format: QCryptoSecretFormat = QCryptoSecretFormat.RAW
    keyid: str | None = None
    iv: str | None = None
    data: str | None = None
    file: str | None = None


def _unstable() -> Any:
    return field(default=None, metadata=member(features=("unstable",)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrottleGroupProperties(ObjectOptions):
    """Limits for the nodes that name this group; those in `limits` come last, so they count."""

    limits: ThrottleLimits | None = None
    x_iops_total: int | None = _unstable()
    x_iops_total_max: int | None = _unstable()
    x_iops_total_max_length: int | None = _unstable()
    x_iops_read: int | None = _unstable()
    x_iops_read_max: int | None = _unstable()
    x_iops_read_max_length: int | None = _unstable()
    x_iops_write: int | None = _unstable()
    x_iops_write_max: int | None = _unstable()
    x_iops_write_max_length: int | None = _unstable()
    x_bps_total: int | None = _unstable()
    x_bps_total_max: int | None = _unstable()
    x_bps_total_max_length: int | None = _unstable()
    x_bps_read: int | None = _unstable()
    x_bps_read_max: int | None = _unstable()
    x_bps_read_max_length: int | None = _unstable()
    x_bps_write: int | None = _unstable()
    x_bps_write_max: int | None = _unstable()
    x_bps_write_max_length: int | None = _unstable()
    x_iops_size: int | None = _unstable()
