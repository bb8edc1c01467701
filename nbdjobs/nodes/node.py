# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Nodes: the elements of the block graph, and the gate in front of each of them.

A request comes in at a root (`device.Device` for exports, the job for jobs), which checks the
bounds and can hold it back. From there it passes from node to node. The public operations of
`Node` are the gate: alignment to the driver's limits, splitting, the overlap table and zero
detection are written here once, and a driver implements only what its storage can do
(`_pread`, `_pwrite`, ...).

What is not in use costs one `if`: where a node needs nothing of the above, its gate is a plain
function that hands out the driver's coroutine, without one of its own around it.
"""

from __future__ import annotations

import errno
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Final

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.events import DebugEvent
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.rounding import round_down, round_up
from nbdjobs.nodes.status import DATA, BlockStatus
from nbdjobs.nodes.tracked import Kind, TrackedRequests

if TYPE_CHECKING:
    from nbdjobs.nodes.graph import Edge

Operation = Coroutine[Any, Any, None]

SECTOR: Final = 512
"""Sizes of nodes are multiples of this, as in QEMU: a shorter file reads as zeroes at its end."""

MAX_SIZE: Final = (1 << 63) - (1 << 30)
"""Largest size of a node, so that rounding up never overflows a file offset, as in QEMU."""

_JSON: Final = "json:"
_BOUNCE: Final = 1024 * 1024
_ZEROES: Final = memoryview(bytes(_BOUNCE))
_ZERO_BLOCK: Final = bytes(64 * 1024)


class DetectZeroes(StrEnum):
    """What becomes of writes of nothing but zeroes (QAPI `BlockdevDetectZeroesOptions`)."""

    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


class BlockOp(StrEnum):
    """Commands that a use of a node may rule out (QEMU BLOCK_OP_TYPE_*)."""

    BACKUP_SOURCE = "backup-source"
    BACKUP_TARGET = "backup-target"
    DRIVE_DEL = "drive-del"
    RESIZE = "resize"
    COMMIT = "commit"
    MIRROR_SOURCE = "mirror-source"
    MIRROR_TARGET = "mirror-target"
    STREAM = "stream"
    REPLACE = "replace"
    SNAPSHOT = "snapshot"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a driver's storage can take in one request; all in bytes, 0 means no limit.

    Attributes:
        request_alignment: Offsets and lengths must be multiples of this power of two.
        max_transfer: Longest read or write.
        opt_transfer: Length from which on reads and writes are efficient.
        min_io: Unit below which a write is read, changed and written back by the storage.
        max_pdiscard: Longest discard.
        pdiscard_alignment: Discards work in multiples of this; ragged ends are left alone.
        max_pwrite_zeroes: Longest write of zeroes.
        pwrite_zeroes_alignment: Zero writes work in multiples of this; ragged ends are written.
    """

    request_alignment: int = 1
    max_transfer: int = 0
    opt_transfer: int = 0
    min_io: int = 0
    max_pdiscard: int = 0
    pdiscard_alignment: int = 0
    max_pwrite_zeroes: int = 0
    pwrite_zeroes_alignment: int = 0

    def in_whole_units(self) -> Limits:
        """The same with maxima that are multiples of their alignment.

        A range that begins aligned and is cut at the maximum then has aligned pieces only.
        """
        unit = self.request_alignment
        return replace(
            self,
            max_transfer=_whole_units(self.max_transfer, unit),
            max_pdiscard=_whole_units(self.max_pdiscard, max(unit, self.pdiscard_alignment)),
            max_pwrite_zeroes=_whole_units(
                self.max_pwrite_zeroes, max(unit, self.pwrite_zeroes_alignment)
            ),
        )


def _whole_units(maximum: int, unit: int) -> int:
    """Round a maximum down, but keep it a maximum: 0 would mean that there is none."""
    return max(round_down(maximum, unit), unit) if maximum else 0


