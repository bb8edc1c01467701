# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Devices: the root of a graph as one user of it sees it, and the door for its requests.

An export has a device of its own, and the older commands know devices by name ("drive0"). The
device checks the bounds once, holds requests back while the graph below it changes, and keeps
the account of what its user did. Behind it, everyone trusts a request.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any, TypeVar

from nbdjobs.errors import NodeError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.graph import Edge, Graph, Role, Root
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.status import BlockStatus

T = TypeVar("T")


@dataclass(slots=True)
class Account:
    """What was done of one kind of request: how often, how much, how long, how often in vain."""

    operations: int = 0
    length: int = 0
    total_time_ns: int = 0
    failed: int = 0
    invalid: int = 0


@dataclass(slots=True)
class Accounting:
    """A device's accounts (QAPI `BlockDeviceStats`)."""

    read: Account = field(default_factory=Account)
    write: Account = field(default_factory=Account)
    unmap: Account = field(default_factory=Account)
    flush: Account = field(default_factory=Account)
    highest_offset_written: int = 0


class Device(Root):
    """A root with one node below it.

    Attributes:
        name: What commands call it, or "" for one that only its user knows.
        accounting: What its user did.
    """

    def __init__(
        self,
        graph: Graph,
        node: Node,
        *,
        name: str = "",
        needed: Permission = Permission.CONSISTENT_READ,
        shared: Permission = permissions.ALL,
    ):
        super().__init__()
        self.name = name
        self.accounting = Accounting()
        self._graph = graph
        self._in_flight = 0
        self._holds = 0
        self._idle: list[asyncio.Future[None]] = []
        self._resumed: list[asyncio.Future[None]] = []
        self._root: Edge = graph.attach(self, "root", node, Role.ROOT, needed=needed, shared=shared)

    @property
    def node(self) -> Node:
        """The node that requests go to now."""
        return self._root.node

    @property
    def edge(self) -> Edge:
        """The use of that node."""
        return self._root

    @property
    def size(self) -> int:
        """Bytes of the disk now."""
        return self._root.node.size

    @property
    def in_flight(self) -> int:
        """Requests begun and not yet ended."""
        return self._in_flight

    def describe(self) -> str:
        """What error messages call it."""
        return f"block device '{self.name}'" if self.name else "an unnamed block device"

    async def close(self) -> None:
        """Wait for the requests in flight, then let go of the node."""
        self.hold()
        try:
            await self.idle()
            node = self.node
            self._graph.detach(self._root)
            await self._graph.drop_if_unused(node)
        finally:
            self.release()

    # Holding requests back

    def hold(self) -> None:
        """Keep new requests waiting until released."""
        self._holds += 1

    def release(self) -> None:
        """Take back one `hold`; the last one lets the waiting requests go on, in order."""
        self._holds -= 1
        if not self._holds:
            waiting, self._resumed = self._resumed, []
            _wake(waiting)

    async def idle(self) -> None:
        """Wait until no request is in flight."""
        while self._in_flight:
            await _wait_in(self._idle)

    async def _held_back(self) -> None:
        while self._holds:
            await _wait_in(self._resumed)

    def _ended(self) -> None:
        self._in_flight -= 1
        if self._idle and not self._in_flight:
            waiting, self._idle = self._idle, []
            _wake(waiting)

    # Requests

    async def pread(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the content from `offset` on."""
        if self._holds:
            await self._held_back()
        account = self.accounting.read
        self._in_flight += 1
        begun = perf_counter_ns()
        try:
            node = self._root.node
            if offset < 0 or offset + len(buffer) > node.size:
                raise _out_of_bounds(account, offset, len(buffer))
            await node.pread(offset, buffer)
        except NodeError:
            account.failed += 1
            raise
        finally:
            self._ended()
        account.operations += 1
        account.length += len(buffer)
        account.total_time_ns += perf_counter_ns() - begun

    async def pwrite(self, offset: int, data: memoryview, *, fua: bool = False) -> None:
        """Write `data` at `offset`; with `fua`, return only when it is on stable storage."""
        if self._holds:
            await self._held_back()
        accounting = self.accounting
        account = accounting.write
        self._in_flight += 1
        begun = perf_counter_ns()
        try:
            node = self._root.node
            end = offset + len(data)
            if offset < 0 or end > node.size:
                raise _out_of_bounds(account, offset, len(data))
            await node.pwrite(offset, data, fua=fua)
        except NodeError:
            account.failed += 1
            raise
        finally:
            self._ended()
        if end > accounting.highest_offset_written:
            accounting.highest_offset_written = end
        account.operations += 1
        account.length += len(data)
        account.total_time_ns += perf_counter_ns() - begun

    async def pwrite_zeroes(
        self,
        offset: int,
        length: int,
        *,
        fua: bool = False,
        may_unmap: bool = True,
        fast_only: bool = False,
    ) -> None:
        """Make the range read as zeroes (see `Node.pwrite_zeroes`)."""
        await self._run(
            self.accounting.write,
            offset,
            length,
            lambda node: node.pwrite_zeroes(
                offset, length, fua=fua, may_unmap=may_unmap, fast_only=fast_only
            ),
        )
        end = offset + length
        self.accounting.highest_offset_written = max(self.accounting.highest_offset_written, end)

    async def pdiscard(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Drop the content of the range, as far as the disk can."""
        await self._run(
            self.accounting.unmap,
            offset,
            length,
            lambda node: node.pdiscard(offset, length, fua=fua),
        )

    async def flush(self) -> None:
        """Bring all completed writes to stable storage."""
        await self._run(self.accounting.flush, 0, 0, lambda node: node.flush())

    async def cache(self, offset: int, length: int) -> None:
        """Bring the range into a cache, if there is one."""
        await self._run(None, offset, length, lambda node: node.cache(offset, length))

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """Describe the first run of the range."""
        return await self._run(None, offset, length, lambda node: node.block_status(offset, length))

    def is_known_data(self, offset: int, length: int) -> bool:
        """Whether the range is known, without waiting, to hold no holes."""
        return self._root.node.is_known_data(offset, length)

    async def _run(
        self,
        account: Account | None,
        offset: int,
        length: int,
        operation: Callable[[Node], Coroutine[Any, Any, T]],
    ) -> T:
        """Run one of the less frequent operations behind the same door."""
        if self._holds:
            await self._held_back()
        self._in_flight += 1
        begun = perf_counter_ns()
        try:
            node = self._root.node
            if offset < 0 or offset + length > node.size:
                raise _out_of_bounds(account, offset, length)
            result = await operation(node)
        except NodeError:
            if account is not None:
                account.failed += 1
            raise
        finally:
            self._ended()
        if account is not None:
            account.operations += 1
            account.length += length
            account.total_time_ns += perf_counter_ns() - begun
        return result


def _out_of_bounds(account: Account | None, offset: int, length: int) -> NodeError:
    if account is not None:
        account.invalid += 1
    return NodeError(
        errno.EIO, f"{length} bytes at offset {offset} are beyond the end", offset=offset
    )


async def _wait_in(queue: list[asyncio.Future[None]]) -> None:
    """Wait until woken through `queue`; cancelling leaves nothing in it."""
    future = asyncio.get_running_loop().create_future()
    queue.append(future)
    try:
        await future
    finally:
        if future in queue:
            queue.remove(future)


def _wake(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
