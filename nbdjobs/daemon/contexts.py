# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The metadata contexts that exports offer: block status in NBD's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from nbdjobs.nodes.device import Device
from nbdjobs.nodes.status import Status
from nbdjobs.protocol.export import Extent

_STATE_HOLE: Final = 1
_STATE_ZERO: Final = 2


class StatusContext:
    """A context whose flags are worked out from the block status of the disk.

    Attributes:
        name: Full name of the context.
    """

    def __init__(self, name: str, device: Device, flags_of: Callable[[Status], int]):
        self.name = name
        self._device = device
        self._flags_of = flags_of

    async def extents(self, offset: int, length: int, limit: int) -> list[Extent]:
        """Describe the range by at most `limit` extents, neighbours with equal flags merged."""
        found: list[Extent] = []
        end = offset + length
        while offset < end:
            run = await self._device.block_status(offset, end - offset)
            flags = self._flags_of(run.status)
            if found and found[-1].flags == flags:
                found[-1] = Extent(found[-1].length + run.length, flags)
            elif len(found) == limit:
                break
            else:
                found.append(Extent(run.length, flags))
            offset += run.length
        return found


def allocation(device: Device) -> StatusContext:
    """`base:allocation` (NBD specification, "base:allocation metadata context")."""
    return StatusContext("base:allocation", device, _allocation_flags)


def allocation_depth(device: Device) -> StatusContext:
    """`qemu:allocation-depth`: in which layer of the chain the content is (QEMU docs/interop/nbd).

    0 means in none of them, 1 in the top layer.
    """
    return StatusContext("qemu:allocation-depth", device, _depth_flags)


def _allocation_flags(status: Status) -> int:
    hole = 0 if status & Status.DATA else _STATE_HOLE
    zero = _STATE_ZERO if status & Status.ZERO else 0
    return hole | zero


def _depth_flags(status: Status) -> int:
    return 1 if status & Status.ALLOCATED else 0
