# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`blkdebug`: a node that shows its child with other limits, and fails or holds requests by rule.

Source: QEMU `docs/devel/blkdebug.rst` and qapi/block-core.json (BlockdevOptionsBlkdebug).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Final, Self

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.blkdebug_config import read_config
from nbdjobs.nodes.blkdebug_rules import InjectError, IOType, Rules, SetState
from nbdjobs.nodes.breakpoints import BreakPoints
from nbdjobs.nodes.config import Limits, NodeConfig
from nbdjobs.nodes.driver import ChildReference, DriverNode
from nbdjobs.nodes.events import DebugEvent
from nbdjobs.nodes.graph import Edge, Role
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.options import BlockdevOptions, BlockdevRef
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.status import BlockStatus
from nbdjobs.qapi.types import Int32
from nbdjobs.qapi.visitor import to_qapi

_LIMIT_END: Final = (1 << 31) - 1
_CONTENT: Final = frozenset(
    {
        "config",
        "align",
        "max-transfer",
        "opt-write-zero",
        "max-write-zero",
        "opt-discard",
        "max-discard",
        "inject-error",
        "set-state",
    }
)


class PermissionName(StrEnum):
    """QAPI `BlockPermission`."""

    CONSISTENT_READ = "consistent-read"
    WRITE = "write"
    WRITE_UNCHANGED = "write-unchanged"
    RESIZE = "resize"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlkdebugOptions(BlockdevOptions):
    """Options of the driver; sizes in bytes.

    Attributes:
        image: The child.
        config: Path of a file with rules.
        align: Request alignment, a power of two.
        max_transfer: Longest read or write.
        opt_write_zero: Alignment of writes of zeroes.
        max_write_zero: Longest write of zeroes.
        opt_discard: Alignment of discards.
        max_discard: Longest discard.
        inject_error: Rules for failures.
        set_state: Rules for changes of state.
        take_child_perms: Permissions to need in addition.
        unshare_child_perms: Permissions to refuse to others in addition.
    """

    image: BlockdevRef
    config: str | None = None
    align: int = 0
    max_transfer: Int32 = 0
    opt_write_zero: Int32 = 0
    max_write_zero: Int32 = 0
    opt_discard: Int32 = 0
    max_discard: Int32 = 0
    inject_error: tuple[InjectError, ...] = ()
    set_state: tuple[SetState, ...] = ()
    take_child_perms: tuple[PermissionName, ...] = ()
    unshare_child_perms: tuple[PermissionName, ...] = ()


