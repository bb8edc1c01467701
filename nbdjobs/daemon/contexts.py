# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The metadata contexts that exports offer: block status in NBD's words."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from nbdjobs.nodes.device import Device
from nbdjobs.nodes.status import Status
from nbdjobs.protocol.export import Extent

_STATE_HOLE: Final = 1
_STATE_ZERO: Final = 2


class StatusContext:
    """A context that describes the disk run by run.

    Attributes:
        name: Full name of the context.
    """

    def __init__(self, name: str, describe: Callable[[int, int], Awaitable[tuple[int, int]]]):
        """Make the context.

        Args:
            name: Its full name.
            describe: Gives length and flags of the first run of a range.
        """
        self.name = name
        self._describe = describe

    async def extents(self, offset: int, length: int, limit: int) -> list[Extent]:
        """Describe the range by at most `limit` extents, neighbours with equal flags merged."""
        found: list[Extent] = []
        end = offset + length
        while offset < end:
            run, flags = await self._describe(offset, end - offset)
            if found and found[-1].flags == flags:
                found[-1] = Extent(found[-1].length + run, flags)
            elif len(found) == limit:
                break
            else:
                found.append(Extent(run, flags))
            offset += run
        return found


def allocation(device: Device) -> StatusContext:
    """`base:allocation` (NBD specification, "base:allocation metadata context")."""

    async def describe(offset: int, length: int) -> tuple[int, int]:
        run = await device.block_status(offset, length)
        return run.length, _allocation_flags(run.status)

    return StatusContext("base:allocation", describe)


def allocation_depth(device: Device) -> StatusContext:
    """`qemu:allocation-depth`: in which node of the chain the content is (QEMU docs/interop/nbd).

    0 means in none of them, 1 in the top one.
    """
    return StatusContext("qemu:allocation-depth", device.allocation_depth)


def _allocation_flags(status: Status) -> int:
    hole = 0 if status & Status.DATA else _STATE_HOLE
    zero = _STATE_ZERO if status & Status.ZERO else 0
    return hole | zero
