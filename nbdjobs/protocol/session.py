# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The transmission phase of one client: parse requests, do them, word the replies.

    consume()   the hot loop: whole requests in the receive buffer are checked (`requests.Rules`)
                and begun, as far as the client's turn goes (`turns`)
    _read() ... the commands, one coroutine each; begun eagerly (`nbdjobs.eager`), so what never
                waits is over before the next request is looked at

Replies gather in `out` and leave together; the connection sends them. Memory is bounded by
`is_held`: while the client does not take its replies, or too much is in flight, nothing new
is begun, and the connection stops reading.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Coroutine, Mapping
from time import perf_counter
from typing import Any, Final

from nbdjobs.eager import start
from nbdjobs.errors import NodeError, ProtocolError
from nbdjobs.protocol.buffers import POOLED_FROM, BufferPool, ReceiveBuffer
from nbdjobs.protocol.constants import (
    ReplyFlag,
)
from nbdjobs.protocol.export import MetaContext
from nbdjobs.protocol.extents import (
    MAX_EXTENTS,
    MAX_READ_EXTENTS,
    ExtentSearch,
    allocation_context,
    runs_of,
)
from nbdjobs.protocol.memory import Budget, Holdings
from nbdjobs.protocol.messages import nbd_error, unpack_status_payload
from nbdjobs.protocol.negotiation import Chosen
from nbdjobs.protocol.replies import REPLIES
from nbdjobs.protocol.requests import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Rules,
    too_long,
)
from nbdjobs.protocol.sending import UNREAD_TO, Memory, Piece
from nbdjobs.protocol.turns import ALONE, CHANGE_COST, READ_COST, STATUS_COST, Allowance

FLUSH_BYTES: Final = 256 * 1024
"""Bytes of replies that leave without waiting for the end of the batch."""

AHEAD_BYTES: Final = 2 * 1024 * 1024
"""Bytes of replies made ready while the client still takes earlier ones, so that it never has to
wait for the next; then nothing new is begun."""

FLUSH_PIECES: Final = 1000
"""Pieces of replies that leave at once: below the kernel's limit of 1024 (IOV_MAX)."""

NEVER: Final = 1 << 64
"""A length that no read has."""

_DONE: Final = int(ReplyFlag.DONE)
_log = logging.getLogger(__name__)