class BlkdebugNode(DriverNode[BlkdebugOptions]):
    """The driver `blkdebug`.

    Attributes:
        rules: Which requests fail, and the state they are in.
        break_points: Which requests are held.
    """

    driver: ClassVar[str] = "blkdebug"
    is_filter: ClassVar[bool] = True
    takes_debug_events: ClassVar[bool] = True
    options_type: ClassVar[type[BlockdevOptions]] = BlkdebugOptions
    mutable_options: ClassVar[frozenset[str] | None] = frozenset()

    def __init__(
        self, name: str, config: NodeConfig, options: BlkdebugOptions, limits: Limits, rules: Rules
    ):
        super().__init__(name, config, limits)
        self.rules = rules
        self.break_points = BreakPoints()
        self._options = options
        self._taken = _permissions(options.take_child_perms)
        self._unshared = _permissions(options.unshare_child_perms)

    @classmethod
    def children_of(cls, options: BlkdebugOptions) -> tuple[ChildReference, ...]:
        """The one child, named in the options."""
        return (ChildReference("image", options.image, Role.DATA),)

    @classmethod
    async def open(
        cls, name: str, config: NodeConfig, options: BlkdebugOptions, children: Mapping[str, Node]
    ) -> Self:
        """Read the rules and check the limits."""
        errors, transitions = list(options.inject_error), list(options.set_state)
        if options.config is not None:
            for rule in read_config(options.config):
                if isinstance(rule, InjectError):
                    errors.append(rule)
                else:
                    transitions.append(rule)
        limits = _limits(options, children["image"].limits.request_alignment)
        return cls(name, config, options, limits, Rules(errors, transitions))

    @property
    def size(self) -> int:
        """Bytes of the child."""
        return self._image.size

    @property
    def filename(self) -> str:
        """The rules' file and the child's name, unless options say more than that."""
        own = self.content_options.keys() - {"driver", "image", "config"}
        if own or not self._image.has_plain_filename:
            return self.json_filename
        return f"blkdebug:{self._options.config or ''}:{self._image.filename}"

    @property
    def content_options(self) -> dict[str, object]:
        """The child's, the limits and the rules, as far as they were given."""
        given: dict[str, object] = to_qapi(self._options)
        own = {name: value for name, value in given.items() if name in _CONTENT and value}
        return super().content_options | own

    @property
    def _image(self) -> Node:
        return self.edges["image"].node

    def child_permissions(
        self, edge: Edge, needed: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """What users of this node need and share, changed as the options say."""
        return needed | self._taken, shared & ~self._unshared

    async def debug_event(self, event: DebugEvent) -> None:
        """Go through the rules; return when no break point holds the request any more."""
        self.rules.on_event(event)
        if self.break_points.stops(event):
            await self.break_points.hold(event)

    def begin_shutdown(self) -> None:
        """Let go what is held; it is a drained section that waits for somebody to resume it."""
        self.break_points.end()

    async def _check(self, iotype: IOType, offset: int = 0, length: int = 0) -> None:
        if failure := self.rules.failure_of(iotype, offset, length):
            # One turn of the loop, so that callers meet a failure that does not come at once.
            await asyncio.sleep(0)
            raise NodeError(failure, offset=offset)

    async def _pread(self, offset: int, buffer: memoryview) -> None:
        await self._check(IOType.READ, offset, len(buffer))
        await self._image.pread(offset, buffer)

    async def _pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        await self.debug_event(DebugEvent.PWRITEV)
        await self._check(IOType.WRITE, offset, len(data))
        await self._image.pwrite(offset, data, fua=fua)
        await self.debug_event(DebugEvent.PWRITEV_DONE)

    async def _pwrite_zeroes(
        self, offset: int, length: int, fua: bool, may_unmap: bool, fast_only: bool
    ) -> None:
        await self.debug_event(DebugEvent.PWRITEV_ZERO)
        await self._check(IOType.WRITE_ZEROES, offset, length)
        await self._image.pwrite_zeroes(
            offset, length, fua=fua, may_unmap=may_unmap, fast_only=fast_only
        )
        await self.debug_event(DebugEvent.PWRITEV_DONE)

    async def _pdiscard(self, offset: int, length: int) -> None:
        await self._check(IOType.DISCARD, offset, length)
        await self._image.pdiscard(offset, length)

    async def _flush(self) -> None:
        await self._check(IOType.FLUSH)
        await self._image.flush()

    async def _block_status(self, offset: int, length: int) -> BlockStatus:
        await self._check(IOType.BLOCK_STATUS, offset, length)
        return await self._image.block_status(offset, length)

    async def _truncate(self, size: int) -> None:
        await self._image.truncate(size)

    async def _fill_up(self, begin: int, end: int, offset: int, data: memoryview) -> memoryview:
        has_head, has_tail = offset > begin, offset + len(data) < end
        if has_head:
            await self.debug_event(DebugEvent.PWRITEV_RMW_HEAD)
        if has_tail:
            await self.debug_event(DebugEvent.PWRITEV_RMW_TAIL)
        filled = await super()._fill_up(begin, end, offset, data)
        if has_head:
            await self.debug_event(DebugEvent.PWRITEV_RMW_AFTER_HEAD)
        if has_tail:
            await self.debug_event(DebugEvent.PWRITEV_RMW_AFTER_TAIL)
        return filled


def _permissions(names: tuple[PermissionName, ...]) -> Permission:
    found = permissions.NONE
    for name in names:
        found |= Permission[name.name]
    return found


def _limits(options: BlkdebugOptions, child_alignment: int) -> Limits:
    """Check the limits against each other, in the order in which QEMU does."""
    for name in (
        "align",
        "max_transfer",
        "opt_write_zero",
        "max_write_zero",
        "opt_discard",
        "max_discard",
    ):
        if getattr(options, name) < 0:
            option = name.replace("_", "-")
            raise CommandError(f"Parameter '{option}' expects a non-negative number below 2^64")
    align = options.align
    if align and (not 0 < align < _LIMIT_END or align & (align - 1)):
        raise _unmet("align", align)
    unit = max(align, child_alignment)
    _check_limit("max-transfer", options.max_transfer, unit)
    _check_limit("opt-write-zero", options.opt_write_zero, unit)
    _check_limit("max-write-zero", options.max_write_zero, max(options.opt_write_zero, unit))
    _check_limit("opt-discard", options.opt_discard, unit)
    _check_limit("max-discard", options.max_discard, max(options.opt_discard, unit))
    return Limits(
        request_alignment=align or 1,
        max_transfer=options.max_transfer,
        pwrite_zeroes_alignment=options.opt_write_zero,
        max_pwrite_zeroes=options.max_write_zero,
        pdiscard_alignment=options.opt_discard,
        max_pdiscard=options.max_discard,
    )


def _check_limit(name: str, value: int, unit: int) -> None:
    if value and (not 0 < value < _LIMIT_END or value % unit):
        raise _unmet(name, value)


def _unmet(name: str, value: int) -> CommandError:
    return CommandError(f"Cannot meet constraints with {name} {value}")
