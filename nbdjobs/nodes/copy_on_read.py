# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A filter that keeps what it reads from backing files in the image above them.

    client ──▶ copy-on-read ──file──▶ overlay ──backing──▶ ... ──▶ bottom ──backing──▶ base
                                         ▲    what is read from here    │   and not from here
                                         └──────────── is copied ───────┘

Clusters are copied under a serialising request: it waits for writes of clients to them that are
under way, later writes wait for it, and what a client has written by then is allocated and is not
copied any more. So a copy never takes the place of something newer. For that, all writes have to
come through the filter: it does not let others write to the overlay.

Source: QEMU `block/copy-on-read.c`, QAPI `BlockdevOptionsCor` for the behaviour.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

from nbdjobs.errors import CommandError
from nbdjobs.nodes.backing_chain import (
    allocated_above,
    backing_of,
    contains,
    edges_between,
    freeze,
    skip_filters,
    thaw,
)
from nbdjobs.nodes.buffers import BUFFER_SIZE
from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.driver import ChildReference, DriverNode
from nbdjobs.nodes.gate import Operation, is_zero
from nbdjobs.nodes.graph import Edge, Graph, Role
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.options import BlockdevOptions, BlockdevRef
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.rounding import round_down, round_up
from nbdjobs.nodes.status import BlockStatus
from nbdjobs.nodes.tracked import Kind
from nbdjobs.protocol.export import FileRange

