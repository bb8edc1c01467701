# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Devices: the root of a graph as one user of it sees it.

An export has a device of its own, and the older commands know devices by name ("drive0"). The
device lets requests in (`door.py`), checks the bounds once, reacts to errors, and keeps the
account of what its user did. Behind it, everyone trusts a request.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from operator import methodcaller
from time import perf_counter
from typing import Any, Final, TypeVar

from nbdjobs.errors import NodeError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.accounting import Account, Accounting
from nbdjobs.nodes.backing_chain import allocation_depth
from nbdjobs.nodes.device_errors import ErrorHandler
from nbdjobs.nodes.door import Door
from nbdjobs.nodes.error_policy import ErrorAction
from nbdjobs.nodes.graph import Edge, Graph, Role, draining_below
from nbdjobs.nodes.leaky_bucket import Direction
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.status import BlockStatus
from nbdjobs.protocol.export import FileRange

T = TypeVar("T")

_ALL_BUT_RESIZE: Final = permissions.ALL & ~Permission.RESIZE


class Device(Door):
    """A root with one node below it.

    Attributes:
        name: What commands call it, or "" for one that only its user knows.
        accounting: What its user did.
        is_writethrough: Every write returns only when it is on stable storage.
        may_be_inactive: Its user goes on with a disk that is left to another process for a while.
        errors: What reacts to failed requests; without it, they are reported to the user.
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
        may_be_inactive: bool = False,
    ):
        """Attach to `node`; by default as a reader to whom the size must not change."""
        super().__init__()
        self.name = name
        self.accounting = Accounting()
        self.is_writethrough = is_writethrough
        # Whoever uses a disk by its name knows when it is handed over.
        self.may_be_inactive = may_be_inactive or bool(name)
        self.errors: ErrorHandler | None = None
        self._reads = self.accounting.read
        self._writes = self.accounting.write
        self._graph = graph
        self._is_closed = False
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
            if self._in_flight:  # otherwise requests of others need not hurry
                with draining_below(self):
                    await self.idle()
        except BaseException:
            self.release()
            raise
        if self._is_closed:  # by another task, meanwhile
            return
        self._is_closed = True
        self.turn_away(errno.ENOMEDIUM)
        node = self.node
        self._graph.detach(self._root)
        await self._graph.drop_if_unused(node)

    async def settle(self) -> None:
        """Wait until no request is in flight, and flush what they wrote; called while held.

        Raises:
            NodeError: The flush has failed.
        """
        with draining_below(self):
            await self.idle()
        if self._is_closed:
            return
        self._in_flight += 1  # whoever changes the graph waits for the flush
        try:
            await self._root.node.flush()
        finally:
            self._leave()

    # Requests. Each is counted in and out by hand: this is the path that every byte takes.

    async def pread(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the content from `offset` on."""
        length = len(buffer)
        if self._obstacles:
            await self._enter(Direction.READ, length)
        else:
            self._in_flight += 1
        begun = perf_counter()
        account = self._reads
        node = self._root.node
        try:
            if offset < 0 or offset + length > node.size:
                raise _OutOfBoundsError(offset, length)
            await node.pread(offset, buffer)
        except BaseException as error:
            self._fail(account, begun, error)
            if self.errors is None:
                raise
            again = methodcaller("pread", offset, buffer)
            await self._recover(error, account, Direction.READ, offset, length, again)
            return
        self._in_flight -= 1
        if self._awaiting_idle and not self._in_flight:
            self._tell_idle()
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
        if self._obstacles:
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

    def stored_at(self, offset: int, length: int, data_only: bool) -> FileRange | None:
        """Tell where the kernel can send a range from at once, if nothing holds it back."""
        if self._obstacles:
            return None
        begun = perf_counter()
        found = self._root.node.stored_at(offset, length, data_only)
        if found is not None:
            account = self._reads
            account.operations += 1
            account.length += length
            account.note_time(begun)
        return found

    def note_hole(self, length: int, duration_s: float) -> None:
        """Take account of a read that was answered by telling of a hole."""
        account = self._reads
        account.operations += 1
        account.length += length
        account.note_duration(duration_s)

    def pwrite_now(self, offset: int, data: memoryview) -> bool:
        """Do a write on the spot if nothing holds it back and it needs no wait."""
        node = self._root.node
        length = len(data)
        end = offset + length
        if self._obstacles or self.is_writethrough or end > node.size:
            return False
        begun = perf_counter()
        if not node.pwrite_now(offset, data):
            return False
        if end > self.accounting.highest_offset_written:
            self.accounting.highest_offset_written = end
        account = self._writes
        account.operations += 1
        account.length += length
        now = perf_counter()
        account.last_end_s = now
        account.total_time_s += now - begun
        if account.histogram is not None:
            account.histogram.count(now - begun)
        return True

    async def pwrite(self, offset: int, data: memoryview, *, fua: bool = False) -> None:
        """Write `data` at `offset`; with `fua`, return only when it is on stable storage."""
        length = len(data)
        if self._obstacles:
            await self._enter(Direction.WRITE, length)
        else:
            self._in_flight += 1
        begun = perf_counter()
        account = self._writes
        end = offset + length
        node = self._root.node
        try:
            if offset < 0 or end > node.size:
                raise _OutOfBoundsError(offset, length)
            await node.pwrite(offset, data, fua=fua or self.is_writethrough)
        except BaseException as error:
            self._fail(account, begun, error)
            if self.errors is None:
                raise
            fua = fua or self.is_writethrough
            again = methodcaller("pwrite", offset, data, fua=fua)
            await self._recover(error, account, Direction.WRITE, offset, length, again)
            self._note_written(end)
            return
        self._in_flight -= 1
        if self._awaiting_idle and not self._in_flight:
            self._tell_idle()
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
            Direction.WRITE,
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
        self._note_written(offset + length)

    async def pdiscard(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Drop the content of the range, as far as the disk can."""
        await self._run(
            self.accounting.unmap,
            Direction.WRITE,
            offset,
            length,
            lambda node: node.pdiscard(offset, length, fua=fua or self.is_writethrough),
        )

    async def flush(self) -> None:
        """Bring all completed writes to stable storage."""

        def operation(node: Node) -> Coroutine[Any, Any, None]:
            node.check_active()  # what could be flushed has been, and then it was handed over
            return node.flush()

        await self._run(self.accounting.flush, None, 0, 0, operation)

    async def cache(self, offset: int, length: int) -> None:
        """Bring the range into a cache, if there is one."""
        await self._attempt(
            None, Direction.READ, offset, length, lambda node: node.cache(offset, length)
        )

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """Describe the first run of the range."""
        return await self._attempt(
            None, None, offset, length, lambda node: node.block_status(offset, length)
        )

    async def allocation_depth(self, offset: int, length: int) -> tuple[int, int]:
        """In which node of the chain the first run of the range is: its length, and the depth."""
        return await self._attempt(
            None, None, offset, length, lambda node: allocation_depth(node, offset, length)
        )

    def is_known_data(self, offset: int, length: int) -> bool:
        """Whether the range is known, without waiting, to hold no holes."""
        return self._root.node.is_known_data(offset, length)

    async def _run(
        self,
        account: Account,
        direction: Direction | None,
        offset: int,
        length: int,
        operation: Callable[[Node], Coroutine[Any, Any, None]],
    ) -> None:
        """Do one of the less frequent operations like those above."""
        try:
            await self._attempt(account, direction, offset, length, operation)
        except BaseException as error:
            await self._recover(error, account, direction, offset, length, operation)

    async def _attempt(
        self,
        account: Account | None,
        direction: Direction | None,
        offset: int,
        length: int,
        operation: Callable[[Node], Coroutine[Any, Any, T]],
    ) -> T:
        """Let an operation in, check its bounds, do it once, and account for it."""
        if self._obstacles:
            await self._enter(direction, length)
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

    def _note_written(self, end: int) -> None:
        self.accounting.highest_offset_written = max(self.accounting.highest_offset_written, end)

    # Failures

    async def _recover(
        self,
        error: BaseException,
        account: Account,
        direction: Direction | None,
        offset: int,
        length: int,
        operation: Callable[[Node], Coroutine[Any, Any, None]],
    ) -> None:
        """React to the failure of a request: raise it, ignore it, or try until that is done.

        What stops the device holds it, so that the next attempt waits at the door until somebody
        continues.
        """
        while True:
            action = self._react(error, is_read=direction is Direction.READ)
            if action is ErrorAction.REPORT:
                raise error
            if action is ErrorAction.IGNORE:
                return
            try:
                await self._attempt(account, direction, offset, length, operation)
                return
            except BaseException as again:
                error = again

    def _react(self, error: BaseException, *, is_read: bool) -> ErrorAction:
        """Only what a node says is an I/O error: users' mistakes and cancelling are none."""
        if (
            self.errors is None
            or not isinstance(error, NodeError)
            or isinstance(error, _OutOfBoundsError)
        ):
            return ErrorAction.REPORT
        return self.errors.handle(error, is_read=is_read, node_name=self.node.name)

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