NO_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class CacheMode:
    """How a node treats caches (QAPI `BlockdevCacheInfo`)."""

    is_writeback: bool = True
    is_direct: bool = False
    is_no_flush: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """What every node has, whatever its driver (the common part of QAPI `BlockdevOptions`)."""

    is_read_only: bool = False
    is_auto_read_only: bool = False
    can_unmap: bool = False
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    cache: CacheMode = CacheMode()
    is_share_forced: bool = False


class Node(ABC):
    """One element of the block graph.

    Attributes:
        name: Unique in the graph; names that begin with "#" are given by the graph.
        config: Options common to all drivers.
        limits: What one request of the driver can take.
        edges: The nodes this one uses, by edge name ("file", "target", ...).
        parents: The uses of this node.
        tracked: Requests in flight, where the node has to order overlapping ones.
        is_owned_by_user: Added by name; kept until it is deleted by name.
        write_threshold: Where in the node a write has to end beyond to be reported, or 0.
    """

    driver: ClassVar[str]
    """Name of the driver, as in `blockdev-add`."""

    is_filter: ClassVar[bool] = False
    """Whether the node shows the content of one child, unchanged."""

    is_format: ClassVar[bool] = False
    """Whether the driver interprets a child instead of storing bytes itself."""

    supports_compressed_writes: ClassVar[bool] = False

    takes_debug_events: ClassVar[bool] = False
    """Whether users of this node should tell it by `debug_event` what they are about to do."""

    def __init__(self, name: str, config: NodeConfig, limits: Limits = NO_LIMITS):
        self.name = name
        self.config = config
        self._heeds_flushes = not config.cache.is_no_flush
        self.edges: dict[str, Edge] = {}
        self.parents: list[Edge] = []
        self.tracked = TrackedRequests()
        self.is_owned_by_user = False
        self.op_blockers: dict[BlockOp, list[str]] = {}
        self.write_threshold = 0
        self._on_threshold: Callable[[int, int], None] | None = None
        self.set_limits(limits)

    # What it is

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes of the node, a multiple of 512."""

    @property
    def filename(self) -> str:
        """Where the content is, as a human would name it."""
        return ""

    @property
    def content_options(self) -> dict[str, object]:
        """The options that decide what the content is, named as in QAPI."""
        children = {
            name: edge.node.content_options for name, edge in self.edges.items() if edge.is_primary
        }
        return {"driver": self.driver, **children}

    @property
    def has_plain_filename(self) -> bool:
        """Whether `filename` is more than the options written out."""
        return not self.filename.startswith(_JSON)

    @property
    def json_filename(self) -> str:
        """Those options as the name of what no path can name."""
        return _JSON + json.dumps(self.content_options)

    @property
    def is_read_only(self) -> bool:
        """Whether writes are refused."""
        return self.config.is_read_only

    @property
    def cluster_size(self) -> int:
        """Bytes that are allocated together, or 0 where that has no meaning."""
        return 0

    @property
    def allocated_size(self) -> int:
        """Bytes that the content takes up in storage."""
        return sum(edge.node.allocated_size for edge in self.edges.values())

    @property
    def filtered(self) -> Node | None:
        """The node whose content this one shows, if it is a filter."""
        return None

    @property
    def is_rotational(self) -> bool:
        """Whether the content is on a spinning disk, where seeking is slow."""
        return any(edge.node.is_rotational for edge in self.edges.values() if edge.is_primary)

    def set_limits(self, limits: Limits) -> None:
        """Take new limits, with maxima cut to whole units; no request may be in flight."""
        self.limits = limits.in_whole_units()
        self._choose_gate()

    def set_write_threshold(self, threshold: int, on_exceeded: Callable[[int, int], None]) -> None:
        """Report the first write from now on that ends beyond a place.

        Args:
            threshold: Bytes from the start of the node; 0 to report nothing any more.
            on_exceeded: Called once with the threshold, and by how many bytes it was exceeded.
        """
        self.write_threshold = threshold
        self._on_threshold = on_exceeded
        self._choose_gate()

    def _choose_gate(self) -> None:
        """Work out which requests need nothing of the gate."""
        needs_gate = self.limits.request_alignment > 1 or self.limits.max_transfer > 0
        self._reads_pass = not needs_gate
        self._writes_pass = (
            not needs_gate
            and not self.write_threshold
            and self.config.detect_zeroes is DetectZeroes.OFF
        )

    def _check_write_threshold(self, end: int) -> None:
        threshold = self.write_threshold
        if 0 < threshold < end and self._on_threshold is not None:
            self.write_threshold = 0
            self._choose_gate()
            self._on_threshold(threshold, end - threshold)

    def block(self, reason: str, *, allowed: frozenset[BlockOp] = frozenset()) -> None:
        """Rule out every operation that is not `allowed`, for a `reason` shown to the user."""
        for operation in BlockOp:
            if operation not in allowed:
                self.op_blockers.setdefault(operation, []).append(reason)

    def unblock(self, reason: str) -> None:
        """Take back `block` with the same reason."""
        for reasons in self.op_blockers.values():
            if reason in reasons:
                reasons.remove(reason)

    def check_not_blocked(self, operation: BlockOp) -> None:
        """Raise `CommandError` if the operation is ruled out by a use of this node."""
        for reason in self.op_blockers.get(operation, ()):
            raise CommandError(f"Node '{self.name}' is busy: {reason}")

    def describe(self) -> str:
        """What error messages call this node as a user of other nodes."""
        return f"node '{self.name}'"

    # What users of it need of its children

    def child_permissions(
        self, edge: Edge, needed: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """What this node needs of the child on `edge`, and shares, given what its own users do.

        Args:
            edge: The edge to the child.
            needed: All that the users of this node need.
            shared: What all users of this node let others do.
        """
        return needed, shared

    def check_permissions(self, needed: Permission, shared: Permission) -> None:
        """Refuse permissions that this node cannot give, by raising `CommandError`.

        What it acquires here stays acquired until `apply_permissions` says what counts.
        """
        if needed & permissions.WRITES and self.is_read_only:
            raise CommandError("Block node is read-only")
        # A write to the last, incomplete block would have to go beyond the end.
        cannot_grow = Permission.WRITE in needed and Permission.RESIZE not in needed
        if cannot_grow and self.size % self.limits.request_alignment:
            raise CommandError(
                "Cannot get 'write' permission without 'resize': Image size is not a multiple of"
                " request alignment"
            )

    def apply_permissions(self, needed: Permission, shared: Permission) -> None:
        """Take note of what users need and share from now on."""

    # The gate

    def pread(self, offset: int, buffer: memoryview) -> Operation:
        """Fill `buffer` with the content from `offset` on."""
        if self._reads_pass:
            return self._pread(offset, buffer)
        return self._gated_pread(offset, buffer)

    def pread_now(self, offset: int, buffer: memoryview, data_only: bool) -> bool:
        """Do a read on the spot if that needs no wait; see `protocol.export.Backend`.

        A coroutine costs as much as a small read from the page cache, and a read comes through
        several nodes. Who overrides this passes on nothing that its `pread` would treat otherwise.
        """
        return False

    def pwrite(self, offset: int, data: memoryview, *, fua: bool = False) -> Operation:
        """Write `data` at `offset`; with `fua`, return only when it is on stable storage."""
        fua = fua and self._heeds_flushes
        if self._writes_pass:
            return self._pwrite(offset, data, fua)
        return self._gated_pwrite(offset, data, fua)

    async def pwrite_zeroes(
        self,
        offset: int,
        length: int,
        *,
        fua: bool = False,
        may_unmap: bool = True,
        fast_only: bool = False,
    ) -> None:
        """Make the range read as zeroes.

        Args:
            offset: First byte.
            length: Bytes, at least 1.
            fua: Return only when the zeroes are on stable storage.
            may_unmap: The range may become a hole, where the node's `discard` option allows.
            fast_only: Fail with ENOTSUP, changing nothing, unless this is faster than writing.
        """
        if self.write_threshold:
            self._check_write_threshold(offset + length)
        fua = fua and self._heeds_flushes
        may_unmap = may_unmap and self.config.can_unmap
        alignment = self.limits.request_alignment
        if alignment == 1:
            await self._zero_range(offset, length, fua, may_unmap, fast_only)
            return
        begin, end = round_up(offset, alignment), round_down(offset + length, alignment)
        if fast_only and (begin != offset or end != offset + length):
            raise NodeError(errno.ENOTSUP)
        if begin >= end:
            await self._write_zero_bytes(offset, length, fua)
            return
        if offset < begin:
            await self._write_zero_bytes(offset, begin - offset, fua)
        async with self.tracked.request(begin, end - begin, Kind.WRITE, is_serialising=False):
            await self._zero_range(begin, end - begin, fua, may_unmap, fast_only)
        if end < offset + length:
            await self._write_zero_bytes(end, offset + length - end, fua)

    async def pdiscard(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Drop the content of the range, as far as the storage can and the options allow.

        Ragged ends that the storage cannot discard keep their content.
        """
        if not self.config.can_unmap:
            return
        limits = self.limits
        alignment = max(limits.request_alignment, limits.pdiscard_alignment)
        begin, end = round_up(offset, alignment), round_down(offset + length, alignment)
        if begin >= end:
            return
        if limits.request_alignment == 1:
            await self._discard_range(begin, end, fua)
            return
        async with self.tracked.request(begin, end - begin, Kind.DISCARD, is_serialising=False):
            await self._discard_range(begin, end, fua)

    async def flush(self) -> None:
        """Bring all completed writes to stable storage."""
        if self._heeds_flushes:
            await self._flush()

    def begin_writeback(self, offset: int, length: int) -> None:
        """Let the storage begin to make completed writes stable, without waiting for it.

        A hint: who has written much and will flush later has less to wait for then.
        """

    async def cache(self, offset: int, length: int) -> None:
        """Bring the range into a cache, if there is one."""
        for edge in self.edges.values():
            if edge.is_primary:
                await edge.node.cache(offset, length)

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """Describe the first run of the range, at most `length` bytes long."""
        if length <= 0:
            raise NodeError(errno.EINVAL, "block status of an empty range")
        if self.limits.request_alignment > 1:
            return await self._aligned_block_status(offset, length)
        return await self._block_status(offset, length)

    async def extents(self, offset: int, length: int) -> AsyncIterator[tuple[int, BlockStatus]]:
        """Walk the runs of a range: pairs of offset and status, without gaps."""
        end = offset + length
        while offset < end:
            run = await self.block_status(offset, end - offset)
            yield offset, run
            offset += run.length

    def is_known_data(self, offset: int, length: int) -> bool:
        """Whether the range is known, without waiting, to hold no holes."""
        return False

    async def copy_range(self, offset: int, target: Node, target_offset: int, length: int) -> None:
        """Let the storage itself copy a range to another node.

        Raises:
            NodeError: ENOTSUP where the two nodes cannot do that; the caller reads and writes.
        """
        raise NodeError(errno.ENOTSUP)

    async def truncate(self, size: int) -> None:
        """Make the node `size` bytes long; what is new reads as zeroes, where the storage can.

        To be called with the permission to resize, inside a drained section.

        Raises:
            CommandError: That is not possible, in QEMU's words.
        """
        if size > MAX_SIZE:
            raise CommandError(f"offset({size}) exceeds maximum({MAX_SIZE})")
        if self.is_read_only:
            raise CommandError("Image is read-only")
        await self._truncate(size)

    def begin_drain(self) -> None:
        """Keep no request waiting that could go on, until as many `end_drain` have come.

        Whoever sent them is held back, and the graph waits for them to end.
        """

    def end_drain(self) -> None:
        """Take back one `begin_drain`."""

    async def settled(self) -> None:
        """Wait until no request is in flight that the node sent by itself, for nobody above it.

        Comes while all above the node is held back, so that no new one begins.
        """

    def storage_at(self, offset: int) -> tuple[Node, int]:
        """The node that stores the byte, and where: itself, unless it only passes requests on."""
        return self, offset

    def debug_event(self, event: DebugEvent) -> None:
        """Take note of what a user of this node is about to do (see `takes_debug_events`)."""

    async def close(self) -> None:
        """Let go of what the node holds; no request is in flight, no parent is left."""

    # What a driver implements

    @abstractmethod
    async def _pread(self, offset: int, buffer: memoryview) -> None:
        """Read; offset and length fit the limits.

        Where the size is not a multiple of the request alignment, the last block reaches beyond
        the end of the node: what is there reads as zeroes.
        """

    @abstractmethod
    async def _pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        """Write; offset and length fit the limits."""

    async def _pwrite_zeroes(
        self, offset: int, length: int, fua: bool, may_unmap: bool, fast_only: bool
    ) -> None:
        """Zero a range within the limits, faster than writing; ENOTSUP where that is not so."""
        raise NodeError(errno.ENOTSUP)

    async def _pdiscard(self, offset: int, length: int) -> None:
        """Discard a range within the limits; ENOTSUP is not an error for the caller."""
        raise NodeError(errno.ENOTSUP)

    async def _flush(self) -> None:
        """Bring completed writes to stable storage; nothing to do where none are cached."""

    async def _block_status(self, offset: int, length: int) -> BlockStatus:
        """Describe the first run; the default knows only that it is allocated.

        `offset` fits the request alignment, and the run is at most `length` bytes long.
        """
        return BlockStatus(length, DATA)

    async def _truncate(self, size: int) -> None:
        """Change the size; filters let their child do it."""
        if self.filtered is None:
            raise CommandError("Image format driver does not support resize")
        await self.filtered.truncate(size)

    # How the gate does it

    async def _gated_pread(self, offset: int, buffer: memoryview) -> None:
        length = len(buffer)
        alignment = self.limits.request_alignment
        if not length:
            return
        if alignment == 1:
            await self._read_pieces(offset, buffer)
            return
        async with self.tracked.request(offset, length, Kind.READ, is_serialising=False):
            if not (offset | length) % alignment:
                await self._read_pieces(offset, buffer)
                return
            begin = round_down(offset, alignment)
            bounce = memoryview(bytearray(round_up(offset + length, alignment) - begin))
            await self._read_pieces(begin, bounce)
            buffer[:] = bounce[offset - begin : offset - begin + length]

    async def _read_pieces(self, offset: int, buffer: memoryview) -> None:
        for begin, end in _pieces(0, len(buffer), self.limits.max_transfer):
            await self._pread(offset + begin, buffer[begin:end])

    async def _gated_pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        length = len(data)
        detect = self.config.detect_zeroes
        if not length:
            return
        if self.write_threshold:
            self._check_write_threshold(offset + length)
        if detect is not DetectZeroes.OFF and is_zero(data):
            await self.pwrite_zeroes(
                offset, length, fua=fua, may_unmap=detect is DetectZeroes.UNMAP
            )
            return
        await self._aligned_pwrite(offset, data, fua)

    async def _aligned_pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        length = len(data)
        alignment = self.limits.request_alignment
        if alignment == 1:
            await self._write_pieces(offset, data, fua)
            return
        is_ragged = bool((offset | length) % alignment)
        async with self.tracked.request(
            offset, length, Kind.WRITE, is_serialising=is_ragged, alignment=alignment
        ) as request:
            if is_ragged:
                data = await self._fill_up(request.offset, request.end, offset, data)
            await self._write_pieces(request.offset, data, fua)

    async def _fill_up(self, begin: int, end: int, offset: int, data: memoryview) -> memoryview:
        """Surround `data` with what is stored, so that it covers `[begin, end)`."""
        alignment = self.limits.request_alignment
        bounce = memoryview(bytearray(end - begin))
        ragged = {begin} if begin < offset else set()
        if offset + len(data) < end:
            ragged.add(end - alignment)
        for block in ragged:
            await self._pread(block, bounce[block - begin : block - begin + alignment])
        bounce[offset - begin : offset - begin + len(data)] = data
        return bounce

    async def _write_pieces(self, offset: int, data: memoryview, fua: bool) -> None:
        for begin, end in _pieces(0, len(data), self.limits.max_transfer):
            await self._pwrite(offset + begin, data[begin:end], fua)

    async def _write_zero_bytes(self, offset: int, length: int, fua: bool) -> None:
        for begin, end in _pieces(offset, offset + length, _BOUNCE):
            await self._aligned_pwrite(begin, _ZEROES[: end - begin], fua)

    async def _zero_range(
        self, offset: int, length: int, fua: bool, may_unmap: bool, fast_only: bool
    ) -> None:
        unit = self.limits.pwrite_zeroes_alignment or 1
        begin, end = round_up(offset, unit), round_down(offset + length, unit)
        if begin >= end:
            begin = end = offset + length
        if fast_only and (begin, end) != (offset, offset + length):
            raise NodeError(errno.ENOTSUP)
        await self._zero_with_bytes(offset, begin, fua)
        for first, last in _pieces(begin, end, self.limits.max_pwrite_zeroes):
            try:
                await self._pwrite_zeroes(first, last - first, fua, may_unmap, fast_only)
            except NodeError as error:
                if error.errno != errno.ENOTSUP or fast_only:
                    raise
                await self._zero_with_bytes(first, last, fua)
        await self._zero_with_bytes(end, offset + length, fua)

    async def _zero_with_bytes(self, begin: int, end: int, fua: bool) -> None:
        step = min(self.limits.max_transfer or _BOUNCE, _BOUNCE)
        for first, last in _pieces(begin, end, step):
            await self._pwrite(first, _ZEROES[: last - first], fua)

    async def _aligned_block_status(self, offset: int, length: int) -> BlockStatus:
        """Describe the range in whole blocks; one of several runs counts as data."""
        alignment = self.limits.request_alignment
        begin = round_down(offset, alignment)
        asked = min(round_up(offset + length, alignment), self.size) - begin
        found, status = await self._block_status(begin, asked)
        if found < asked:
            found = round_down(found, alignment)
        if not found:
            found, status = alignment, DATA
        return BlockStatus(min(begin + found - offset, length), status)

    async def _discard_range(self, begin: int, end: int, fua: bool) -> None:
        try:
            for first, last in _pieces(begin, end, self.limits.max_pdiscard):
                await self._pdiscard(first, last - first)
        except NodeError as error:
            if error.errno != errno.ENOTSUP:
                raise
        if fua:
            await self.flush()


def _pieces(begin: int, end: int, maximum: int) -> Iterator[tuple[int, int]]:
    """Cut `[begin, end)` into pieces of at most `maximum` bytes; 0 means no maximum."""
    if begin >= end:
        return
    step = maximum or end - begin
    for first in range(begin, end, step):
        yield first, min(first + step, end)


def is_zero(data: memoryview) -> bool:
    """Whether all bytes are zero; ends at the first block that has another byte."""
    if not data:
        return True
    if data[0] or data[-1]:
        return False
    # Comparing bytes objects is one memcmp; comparing memoryviews unpacks every element.
    return all(
        bytes(data[begin:end]) == _ZERO_BLOCK[: end - begin]
        for begin, end in _pieces(0, len(data), len(_ZERO_BLOCK))
    )
