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
from time import perf_counter
from typing import Any, Final, TypeVar

from nbdjobs.errors import NodeError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.graph import Edge, Graph, Role, Root, draining_below
from nbdjobs.nodes.latency import Histogram
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.status import BlockStatus

T = TypeVar("T")

_ALL_BUT_RESIZE: Final = permissions.ALL & ~Permission.RESIZE


@dataclass(slots=True)
class Account:
    """What was done of one kind of request: how often, how much, how long, how often in vain.

    Attributes:
        last_end_s: When the last one ended, by `perf_counter`; 0 if there was none.
        histogram: How long they took, failed ones included, if somebody wants to know.
    """

    operations: int = 0
    length: int = 0
    total_time_s: float = 0.0
    failed: int = 0
    invalid: int = 0
    last_end_s: float = 0.0
    histogram: Histogram | None = None

    @property
    def total_time_ns(self) -> int:
        """The time in the unit of QAPI; seconds are kept, as adding up floats is cheaper."""
        return round(self.total_time_s * 1e9)

    def note_time(self, begun: float) -> None:
        """Take account of the time of a request that began at `begun` and ends now."""
        now = perf_counter()
        self.last_end_s = now
        self.total_time_s += now - begun
        if self.histogram is not None:
            self.histogram.count(now - begun)


@dataclass(slots=True)
class Accounting:
    """A device's accounts (QAPI `BlockDeviceStats`)."""

    read: Account = field(default_factory=Account)
    write: Account = field(default_factory=Account)
    unmap: Account = field(default_factory=Account)
    flush: Account = field(default_factory=Account)
    highest_offset_written: int = 0

    @property
    def idle_time_ns(self) -> int | None:
        """Nanoseconds since the last request ended; None if there was none."""
        last_s = max(each.last_end_s for each in (self.read, self.write, self.unmap, self.flush))
        return round((perf_counter() - last_s) * 1e9) if last_s else None


