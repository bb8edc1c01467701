# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Options of nodes: the members that all drivers share (QAPI `BlockdevOptions`).

Each driver's file has a subclass with the members of its own, and `drivers.DRIVERS` says which
driver takes which. A member that was left out is None where "not given" and "off" differ: an
inline child then takes its parent's value (see `opening`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from nbdjobs.nodes.config import DetectZeroes
from nbdjobs.qapi.types import Alternate, flat_union


class Discard(StrEnum):
    """What becomes of discards (QAPI `BlockdevDiscardOptions`)."""

    IGNORE = "ignore"
    UNMAP = "unmap"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """How a node caches (QAPI `BlockdevCacheOptions`)."""

    direct: bool | None = None
    no_flush: bool | None = None


def _branches() -> Mapping[str, type]:
    # Drivers import this module, so their table can be read only once it is used.
    from nbdjobs.nodes.drivers import DRIVERS

    return {name: driver.options_type for name, driver in DRIVERS.items()}


@flat_union("driver", _branches)
@dataclass(frozen=True, slots=True, kw_only=True)
class BlockdevOptions:
    """A node to be opened; the members are those of QEMU's block driver options."""

    driver: str
    node_name: str | None = None
    discard: Discard | None = None
    cache: CacheOptions | None = None
    read_only: bool | None = None
    auto_read_only: bool | None = None
    force_share: bool | None = None
    detect_zeroes: DetectZeroes | None = None
    active: bool | None = None


BlockdevRef = Annotated[str | BlockdevOptions, Alternate("BlockdevRef")]
"""A child: the name of a node, or the options of a new one."""
