# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`raw`: a window on another node, or with neither `offset` nor `size` a filter that shows it.

The operations are plain functions that hand out the child's coroutine: a raw node in the way of
a request costs one call.

Source: QEMU qapi/block-core.json (BlockdevOptionsRaw) and the behaviour of its storage daemon.
"""

from __future__ import annotations

import errno
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Self

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.config import SECTOR, NodeConfig
from nbdjobs.nodes.driver import ChildReference, DriverNode, Reopening
from nbdjobs.nodes.events import DebugEvent
from nbdjobs.nodes.gate import Operation
from nbdjobs.nodes.graph import Edge, Graph, Role
from nbdjobs.nodes.image_formats import format_of
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.options import BlockdevOptions, BlockdevRef
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.rounding import round_down
from nbdjobs.nodes.status import BlockStatus
from nbdjobs.protocol.export import FileRange
from nbdjobs.qapi.types import INT64_MAX

_ENDLESS: Final = 1 << 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RawOptions(BlockdevOptions):
    """Options of the driver (QAPI `BlockdevOptionsRaw`).

    Attributes:
        file: Where the bytes are.
        offset: Where the disk begins there.
        size: Bytes of the disk; up to the end if not given.
    """

    file: BlockdevRef
    offset: int | None = None
    size: int | None = None

    @property
    def is_window(self) -> bool:
        """Whether the node shows only a part of its child."""
        return bool(self.offset) or self.size is not None


class RawNode(DriverNode[RawOptions]):
    """The driver `raw`."""

    driver: ClassVar[str] = "raw"
    is_format: ClassVar[bool] = True
    creates_images: ClassVar[bool] = True
    options_type: ClassVar[type[BlockdevOptions]] = RawOptions
    mutable_options: ClassVar[frozenset[str] | None] = frozenset({"offset", "size"})

    def __init__(self, name: str, config: NodeConfig, options: RawOptions):
        super().__init__(name, config)
        self._is_guarded = False
        self.set_window(options)

    def set_window(self, options: RawOptions) -> None:
        """Show the part of the child that the options say; no request may be in flight."""
        self._options = options
        self._offset = options.offset or 0
        # Formats read and write beyond the end; what is behind a window is not theirs.
        self._end = _ENDLESS if options.size is None else options.size

    @classmethod
    def children_of(cls, options: RawOptions) -> tuple[ChildReference, ...]:
        """The one child, named in the options."""
        role = Role.DATA if options.is_window else Role.FILTERED
        return (ChildReference("file", options.file, role),)

    @classmethod
    async def open(
        cls, name: str, config: NodeConfig, options: RawOptions, children: Mapping[str, Node]
    ) -> Self:
        """Check that the window lies inside the child."""
        _check_window(options, children["file"].size)
        return cls(name, config, options)

    async def prepare_reopen(
        self, graph: Graph, config: NodeConfig, options: RawOptions
    ) -> Reopening[RawOptions]:
        """Go on with another window, perhaps on another child."""
        return _RawReopening(self, config, options)

    @property
    def size(self) -> int:
        """Bytes of the window, or of the child."""
        if self._options.size is not None:
            return self._options.size
        if not self._options.is_window:
            return self._file.size
        return round_down(max(self._file.size - self._offset, 0), SECTOR)

    @property
    def filename(self) -> str:
        """The child's, if this node shows all of it."""
        has_own = self._options.offset is not None or self._options.size is not None
        is_plain = not has_own and not self._file.is_format and self._file.has_plain_filename
        return self._file.filename if is_plain else self.json_filename

    @property
    def content_options(self) -> dict[str, object]:
        """The child's, and the window."""
        window = {"offset": self._options.offset, "size": self._options.size}
        given = {name: value for name, value in window.items() if value is not None}
        return super().content_options | given

    @property
    def highest_offset_written(self) -> int:
        """Where the child's furthest write ended in the window."""
        return min(max(self._file.highest_offset_written - self._offset, 0), self.size)

    @property
    def _file(self) -> Node:
        return self.edges["file"].node

    def child_permissions(
        self, edge: Edge, needed: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """What users of this node need and share, but a window's child may not change size."""
        return needed, shared & ~Permission.RESIZE if self._options.is_window else shared

    def is_known_data(self, offset: int, length: int) -> bool:
        """What the child knows."""
        return self._file.is_known_data(self._offset + offset, length)

    def storage_at(self, offset: int) -> tuple[Node, int]:
        """Where the child stores the byte, unless this node has to see writes to it."""
        if self.write_threshold or self._is_guarded:
            return self, offset
        return self._file.storage_at(self._offset + offset)

    def guard_format(self) -> None:
        """Refuse writes after which the image would look like one of another format.

        For one that is raw only because it looks like nothing else. The format shows in the first
        sector, which is written as a whole from now on.
        """
        self._is_guarded = True
        alignment = max(self.limits.request_alignment, SECTOR)
        self.set_limits(replace(self.limits, request_alignment=alignment))

    def begin_writeback(self, offset: int, length: int) -> None:
        """Pass the hint on."""
        self._file.begin_writeback(self._offset + offset, length)

    async def cache(self, offset: int, length: int) -> None:
        """Cache the child's range."""
        await self._file.cache(self._offset + offset, length)

    async def copy_range(self, offset: int, target: Node, target_offset: int, length: int) -> None:
        """Copy the child's range."""
        await self._file.copy_range(self._offset + offset, target, target_offset, length)

    def pread_now(self, offset: int, buffer: memoryview, data_only: bool) -> bool:
        """Read from the child."""
        file = self.edges["file"].node
        if file.takes_debug_events or not self._reads_pass or offset + len(buffer) > self._end:
            return False
        return file.pread_now(self._offset + offset, buffer, data_only)

    def stored_at(self, offset: int, length: int, data_only: bool) -> FileRange | None:
        """Where the child stores it."""
        file = self.edges["file"].node
        if file.takes_debug_events or not self._reads_pass or offset + length > self._end:
            return None
        return file.stored_at(self._offset + offset, length, data_only)

    def _pread(self, offset: int, buffer: memoryview) -> Operation:
        file = self.edges["file"].node
        if offset + len(buffer) > self._end:
            return self._pread_at_end(offset, buffer)
        if file.takes_debug_events:
            return self._announced_pread(self._offset + offset, buffer)
        return file.pread(self._offset + offset, buffer)

    def pwrite_now(self, offset: int, data: memoryview) -> bool:
        """Write to the child."""
        file = self.edges["file"].node
        if file.takes_debug_events or not self._writes_pass or (self._is_guarded and not offset):
            return False
        if offset + len(data) > self._end:
            return False
        return file.pwrite_now(self._offset + offset, data)

    def _pwrite(self, offset: int, data: memoryview, fua: bool) -> Operation:
        if self._is_guarded and not offset and format_of(data) != "raw":
            raise NodeError(
                errno.EPERM, "this would change the format that the image seems to have"
            )
        self._check_end(offset + len(data))
        file = self.edges["file"].node
        if file.takes_debug_events:
            return self._announced_pwrite(self._offset + offset, data, fua)
        return file.pwrite(self._offset + offset, data, fua=fua)

    def _pwrite_zeroes(
        self, offset: int, length: int, fua: bool, may_unmap: bool, fast_only: bool
    ) -> Operation:
        self._check_end(offset + length)
        return self._file.pwrite_zeroes(
            self._offset + offset, length, fua=fua, may_unmap=may_unmap, fast_only=fast_only
        )

    def _pdiscard(self, offset: int, length: int) -> Operation:
        self._check_end(offset + length)
        return self._file.pdiscard(self._offset + offset, length)

    async def _flush(self) -> None:
        file = self._file
        if file.takes_debug_events:
            await file.debug_event(DebugEvent.FLUSH_TO_OS)
            await file.debug_event(DebugEvent.FLUSH_TO_DISK)
        await file.flush()

    async def _pread_at_end(self, offset: int, buffer: memoryview) -> None:
        """Read what is inside the window; behind it there are zeroes."""
        inside = max(min(len(buffer), self._end - offset), 0)
        if inside:
            await self._file.pread(self._offset + offset, buffer[:inside])
        buffer[inside:] = bytes(len(buffer) - inside)

    def _check_end(self, end: int) -> None:
        if end > self._end:
            raise NodeError(errno.ENOSPC)

    async def _announced_pread(self, offset: int, buffer: memoryview) -> None:
        await self._file.debug_event(DebugEvent.READ_AIO)
        await self._file.pread(offset, buffer)

    async def _announced_pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        await self._file.debug_event(DebugEvent.WRITE_AIO)
        await self._file.pwrite(offset, data, fua=fua)

    async def _truncate(self, size: int) -> None:
        if self._options.size is not None:
            raise CommandError("Cannot resize fixed-size raw disks")
        if self._offset + size > INT64_MAX:
            raise CommandError("Disk size too large for the chosen offset")
        await self._file.truncate(self._offset + size)

    def _block_status(self, offset: int, length: int) -> Coroutine[Any, Any, BlockStatus]:
        return self._file.block_status(self._offset + offset, length)


class _RawReopening(Reopening[RawOptions]):
    _node: RawNode

    def commit(self) -> None:
        options = self._after[1]
        _check_window(options, self._node.edges["file"].node.size)
        super().commit()
        self._node.set_window(options)

    def abort(self) -> None:
        super().abort()
        self._node.set_window(self._before[1])


def _check_window(options: RawOptions, available: int) -> None:
    """Refuse a window that the child does not have, in QEMU's words."""
    for name, value in (("offset", options.offset), ("size", options.size)):
        if value is not None and value < 0:
            raise CommandError(f"Parameter '{name}' expects a non-negative number below 2^64")
    offset = options.offset or 0
    if offset > available:
        raise CommandError(
            f"Offset ({offset}) cannot be greater than size of the containing file ({available})"
        )
    if options.size is None:
        return
    if offset + options.size > available:
        raise CommandError(
            f"The sum of offset ({offset}) and size ({options.size}) has to be smaller or equal"
            f" to the  actual size of the containing file ({available})"
        )
    if options.size % SECTOR:
        raise CommandError(f"Specified size is not multiple of {SECTOR}")