class Device(Root):
    """A root with one node below it.

    A request is in flight from the moment it is let in. One that comes while the device is held
    waits, and `release` lets all that wait in at once, whatever `hold` follows: so they keep
    their order, and none starves where drained sections follow each other closely.

    Attributes:
        name: What commands call it, or "" for one that only its user knows.
        accounting: What its user did.
        is_writethrough: Every write returns only when it is on stable storage.
    """

    def __init__(
        self,
        graph: Graph,
        node: Node,
        *,
        name: str = "",
        needed: Permission = Permission.CONSISTENT_READ,
        shared: Permission = _ALL_BUT_RESIZE,
        is_writethrough: bool = False,
    ):
        """Attach to `node`; by default as a reader to whom the size must not change."""
        super().__init__()
        self.name = name
        self.accounting = Accounting()
        self.is_writethrough = is_writethrough
        self._reads = self.accounting.read
        self._writes = self.accounting.write
        self._graph = graph
        self._in_flight = 0
        self._holds = 0
        self._is_closed = False
        self._held_back: list[asyncio.Future[None]] = []
        self._awaiting_idle: list[asyncio.Future[None]] = []
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
        """Wait for the requests in flight, then let go of the node.

        Requests held back, and those that come later, fail with ENOMEDIUM. Cancelling the wait
        leaves the device open.
        """
        self.hold()
        try:
            with draining_below(self):
                await self.idle()
        except BaseException:
            self.release()
            raise
        if self._is_closed:  # by another task, meanwhile
            return
        # It stays held, so that requests need no check of their own for this.
        self._is_closed = True
        self._in_flight += _wake(self._held_back)
        node = self.node
        self._graph.detach(self._root)
        await self._graph.drop_if_unused(node)

    # Holding requests back

    def hold(self) -> None:
        """Keep new requests waiting until released."""
        self._holds += 1

    def release(self) -> None:
        """Take back one `hold`; the last one lets the waiting requests in, in order."""
        self._holds -= 1
        if not self._holds:
            self._in_flight += _wake(self._held_back)

    async def idle(self) -> None:
        """Wait until no request is in flight."""
        while self._in_flight:
            await _wait_in(self._awaiting_idle)

    async def _wait_to_be_let_in(self) -> None:
        """Wait while held; whoever is woken here has been counted as in flight."""
        if self._is_closed:
            raise NodeError(errno.ENOMEDIUM)
        await _wait_in(self._held_back, if_cancelled_late=self._leave)
        if self._is_closed:
            self._leave()
            raise NodeError(errno.ENOMEDIUM)

    def _leave(self) -> None:
        self._in_flight -= 1
        if self._awaiting_idle and not self._in_flight:
            _wake(self._awaiting_idle)

    # Requests. Each is counted in and out by hand: this is the path that every byte takes.

    async def pread(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the content from `offset` on."""
        if self._holds:
            await self._wait_to_be_let_in()
        else:
            self._in_flight += 1
        begun = perf_counter()
        account = self._reads
        length = len(buffer)
        node = self._root.node
        try:
            if offset < 0 or offset + length > node.size:
                raise _OutOfBoundsError(offset, length)
            await node.pread(offset, buffer)
        except BaseException as error:
            self._fail(account, begun, error)
            raise
        self._in_flight -= 1
        if self._awaiting_idle and not self._in_flight:
            _wake(self._awaiting_idle)
        account.operations += 1
        account.length += length
        now = perf_counter()
        account.last_end_s = now
        account.total_time_s += now - begun
        if account.histogram is not None:
            account.histogram.count(now - begun)

    def pread_now(self, offset: int, buffer: memoryview, data_only: bool) -> bool:
        """Do a read on the spot if nothing holds it back and it needs no wait.

        Out of bounds, nothing is ever there to be read at once.
        """
        if self._holds:
            return False
        begun = perf_counter()
        if not self._root.node.pread_now(offset, buffer, data_only):
            return False
        account = self._reads
        account.operations += 1
        account.length += len(buffer)
        now = perf_counter()
        account.last_end_s = now
        account.total_time_s += now - begun
        if account.histogram is not None:
            account.histogram.count(now - begun)
        return True

    async def pwrite(self, offset: int, data: memoryview, *, fua: bool = False) -> None:
        """Write `data` at `offset`; with `fua`, return only when it is on stable storage."""
        if self._holds:
            await self._wait_to_be_let_in()
        else:
            self._in_flight += 1
        begun = perf_counter()
        account = self._writes
        length = len(data)
        end = offset + length
        node = self._root.node
        try:
            if offset < 0 or end > node.size:
                raise _OutOfBoundsError(offset, length)
            await node.pwrite(offset, data, fua=fua or self.is_writethrough)
        except BaseException as error:
            self._fail(account, begun, error)
            raise
        self._in_flight -= 1
        if self._awaiting_idle and not self._in_flight:
            _wake(self._awaiting_idle)
        if end > self.accounting.highest_offset_written:
            self.accounting.highest_offset_written = end
        account.operations += 1
        account.length += length
        now = perf_counter()
        account.last_end_s = now
        account.total_time_s += now - begun
        if account.histogram is not None:
            account.histogram.count(now - begun)

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
                offset,
                length,
                fua=fua or self.is_writethrough,
                may_unmap=may_unmap,
                fast_only=fast_only,
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
            lambda node: node.pdiscard(offset, length, fua=fua or self.is_writethrough),
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
            await self._wait_to_be_let_in()
        else:
            self._in_flight += 1
        begun = perf_counter()
        node = self._root.node
        try:
            if offset < 0 or length < 0 or offset + length > node.size:
                raise _OutOfBoundsError(offset, length)
            result = await operation(node)
        except BaseException as error:
            self._fail(account, begun, error)
            raise
        self._leave()
        if account is not None:
            account.operations += 1
            account.length += length
            account.note_time(begun)
        return result

    def _fail(self, account: Account | None, begun: float, error: BaseException) -> None:
        """Count a request out that did not succeed; one that was cancelled did not fail."""
        self._leave()
        if account is None:
            return
        if isinstance(error, _OutOfBoundsError):
            account.invalid += 1
        elif isinstance(error, NodeError):
            account.failed += 1
            account.note_time(begun)


class _OutOfBoundsError(NodeError):
    """The request was never given to a node: it is in no account but that of invalid ones."""

    def __init__(self, offset: int, length: int):
        super().__init__(
            errno.EIO, f"{length} bytes at offset {offset} are beyond the end", offset=offset
        )


async def _wait_in(
    queue: list[asyncio.Future[None]], if_cancelled_late: Callable[[], None] | None = None
) -> None:
    """Wait until woken through `queue`; cancelling leaves nothing in it.

    Args:
        queue: Where `_wake` finds the waiters.
        if_cancelled_late: Called when the wait is cancelled after `_wake` has ended it.
    """
    future = asyncio.get_running_loop().create_future()
    queue.append(future)
    try:
        await future
    except BaseException:
        if future in queue:
            queue.remove(future)
        elif if_cancelled_late is not None and not future.cancelled():
            if_cancelled_late()
        raise


def _wake(queue: list[asyncio.Future[None]]) -> int:
    """End the wait of everyone in the queue; returns how many that were."""
    waiting = [future for future in queue if not future.done()]
    queue.clear()
    for future in waiting:
        future.set_result(None)
    return len(waiting)
