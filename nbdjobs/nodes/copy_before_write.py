# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A filter that saves old content to a target before it lets a write change it.

    guest ──▶ copy-before-write ──file──▶ source        target: the point in time
                       └───────target──▶ target

The point in time is the instant when `arm` is called, inside a drained section. From then on a
write whose clusters are not safe yet awaits their copy first. Once a cluster is safe it stays
so, and a write to it costs one look at a bitmap.

A backup job puts the filter above its disk by itself; users may do so too, and read the point in
time through a `snapshot-access` node (`point_in_time`).

The copy belongs to the filter and not to the guest's request: a request that is cancelled, or
does not want to wait any longer, leaves the copy in flight behind, and the copy goes on to its
end. Such a copy reads the source late. That is harmless if the guest's write failed
(break-guest-write), since then nothing has changed under it; if the guest's write went on
(break-snapshot), the copy may have put new data on the target, so the snapshot is broken for
good from that moment, and whoever relies on it is told.

Source: QEMU `block/copy-before-write.c` and QAPI `BlockdevOptionsCbw` for the behaviour.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Self, assert_never

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.background import Background
from nbdjobs.nodes.block_copy import BlockCopy, CopyError, CopyTuning, choose_cluster_size
from nbdjobs.nodes.clock import Clock, LoopClock
from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.driver import ChildReference, DriverNode
from nbdjobs.nodes.gate import Operation
from nbdjobs.nodes.graph import Edge, Graph, Role
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.options import BlockdevOptions, BlockdevRef
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.point_in_time import PointInTime
from nbdjobs.nodes.status import BlockStatus
from nbdjobs.protocol.export import FileRange
from nbdjobs.qapi.types import INT64_MAX, Size, Uint32