_LONGEST_PIECE: Final = max(BUFFER_SIZE, 512 * 1024)
"""Most bytes copied under one request: writes of clients there have to wait for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyOnReadOptions(BlockdevOptions):
    """Options of the driver (QAPI `BlockdevOptionsCor`).

    Attributes:
        file: The overlay.
        bottom: The last node to copy from; all of the chain if not given.
    """

    file: BlockdevRef
    bottom: str | None = None


class CopyOnRead(DriverNode[CopyOnReadOptions]):
    """The driver `copy-on-read`."""

    driver: ClassVar[str] = "copy-on-read"
    is_filter: ClassVar[bool] = True
    options_type: ClassVar[type[BlockdevOptions]] = CopyOnReadOptions

    def __init__(self, name: str, config: NodeConfig, bottom: Node | None = None):
        """Make the node; everything down to `bottom` is copied, or all of the chain if None."""
        super().__init__(name, config)
        self._bottom = bottom
        self._bottom_name: str | None = None
        self._frozen: list[Edge] = []

    # As a driver

    @classmethod
    def children_of(cls, options: CopyOnReadOptions) -> tuple[ChildReference, ...]:
        """The overlay."""
        return (ChildReference("file", options.file, Role.FILTERED),)

    @classmethod
    async def open(
        cls,
        name: str,
        config: NodeConfig,
        options: CopyOnReadOptions,
        children: Mapping[str, Node],
    ) -> Self:
        """Make the node; `bind` finds the bottom."""
        node = cls(name, config)
        node._bottom_name = options.bottom
        return node

    def bind(self, graph: Graph) -> None:
        """Find the bottom; `CommandError` if it is none."""
        if self._bottom_name is None:
            return
        bottom = graph.nodes.get(self._bottom_name)
        if bottom is None:
            raise CommandError(f"Bottom node '{self._bottom_name}' not found")
        if bottom.is_filter:
            raise CommandError(f"Bottom node '{self._bottom_name}' is a filter")
        self._bottom = bottom

    async def start(self) -> None:
        """Rely on the chain from now on."""
        self.arm()

    def arm(self) -> None:
        """Let nobody change the chain down to the bottom; the child is attached.

        Raises:
            CommandError: The bottom is not in it, or somebody else relies on it.
        """
        if self._bottom is None:
            return
        if not contains(self._file, self._bottom):
            raise CommandError(
                f"Node '{self._bottom.name}' is not in a chain starting from '{self._file.name}'"
            )
        edges = edges_between(self._file, self._bottom)
        freeze(edges)
        self._frozen = edges

    def disarm(self) -> None:
        """Take back `arm`."""
        thaw(self._frozen)
        self._frozen = []

    async def close(self) -> None:
        """Rely on the chain no more."""
        self.disarm()

    # What it is

    @property
    def _file(self) -> Node:
        return self.edges["file"].node

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._file.size

    @property
    def filename(self) -> str:
        """Where the overlay's content is."""
        return self._file.filename

    @property
    def cluster_size(self) -> int:
        """That of the overlay."""
        return self._file.cluster_size

    @property
    def filtered(self) -> Node | None:
        """The overlay, whose content the filter shows."""
        return self._file

    @property
    def supports_compressed_writes(self) -> bool:  # type: ignore[override]  # as its child
        """Whether the overlay does."""
        return self._file.supports_compressed_writes

    def child_permissions(
        self, edge: Edge, needed: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """Write what is there already; keep others from writing past the filter."""
        if self.is_active:
            needed |= Permission.WRITE_UNCHANGED
        if self.parents:
            shared &= ~Permission.WRITE
        return needed, shared | Permission.WRITE_UNCHANGED

    # Copying

    async def copy(self, offset: int, length: int) -> None:
        """Let the overlay have a range itself that it has from below, down to the bottom.

        The range is rounded to clusters. Cancelling leaves a part of it copied.

        Raises:
            NodeError: Reading or writing failed.
        """
        unit = max(self._file.cluster_size, self._file.limits.request_alignment, 1)
        end = min(round_up(offset + length, unit), self.size)
        begin = round_down(offset, unit)
        step = max(round_down(_LONGEST_PIECE, unit), unit)
        while begin < end:
            piece = min(begin + step, end)
            async with self.tracked.request(begin, piece - begin, Kind.COPY, is_serialising=True):
                await self._copy_piece(begin, piece)
            begin = piece

    async def _copy_piece(self, offset: int, end: int) -> None:
        async for begin, length in self._runs_from_below(offset, end):
            data = memoryview(bytearray(length))
            await self._file.pread(begin, data)
            if is_zero(data):
                await self._file.pwrite_zeroes(begin, length, may_unmap=False)
            else:
                await self._file.pwrite(begin, data)

    async def _runs_from_below(self, offset: int, end: int) -> AsyncIterator[tuple[int, int]]:
        while offset < end:
            is_wanted, length = await self.comes_from_below(offset, end - offset)
            if is_wanted:
                yield offset, length
            offset += length

    async def comes_from_below(self, offset: int, length: int) -> tuple[bool, int]:
        """Whether the overlay has a range from where this filter copies.

        Returns:
            The answer for the first run of the range, and that run's length.

        Raises:
            NodeError: An image could not be read.
        """
        overlay = skip_filters(self._file)
        is_allocated, length = await overlay.allocation(offset, length)
        if is_allocated or overlay is self._bottom:
            return False, length
        base = None if self._bottom is None else backing_of(self._bottom)
        return await allocated_above(backing_of(overlay), base, offset, length)

    # Requests

    def pread_now(self, offset: int, buffer: memoryview, data_only: bool) -> bool:
        """Read on the spot what the overlay has itself."""
        return self._file.is_known_data(offset, len(buffer)) and self._file.pread_now(
            offset, buffer, data_only
        )

    def stored_at(self, offset: int, length: int, data_only: bool) -> FileRange | None:
        """Where the overlay stores it, if it does."""
        if not self._file.is_known_data(offset, length):
            return None
        return self._file.stored_at(offset, length, data_only)

    def _pread(self, offset: int, buffer: memoryview) -> Operation:
        if self._file.is_known_data(offset, len(buffer)) or not self.is_active:
            return self._file.pread(offset, buffer)
        return self._copy_and_read(offset, buffer)

    async def _copy_and_read(self, offset: int, buffer: memoryview) -> None:
        position, end = offset, offset + len(buffer)
        while position < end:
            is_wanted, length = await self.comes_from_below(position, end - position)
            if is_wanted:
                await self.copy(position, length)
            position += length
        await self._file.pread(offset, buffer)

    async def _pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        async with self.tracked.request(offset, len(data), Kind.WRITE, is_serialising=False):
            await self._file.pwrite(offset, data, fua=fua)

    async def _pwrite_zeroes(
        self, offset: int, length: int, fua: bool, may_unmap: bool, fast_only: bool
    ) -> None:
        async with self.tracked.request(offset, length, Kind.WRITE, is_serialising=False):
            await self._file.pwrite_zeroes(
                offset, length, fua=fua, may_unmap=may_unmap, fast_only=fast_only
            )

    async def _pdiscard(self, offset: int, length: int) -> None:
        async with self.tracked.request(offset, length, Kind.DISCARD, is_serialising=False):
            await self._file.pdiscard(offset, length)

    async def pwrite_compressed(self, offset: int, data: memoryview) -> None:
        """Let the overlay compress it."""
        async with self.tracked.request(offset, len(data), Kind.WRITE, is_serialising=False):
            await self._file.pwrite_compressed(offset, data)

    async def _flush(self) -> None:
        await self._file.flush()

    def _block_status(self, offset: int, length: int) -> Coroutine[Any, Any, BlockStatus]:
        return self._file.block_status(offset, length)

    def is_known_data(self, offset: int, length: int) -> bool:
        """What the overlay knows."""
        return self._file.is_known_data(offset, length)

    def begin_writeback(self, offset: int, length: int) -> None:
        """Pass the hint on."""
        self._file.begin_writeback(offset, length)
