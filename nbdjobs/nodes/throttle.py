# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`throttle`: a filter whose requests keep to the limits of a throttle group.

Reads and requests to cache count as reads; writes, zeroes and discards count as writes; flushes
and questions about block status are free. A request that need not wait costs no coroutine here.

Source: QEMU qapi/block-core.json (BlockdevOptionsThrottle) and `docs/throttle.txt`.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from nbdjobs.errors import CommandError
from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.driver import ChildReference, DriverNode, Reopening
from nbdjobs.nodes.gate import Operation
from nbdjobs.nodes.graph import Graph, Role
from nbdjobs.nodes.leaky_bucket import Direction
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.options import BlockdevOptions, BlockdevRef
from nbdjobs.nodes.status import BlockStatus
from nbdjobs.nodes.throttle_group import Member, ThrottleGroup
from nbdjobs.protocol.export import FileRange


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrottleOptions(BlockdevOptions):
    """Options of the driver (QAPI `BlockdevOptionsThrottle`).

    Attributes:
        throttle_group: Name of the object with the limits.
        file: The node whose requests are throttled.
    """

    throttle_group: str
    file: BlockdevRef


class ThrottleNode(DriverNode[ThrottleOptions]):
    """The driver `throttle`."""

    driver: ClassVar[str] = "throttle"
    is_filter: ClassVar[bool] = True
    options_type: ClassVar[type[BlockdevOptions]] = ThrottleOptions
    mutable_options: ClassVar[frozenset[str] | None] = frozenset({"throttle-group"})

    _member: Member | None = None

    def __init__(self, name: str, config: NodeConfig, options: ThrottleOptions):
        super().__init__(name, config)
        self._options = options

    @classmethod
    def children_of(cls, options: ThrottleOptions) -> tuple[ChildReference, ...]:
        """The one child, named in the options."""
        return (ChildReference("file", options.file, Role.FILTERED),)

    @classmethod
    async def open(
        cls, name: str, config: NodeConfig, options: ThrottleOptions, children: Mapping[str, Node]
    ) -> Self:
        """Make the node; `bind` finds its group."""
        return cls(name, config, options)

    def bind(self, graph: Graph) -> None:
        """Join the group; `CommandError` if there is none of that name."""
        self._member = _find_group(graph, self._options).join()

    async def prepare_reopen(
        self, graph: Graph, config: NodeConfig, options: ThrottleOptions
    ) -> Reopening[ThrottleOptions]:
        """Go on as a member of another group."""
        _find_group(graph, options)  # now, so that a wrong name costs nothing
        return _ThrottleReopening(self, config, options, graph)

    @property
    def group(self) -> ThrottleGroup:
        """The group with the limits."""
        return self._turns.group

    def move(self, group: ThrottleGroup, options: ThrottleOptions) -> None:
        """Go on as a member of another group, named in the options; no request may be waiting."""
        self._turns.move(group)
        self._options = options

    async def close(self) -> None:
        """Leave the group, if it was joined."""
        if self._member is not None:
            self._member.leave()

    # What it is

    @property
    def size(self) -> int:
        """Bytes of the child."""
        return self._file.size

    @property
    def filename(self) -> str:
        """The options written out, like QEMU."""
        return self.json_filename

    @property
    def content_options(self) -> dict[str, object]:
        """The child's, and the group."""
        return super().content_options | {"throttle-group": self._options.throttle_group}

    @property
    def cluster_size(self) -> int:
        """That of the child."""
        return self._file.cluster_size

    @property
    def filtered(self) -> Node | None:
        """The child, whose content the filter shows."""
        return self._file

    @property
    def _file(self) -> Node:
        return self.edges["file"].node

    @property
    def _turns(self) -> Member:
        assert self._member is not None, "bound before anyone uses it"
        return self._member

    def begin_drain(self) -> None:
        """Let everything through until `end_drain`."""
        self._turns.begin_drain()

    def end_drain(self) -> None:
        """Throttle again."""
        self._turns.end_drain()

    # Requests

    def _begin(self, direction: Direction, length: int) -> bool:
        """Count a request if it may begin at once; otherwise it has to wait for its turn."""
        turns = self._turns
        if not turns.is_free(direction):
            return False
        turns.account(direction, length)
        return True

    async def _wait_turn(self, direction: Direction, length: int) -> None:
        if not self._begin(direction, length):
            await self._turns.wait_turn(direction, length)

    def pread_now(self, offset: int, buffer: memoryview, data_only: bool) -> bool:
        """Read from the child, if the read need not wait here."""
        turns = self._turns
        if not self._reads_pass or not turns.is_free(Direction.READ):
            return False
        if not self._file.pread_now(offset, buffer, data_only):
            return False
        turns.account(Direction.READ, len(buffer))
        return True

    def stored_at(self, offset: int, length: int, data_only: bool) -> FileRange | None:
        """Where the child stores it, if the read need not wait here."""
        turns = self._turns
        if not self._reads_pass or not turns.is_free(Direction.READ):
            return None
        found = self._file.stored_at(offset, length, data_only)
        if found is not None:
            turns.account(Direction.READ, length)
        return found

    def pwrite_now(self, offset: int, data: memoryview) -> bool:
        """Write to the child, if the write need not wait here."""
        turns = self._turns
        if not self._writes_pass or not turns.is_free(Direction.WRITE):
            return False
        if not self._file.pwrite_now(offset, data):
            return False
        turns.account(Direction.WRITE, len(data))
        return True

    def _pread(self, offset: int, buffer: memoryview) -> Operation:
        if self._begin(Direction.READ, len(buffer)):
            return self._file.pread(offset, buffer)
        return self._pread_later(offset, buffer)

    async def _pread_later(self, offset: int, buffer: memoryview) -> None:
        await self._turns.wait_turn(Direction.READ, len(buffer))
        await self._file.pread(offset, buffer)

    def _pwrite(self, offset: int, data: memoryview, fua: bool) -> Operation:
        if self._begin(Direction.WRITE, len(data)):
            return self._file.pwrite(offset, data, fua=fua)
        return self._pwrite_later(offset, data, fua)

    async def _pwrite_later(self, offset: int, data: memoryview, fua: bool) -> None:
        await self._turns.wait_turn(Direction.WRITE, len(data))
        await self._file.pwrite(offset, data, fua=fua)

    async def _pwrite_zeroes(
        self, offset: int, length: int, fua: bool, may_unmap: bool, fast_only: bool
    ) -> None:
        await self._wait_turn(Direction.WRITE, length)
        await self._file.pwrite_zeroes(
            offset, length, fua=fua, may_unmap=may_unmap, fast_only=fast_only
        )

    async def _pdiscard(self, offset: int, length: int) -> None:
        await self._wait_turn(Direction.WRITE, length)
        await self._file.pdiscard(offset, length)

    async def cache(self, offset: int, length: int) -> None:
        """Cache the child's range, which may read it."""
        await self._wait_turn(Direction.READ, length)
        await self._file.cache(offset, length)

    async def _flush(self) -> None:
        await self._file.flush()

    def _block_status(self, offset: int, length: int) -> Coroutine[Any, Any, BlockStatus]:
        return self._file.block_status(offset, length)

    def is_known_data(self, offset: int, length: int) -> bool:
        """What the child knows."""
        return self._file.is_known_data(offset, length)

    def begin_writeback(self, offset: int, length: int) -> None:
        """Pass the hint on."""
        self._file.begin_writeback(offset, length)


class _ThrottleReopening(Reopening[ThrottleOptions]):
    _node: ThrottleNode

    def __init__(
        self, node: ThrottleNode, config: NodeConfig, options: ThrottleOptions, graph: Graph
    ):
        super().__init__(node, config, options)
        self._graph = graph
        self._group = node.group

    def commit(self) -> None:
        super().commit()
        self._node.move(_find_group(self._graph, self._after[1]), self._after[1])

    def abort(self) -> None:
        super().abort()
        self._node.move(self._group, self._before[1])


def _find_group(graph: Graph, options: ThrottleOptions) -> ThrottleGroup:
    group = graph.throttle_groups.get(options.throttle_group)
    if group is None:
        raise CommandError(f"Throttle group '{options.throttle_group}' does not exist")
    return group