class OnCbwError(StrEnum):
    """Who pays when old content cannot be saved (QAPI `OnCbwError`)."""

    BREAK_GUEST_WRITE = "break-guest-write"
    """The guest: its write fails and changes nothing."""

    BREAK_SNAPSHOT = "break-snapshot"
    """The snapshot: the write goes on, and the target is of no use any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CbwSettings:
    """How the old content is saved.

    Attributes:
        on_cbw_error: What to do when a copy fails or takes too long.
        cbw_timeout: Seconds that a guest's write waits for a copy; 0 means for ever.
        min_cluster_size: Least unit of copying, in bytes, a power of two or 0.
        is_discardable: Whether readers of the snapshot may give up parts of it; not where a job
            relies on all of it.
    """

    on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE
    cbw_timeout: int = 0
    min_cluster_size: int = 0
    is_discardable: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot work, with `CommandError`."""
        if self.min_cluster_size & (self.min_cluster_size - 1):
            raise CommandError("min-cluster-size needs to be a power of 2")
        if self.min_cluster_size > INT64_MAX:
            raise CommandError(f"min-cluster-size too large: {self.min_cluster_size} > {INT64_MAX}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDirtyBitmap:
    """A dirty bitmap of a node (QAPI `BlockDirtyBitmap`)."""

    node: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyBeforeWriteOptions(BlockdevOptions):
    """Options of the driver (QAPI `BlockdevOptionsCbw`).

    Attributes:
        file: The disk.
        target: Where its old content goes.
        bitmap: Which parts are worth saving; all of them if not given.
        on_cbw_error: What to do when a copy fails or takes too long.
        cbw_timeout: Seconds that a guest's write waits for a copy; 0 means for ever.
        min_cluster_size: Least unit of copying, in bytes, a power of two; since QEMU 9.2.
    """

    file: BlockdevRef
    target: BlockdevRef
    bitmap: BlockDirtyBitmap | None = None
    on_cbw_error: OnCbwError | None = None
    cbw_timeout: Uint32 | None = None
    min_cluster_size: Size | None = None


class CopyBeforeWrite(DriverNode[CopyBeforeWriteOptions]):
    """The filter node, and the driver `copy-before-write`.

    Attributes:
        settings: What it was made with.
        snapshot_error: Why the snapshot is broken, or None while it is good.
        on_broken: Called once when the snapshot breaks.
        intercepted_operations: Requests of guests that had to wait for a copy.
        intercepted_bytes: Bytes copied ahead of them.
    """

    driver: ClassVar[str] = "copy-before-write"
    is_filter: ClassVar[bool] = True
    options_type: ClassVar[type[BlockdevOptions]] = CopyBeforeWriteOptions

    _copy: BlockCopy
    _snapshot: PointInTime
    _bitmap: BlockDirtyBitmap | None = None

    def __init__(
        self,
        name: str,
        config: NodeConfig,
        settings: CbwSettings,
        clock: Clock | None = None,
    ):
        super().__init__(name, config)
        self.settings = settings
        self.snapshot_error: NodeError | None = None
        self.on_broken: Callable[[], None] | None = None
        self.intercepted_operations = 0
        self.intercepted_bytes = 0
        self._clock = clock or LoopClock()
        self._copies = Background()
        self._waiting: set[asyncio.Future[NodeError | None]] = set()

    # As a driver

    @classmethod
    def children_of(cls, options: CopyBeforeWriteOptions) -> tuple[ChildReference, ...]:
        """The disk and the target."""
        return (
            ChildReference("file", options.file, Role.FILTERED),
            ChildReference("target", options.target, Role.TARGET),
        )

    @classmethod
    async def open(
        cls,
        name: str,
        config: NodeConfig,
        options: CopyBeforeWriteOptions,
        children: Mapping[str, Node],
    ) -> Self:
        """Check that the old content fits on the target."""
        node = cls(
            name,
            config,
            CbwSettings(
                on_cbw_error=options.on_cbw_error or OnCbwError.BREAK_GUEST_WRITE,
                cbw_timeout=options.cbw_timeout or 0,
                min_cluster_size=options.min_cluster_size or 0,
                is_discardable=True,
            ),
        )
        node._bitmap = options.bitmap
        file, target = children["file"], children["target"]
        if target.size < file.size:
            raise CommandError(
                f"Target '{target.name}' ({target.size} bytes) is smaller than '{file.name}'"
                f" ({file.size} bytes)"
            )
        return node

    def bind(self, graph: Graph) -> None:
        """Find the bitmap; `CommandError` if there is none of that name."""
        if self._bitmap is None:
            return
        if self._bitmap.node not in graph.nodes:
            raise CommandError(f"Node '{self._bitmap.node}' not found")
        raise CommandError(f"Dirty bitmap '{self._bitmap.name}' not found")

    async def start(self) -> None:
        """From now on the old content of what users write is saved."""
        self.arm()

    async def close(self) -> None:
        """Wait for copies in flight: the target must not be closed under them."""
        await self.settled()

    # What it is

    @property
    def _file(self) -> Node:
        return self.edges["file"].node

    @property
    def block_copy(self) -> BlockCopy:
        """The copy that `arm` set up."""
        return self._copy

    @property
    def snapshot(self) -> PointInTime:
        """The old content, to read."""
        return self._snapshot

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._file.size

    @property
    def filename(self) -> str:
        """Where the file's content is."""
        return self._file.filename

    @property
    def content_options(self) -> dict[str, object]:
        """The children's, the target's too, like QEMU."""
        target = self.edges["target"].node.content_options
        return super().content_options | {"target": target}

    @property
    def allocated_size(self) -> int | None:
        """What the file takes up; the target is not part of this disk."""
        return self._file.allocated_size

    @property
    def cluster_size(self) -> int:
        """That of the file."""
        return self._file.cluster_size

    @property
    def filtered(self) -> Node | None:
        """The file, whose content the filter shows."""
        return self._file

    def child_permissions(
        self, edge: Edge, needed: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """Write to the target; keep others from changing the file below while it has users."""
        if edge.name == "target":
            return Permission.WRITE, permissions.ALL & ~Permission.RESIZE
        if self.parents:
            shared &= ~(Permission.WRITE | Permission.RESIZE)
        if needed & Permission.WRITE:
            needed |= Permission.CONSISTENT_READ
        return needed, shared

    # The snapshot

    def arm(self, tuning: CopyTuning | None = None) -> BlockCopy:
        """Make this instant the point in time; both children are attached, no request is here."""
        target = self.edges["target"]
        self._copy = BlockCopy(
            self.edges["file"],
            target,
            cluster_size=choose_cluster_size(target.node, self.settings.min_cluster_size),
            tuning=tuning or CopyTuning(),
        )
        self._snapshot = PointInTime(self._copy, self.edges["file"], target)
        return self._copy

    def abandon(self) -> None:
        """Nobody wants the snapshot any more: guests wait for no copy, from this moment on.

        Copies in flight go on to their end; `settled` waits for it.
        """
        self.block_copy.cancel()
        self._release_waiting()

    async def settled(self) -> None:
        """Wait until no copy that a guest's write began is in flight."""
        await self._copies.settled()

    def _break(self, error: NodeError) -> None:
        if self.snapshot_error is not None:
            return
        self.snapshot_error = error
        self.block_copy.cancel()
        self._release_waiting()
        if self.on_broken is not None:
            self.on_broken()

    async def discard_snapshot(self, offset: int, length: int) -> None:
        """Give up a range of the old content, where nobody relies on all of it."""
        if self.settings.is_discardable:
            await self._snapshot.pdiscard(offset, length)

    def _release_waiting(self) -> None:
        for waiter in self._waiting:
            _answer(waiter, None)

    # Requests

    def pread_now(self, offset: int, buffer: memoryview, data_only: bool) -> bool:
        """Read from the file."""
        return self._file.pread_now(offset, buffer, data_only)

    def stored_at(self, offset: int, length: int, data_only: bool) -> FileRange | None:
        """Where the file stores it: reads see the disk as it is now."""
        return self._file.stored_at(offset, length, data_only)

    def _pread(self, offset: int, buffer: memoryview) -> Operation:
        return self._file.pread(offset, buffer)

    def pwrite_now(self, offset: int, data: memoryview) -> bool:
        """Write to the file where the old content is safe, and nobody reads it there."""
        if (
            not self._writes_pass
            or self._snapshot.readers
            or self._copy.needs_copy(offset, len(data))
        ):
            return False
        return self._file.pwrite_now(offset, data)

    def _pwrite(self, offset: int, data: memoryview, fua: bool) -> Operation:
        if self._snapshot.readers or self._copy.needs_copy(offset, len(data)):
            return self._copy_and_write(offset, data, fua)
        return self._file.pwrite(offset, data, fua=fua)

    async def _copy_and_write(self, offset: int, data: memoryview, fua: bool) -> None:
        await self._make_safe(offset, len(data))
        await self._file.pwrite(offset, data, fua=fua)

    async def _pwrite_zeroes(
        self, offset: int, length: int, fua: bool, may_unmap: bool, fast_only: bool
    ) -> None:
        await self._make_safe(offset, length)
        await self._file.pwrite_zeroes(
            offset, length, fua=fua, may_unmap=may_unmap, fast_only=fast_only
        )

    async def _pdiscard(self, offset: int, length: int) -> None:
        if self._file.config.can_unmap:  # otherwise it has no effect, and nothing need be saved
            await self._make_safe(offset, length)
            await self._file.pdiscard(offset, length)

    async def _flush(self) -> None:
        await self._file.flush()

    async def _truncate(self, size: int) -> None:
        """Save what a smaller disk loses first."""
        lost = self._snapshot.size - size
        if lost > 0:
            try:
                await self._make_safe(size, lost)
            except NodeError as error:
                raise CommandError(f"Cannot save what the smaller disk loses: {error}") from error
        await self._file.truncate(size)

    async def _block_status(self, offset: int, length: int) -> BlockStatus:
        return await self._file.block_status(offset, length)

    def is_known_data(self, offset: int, length: int) -> bool:
        """What the file knows."""
        return self._file.is_known_data(offset, length)

    # Saving the old content

    async def _make_safe(self, offset: int, length: int) -> None:
        """Return when the guest may change the range.

        Raises:
            NodeError: It must not: the old content is not on the target.
        """
        if self._copy.needs_copy(offset, length):
            await self._save(offset, length)
        if self._snapshot.readers:
            await self._snapshot.readers_gone(offset, length)

    async def _save(self, offset: int, length: int) -> None:
        copy = self._copy
        try:
            self.intercepted_operations += 1
            task = self._copies.start(copy.copy(offset, length, on_copied=self._count_intercepted))
            error = await self._wait_for(task) if task is not None else None
        except CopyError as failure:
            error = failure
        if error is not None and not copy.is_cancelled:
            self._settle_failure(error)

    def _count_intercepted(self, length: int) -> None:
        self.intercepted_bytes += length

    async def _wait_for(self, task: asyncio.Task[None]) -> NodeError | None:
        """Wait for a copy, as long as this guest is willing to; the answer is what failed."""
        waiter: asyncio.Future[NodeError | None] = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        task.add_done_callback(lambda task: _answer(waiter, _failure(task)))
        timer = None
        if self.settings.cbw_timeout:
            timer = self._clock.call_later(
                self.settings.cbw_timeout, lambda: _answer(waiter, NodeError(errno.ETIMEDOUT))
            )
        try:
            return await waiter
        finally:
            self._waiting.discard(waiter)
            if timer is not None:
                timer.cancel()

    def _settle_failure(self, error: NodeError) -> None:
        match self.settings.on_cbw_error:
            case OnCbwError.BREAK_GUEST_WRITE:
                raise NodeError(error.errno, error.message, offset=error.offset) from error
            case OnCbwError.BREAK_SNAPSHOT:
                self._break(error)
            case other:
                assert_never(other)


def insert(graph: Graph, source: Node, target: Node, node: CopyBeforeWrite) -> None:
    """Put the filter between a node and all its users; inside a drained section of `source`.

    Raises:
        CommandError: Permissions conflict, in QEMU's words; nothing has changed.
    """
    doing = "create"
    try:
        graph.attach(node, "file", source, Role.FILTERED)
        graph.attach(node, "target", target, Role.TARGET)
        doing = "replace"
        graph.replace(source, node)
        graph.add(node)
    except CommandError as error:
        _detach_children(graph, node)
        raise CommandError(f"Could not {doing} node: {error}") from error


def take_back(graph: Graph, node: CopyBeforeWrite) -> None:
    """Undo `insert`, in the same drained section."""
    graph.replace(node, node.edges["file"].node)
    del graph.nodes[node.name]
    _detach_children(graph, node)


async def remove(graph: Graph, node: CopyBeforeWrite) -> None:
    """Give the filter's users back to the node below it, and let go of the filter.

    To be called inside a drained section of the filter. A child that nobody else wants by now
    is closed.
    """
    graph.replace(node, node.edges["file"].node)
    await graph.drop(node)


def _detach_children(graph: Graph, node: CopyBeforeWrite) -> None:
    for edge in list(node.edges.values()):
        graph.detach(edge)


def _answer(waiter: asyncio.Future[NodeError | None], error: NodeError | None) -> None:
    if not waiter.done():
        waiter.set_result(error)


def _failure(task: asyncio.Task[None]) -> NodeError | None:
    """How a copy failed; one that was torn down with the event loop has failed as well."""
    if task.cancelled():
        return NodeError(errno.ECANCELED)
    error = task.exception()
    if error is None or isinstance(error, NodeError):
        return error
    return NodeError(errno.EIO, str(error))