class Session:
    """The requests of one client on its export.

    Args:
        chosen: What the negotiation led to.
        pool: Where large read buffers come from.
        budget: What all clients may hold.
        flush: Sends `out`; called in the middle of a large batch.
        notify: Called when a request that had to wait has put its reply into `out`, or has
            made room for further ones.
        unread_from: Bytes of a read from which on `out` may hold ranges of files instead of
            what they contain.

    Attributes:
        out: Replies to send, in order.
        out_bytes: Payload bytes in `out`.
        has_file_ranges: Whether there are ranges of files in `out`.
        borrowed: Buffers of the pool in `out`, to be given back when sent.
        holdings: Memory that is held for the client.
        is_held: Whether nothing new may begin now.
        spent: What the requests of this turn have cost (see `turns`).
        is_turn_over: Whether there may be whole requests that wait for the next turn.
        is_over: No further request is taken: the client said goodbye, or broke a rule.
        batch: Requests that the last `consume` found.
        needed: Bytes, counted from the start of what is not parsed, that make the next
            request whole.
    """

    def __init__(
        self,
        chosen: Chosen,
        *,
        pool: BufferPool,
        budget: Budget,
        flush: Callable[[], None],
        notify: Callable[[], None],
        unread_from: int = NEVER,
    ):
        export = chosen.export
        self.export = export
        self.out: list[Piece] = []
        self.out_bytes = 0
        self.borrowed: list[memoryview] = []
        self.has_file_ranges = False
        self.holdings = Holdings(budget, self._has_room_again)
        self.is_held = False
        self.spent = 0
        self.is_turn_over = False
        self.is_over = False
        self.batch = 0
        self._backend = export.backend
        self._replies = REPLIES[chosen.style]
        self._contexts: Mapping[int, MetaContext] = chosen.contexts
        self._allocation = allocation_context(chosen)
        self._rules = Rules(export, chosen.style, chosen.contexts.keys())
        self._pool = pool
        self._flush = flush
        self._notify = notify
        self._unread_from = unread_from
        self._in_batch = False
        self._is_blocked = False
        self._unsent = 0
        self._most_waiting = ALONE.waiting
        self._tasks: set[asyncio.Task[None]] = set()
        self._search = ExtentSearch()
        self.needed = self._rules.layout.size

    @property
    def in_flight(self) -> int:
        """How many requests are begun and not answered."""
        return len(self._tasks)

    def set_blocked(self, is_blocked: bool, unsent: int = 0) -> None:
        """Say whether the client takes replies; while it does not, little more is begun.

        Args:
            is_blocked: It does not.
            unsent: Bytes of replies that have left `out` and that it has not taken.
        """
        self._is_blocked = is_blocked
        self._unsent = unsent
        self.update_held()

    def update_held(self) -> None:
        """Work out anew whether anything may begin; `holdings` or `out` have changed."""
        is_far_ahead = self.out_bytes >= AHEAD_BYTES or len(self.out) >= FLUSH_PIECES
        self.holdings.unsent = self._unsent + self.out_bytes if self._is_blocked else 0
        self.is_held = (
            self.holdings.recount()
            or (self._is_blocked and is_far_ahead)
            or len(self._tasks) >= self._most_waiting
        )

    def _has_room_again(self) -> None:
        self.update_held()
        self._notify()

    def cancel(self) -> None:
        """Give up on requests in flight; `notify` is still called for each."""
        for task in self._tasks:
            task.cancel()

    def abandon(self) -> None:
        """Nobody waits for answers any more: give up on requests that are not let in.

        Those that are under way are done to their end.
        """
        if self._tasks:
            self._backend.when_all_wait(self.cancel)

    def consume(self, buffer: ReceiveBuffer, allowance: Allowance) -> None:
        """Begin the whole requests in the buffer, until something holds them or the turn ends.

        Args:
            buffer: What is received and not yet begun.
            allowance: What the turn may cost, and how many requests may wait.

        Raises:
            ProtocolError: The client broke the rules; requests before that were begun.
        """
        rules = self._rules
        unpack_from = rules.layout.unpack_from
        header_size = rules.layout.size
        magic = rules.magic
        payload_flag = rules.payload_flag
        alignment_mask = rules.alignment_mask
        size = self._backend.size
        maximum = self.export.maximum_payload
        view = buffer.view
        position = buffer.start
        end = buffer.end
        needed = header_size
        spent = self.spent
        most, self._most_waiting = allowance
        batch = 0
        self._in_batch = True
        try:
            while end - position >= header_size and spent < most and not self.is_held:
                got_magic, flags, command, cookie, offset, length = unpack_from(view, position)
                if got_magic != magic:
                    raise ProtocolError(f"invalid magic (got {got_magic:#x})")
                payload: memoryview | None = None
                if flags & payload_flag if payload_flag else command == WRITE:
                    if length > maximum:
                        # As QEMU: skipping so much is no service to anybody.
                        self._refuse(cookie, offset, errno.EINVAL, too_long(length, maximum))
                        raise ProtocolError(too_long(length, maximum))
                    if end - position < header_size + length:
                        needed = header_size + length
                        break
                    position += header_size
                    payload = view[position : position + length]
                    position += length
                else:
                    position += header_size
                batch += 1
                if command == DISC:
                    self.is_over = True
                    break
                if (  # a plain read breaks no rule
                    command == READ
                    and not flags
                    and length <= maximum
                    and offset + length <= size
                    and not (offset | length) & alignment_mask
                ):
                    spent += length + READ_COST
                    is_answered = self._read_now(cookie, offset, length)
                else:
                    spent += len(payload or b"")
                    spent += STATUS_COST if command == BLOCK_STATUS else CHANGE_COST
                    refusal = rules.refusal(command, flags, offset, length, payload, size)
                    is_answered = refusal is not None
                    if refusal is not None:
                        self._refuse(cookie, offset, *refusal)
                if not is_answered:
                    self._begin(buffer, command, flags, cookie, offset, length, payload)
                if self.out_bytes >= FLUSH_BYTES or len(self.out) >= FLUSH_PIECES:
                    self._flush()
                    if self._is_blocked:
                        self.update_held()
        finally:
            self._in_batch = False
            buffer.start = position
            self.needed = needed
            self.batch = batch
            self.spent = spent
            self.is_turn_over = spent >= most

    def _begin(
        self,
        buffer: ReceiveBuffer,
        command: int,
        flags: int,
        cookie: int,
        offset: int,
        length: int,
        payload: memoryview | None,
    ) -> None:
        """Do a request, or begin it if it has to wait."""
        if (  # a coroutine costs as much as a small write
            payload
            and command == WRITE
            and not flags & FUA
            and self._backend.pwrite_now(offset, payload)
        ):
            self.out.append(self._replies.done(cookie, offset))
            return
        operation = self._operation(command, flags, cookie, offset, length, payload)
        try:
            task = start(operation)
        except Exception as error:
            self._refuse_failed(cookie, offset, length, error)
        else:
            if task is not None:
                cost = length if command == READ or payload is not None else 0
                self._track(task, buffer, cookie, offset, length, cost)

    def _operation(
        self,
        command: int,
        flags: int,
        cookie: int,
        offset: int,
        length: int,
        payload: memoryview | None,
    ) -> Coroutine[Any, Any, None]:
        """Choose the coroutine that does a request."""
        if command == READ:
            if (
                self._allocation is None
                or flags & DF
                or self._backend.is_known_data(offset, length)
            ):
                return self._read(cookie, offset, length)
            return self._read_sparse(self._allocation, cookie, offset, length)
        if command == WRITE:
            assert payload is not None
            return self._write(cookie, offset, payload, flags)
        if command == BLOCK_STATUS:
            return self._block_status(cookie, offset, length, flags, payload)
        return self._without_data(command, cookie, offset, length, flags)

    def _track(
        self,
        task: asyncio.Task[None],
        buffer: ReceiveBuffer,
        cookie: int,
        offset: int,
        length: int,
        cost: int,
    ) -> None:
        """Count a request that had to wait, with `cost` bytes of payload, until it ends."""
        self._pool.keep_scratch()
        buffer.pins += 1
        holdings = self.holdings
        holdings.waiting += cost
        self._tasks.add(task)
        self.update_held()

        def ended(task: asyncio.Task[None]) -> None:
            holdings.pinned -= buffer.unpin()
            holdings.waiting -= cost
            self._tasks.discard(task)
            self.update_held()
            if not task.cancelled() and (error := task.exception()) is not None:
                self._refuse_failed(cookie, offset, length, error)
            self._notify()

        task.add_done_callback(ended)

    def _refuse_failed(self, cookie: int, offset: int, length: int, error: BaseException) -> None:
        """Reply to a request whose operation failed.

        Where it failed is told only if that is inside the request, which the specification asks
        for: a write may fail because of the whole cluster that a backup has to copy before it.
        """
        if isinstance(error, NodeError):
            at = error.offset
            is_inside = at is not None and offset <= at < offset + length
            self._refuse(cookie, offset, error.errno, error.message, at if is_inside else None)
            return
        _log.error("request on '%s' failed unexpectedly", self.export.name, exc_info=error)
        self._refuse(cookie, offset, errno.EIO, "internal error")

    def _refuse(
        self, cookie: int, offset: int, number: int, message: str, at: int | None = None
    ) -> None:
        self.out.append(self._replies.error(cookie, offset, nbd_error(number), message, at))

    def _take_buffer(self, length: int) -> memoryview:
        if length >= POOLED_FROM:
            return self._pool.take(length)
        if self._in_batch:
            return self._pool.scratch(length)
        return memoryview(bytearray(length))

    def _read_now(self, cookie: int, offset: int, length: int) -> bool:
        """Answer a read that the page cache can answer; False if it has to be begun as others."""
        if not length:
            return False
        if self._unread_from <= length <= UNREAD_TO and self._send_unread(cookie, offset, length):
            return True
        is_pooled = length >= POOLED_FROM
        buffer = self._pool.take(length) if is_pooled else self._pool.scratch(length)
        if not self._backend.pread_now(offset, buffer, self._allocation is not None):
            if is_pooled:
                self._pool.give_back(buffer)
            return False
        self.out += (self._replies.data(cookie, offset, offset, length, _DONE), buffer)
        self.out_bytes += length
        if is_pooled:
            self.borrowed.append(buffer)
        return True

    def _send_unread(self, cookie: int, offset: int, length: int) -> bool:
        """Let the kernel answer a read out of the page cache; False if it has to be read.

        Only what leaves at once: later the page cache may not have it any more.
        """
        if self._is_blocked:
            return False
        found = self._backend.stored_at(offset, length, self._allocation is not None)
        if found is None:
            return False
        self.out += (self._replies.data(cookie, offset, offset, length, _DONE), found)
        self.out_bytes += length
        self.has_file_ranges = True
        return True

    async def _read(self, cookie: int, offset: int, length: int) -> None:
        if not length:
            self.out.append(self._replies.empty(cookie, offset))
            return
        # A buffer whose read fails or is cancelled is not given back: a worker may still fill it.
        buffer = self._take_buffer(length)
        await self._backend.pread(offset, buffer)
        self.out.append(self._replies.data(cookie, offset, offset, length, _DONE))
        self.out.append(buffer)
        self._count(buffer, length)

    def _count(self, buffer: memoryview, length: int) -> None:
        self.out_bytes += length
        if length >= POOLED_FROM:
            self.borrowed.append(buffer)

    async def _read_sparse(
        self, allocation: MetaContext, cookie: int, offset: int, length: int
    ) -> None:
        """Read, and send holes as such. Replies are put out only when all has been read."""
        if not length:
            self.out.append(self._replies.empty(cookie, offset))
            return
        begun = perf_counter()
        found = await self._search.find(allocation, offset, length, MAX_READ_EXTENTS)
        runs = runs_of(found, length)
        looked_s = perf_counter() - begun
        if len(runs) == 1 and not runs[0].flags:
            await self._read(cookie, offset, length)
            return
        pieces: list[Memory] = []
        buffers: list[memoryview] = []
        start = offset
        for number, (run_length, is_hole) in enumerate(runs, 1):
            done = _DONE if number == len(runs) else 0
            if is_hole:
                self._backend.note_hole(run_length, looked_s)
                pieces.append(self._replies.hole(cookie, offset, start, run_length, done))
            else:
                buffer = self._take_buffer(run_length)
                await self._backend.pread(start, buffer)
                pieces += (self._replies.data(cookie, offset, start, run_length, done), buffer)
                buffers.append(buffer)
            start += run_length
        self.out += pieces
        for buffer in buffers:
            self._count(buffer, len(buffer))

    async def _write(self, cookie: int, offset: int, payload: memoryview, flags: int) -> None:
        if payload:
            await self._backend.pwrite(offset, payload, fua=bool(flags & FUA))
        self.out.append(self._replies.done(cookie, offset))

    async def _without_data(
        self, command: int, cookie: int, offset: int, length: int, flags: int
    ) -> None:
        """Do what moves no data; of an empty range nothing is done, successfully, as in QEMU."""
        backend = self._backend
        fua = bool(flags & FUA)
        if command == FLUSH:
            await backend.flush()
        elif not length:
            pass
        elif command == TRIM:
            await backend.pdiscard(offset, length, fua=fua)
        elif command == CACHE:
            await backend.cache(offset, length)
        else:
            assert command == WRITE_ZEROES
            await backend.pwrite_zeroes(
                offset,
                length,
                fua=fua,
                may_unmap=not flags & NO_HOLE,
                fast_only=bool(flags & FAST_ZERO),
            )
        self.out.append(self._replies.done(cookie, offset))

    async def _block_status(
        self, cookie: int, offset: int, length: int, flags: int, payload: memoryview | None
    ) -> None:
        contexts = self._contexts
        if payload is not None:
            length, ids = unpack_status_payload(payload)
            contexts = {number: contexts[number] for number in ids}
        limit = 1 if flags & REQ_ONE else MAX_EXTENTS
        found = [
            (number, await self._search.find(context, offset, length, limit))
            for number, context in contexts.items()
        ]
        last = found[-1][0]
        for number, extents in found:
            done = _DONE if number == last else 0
            self.out.append(self._replies.status(cookie, offset, number, extents, done))
            self.out_bytes += len(self.out[-1])
