# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The transmission phase of one client: parse requests, check them, do them, word the replies.

    consume()   the hot loop: every whole request in the receive buffer is checked and begun
    _refusal()  the one place where requests are checked; behind it, code trusts them
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
from collections.abc import Callable, Coroutine, Mapping, Sequence
from struct import Struct
from typing import Any, Final

from nbdjobs.eager import start
from nbdjobs.errors import NodeError, ProtocolError
from nbdjobs.protocol.buffers import POOLED_FROM, BufferPool, ReceiveBuffer
from nbdjobs.protocol.constants import (
    BASE_ALLOCATION,
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    AllocationState,
    Command,
    CommandFlag,
    HeaderStyle,
    ReplyFlag,
)
from nbdjobs.protocol.export import Extent, MetaContext
from nbdjobs.protocol.messages import nbd_error, unpack_status_payload
from nbdjobs.protocol.negotiation import Chosen
from nbdjobs.protocol.replies import REPLIES

MAX_REQUESTS: Final = 128
"""Suspended requests of one client; eight times what QEMU takes."""

MAX_BYTES: Final = 64 * 1024 * 1024
"""Payload bytes of suspended requests of one client: two of the largest."""

FLUSH_BYTES: Final = 256 * 1024
"""Bytes of replies that leave without waiting for the end of the batch."""

AHEAD_BYTES: Final = 2 * 1024 * 1024
"""Bytes of replies made ready while the client still takes earlier ones, so that it never has to
wait for the next; then nothing new is begun."""

FLUSH_PIECES: Final = 1000
"""Pieces of replies that leave at once: below the kernel's limit of 1024 (IOV_MAX)."""

MAX_EXTENTS: Final = 16 * 1024
"""Extents in one reply; the specification allows 2**20, the client asks again for the rest."""

MAX_READ_EXTENTS: Final = 128
"""Extents looked up for one sparse read; behind them a read is all data."""

COMPACT_REQUEST: Final = Struct(">IHHQQI")
EXTENDED_REQUEST: Final = Struct(">IHHQQQ")

# Plain numbers: the hot loop compares them with what `struct` returns.
_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
_DISC: Final = int(Command.DISC)
_FLUSH: Final = int(Command.FLUSH)
_TRIM: Final = int(Command.TRIM)
_CACHE: Final = int(Command.CACHE)
_WRITE_ZEROES: Final = int(Command.WRITE_ZEROES)
_BLOCK_STATUS: Final = int(Command.BLOCK_STATUS)
_FUA: Final = int(CommandFlag.FUA)
_NO_HOLE: Final = int(CommandFlag.NO_HOLE)
_DF: Final = int(CommandFlag.DF)
_REQ_ONE: Final = int(CommandFlag.REQ_ONE)
_FAST_ZERO: Final = int(CommandFlag.FAST_ZERO)
_PAYLOAD_LEN: Final = int(CommandFlag.PAYLOAD_LEN)
_DONE: Final = int(ReplyFlag.DONE)
_ZERO: Final = int(AllocationState.ZERO)

_CHANGING: Final = frozenset({_WRITE, _TRIM, _WRITE_ZEROES})
_MOVING_DATA: Final = frozenset({_READ, _WRITE, _CACHE})

# FUA is valid with every command (specification, "Command flags").
_FLAGS: Final[dict[int, int]] = {
    _READ: _FUA | _DF,
    _WRITE: _FUA,
    _FLUSH: _FUA,
    _TRIM: _FUA,
    _CACHE: _FUA,
    _WRITE_ZEROES: _FUA | _NO_HOLE | _FAST_ZERO,
    _BLOCK_STATUS: _FUA | _REQ_ONE,
}

_log = logging.getLogger(__name__)

Piece = bytes | memoryview


class Session:
    """The requests of one client on its export.

    Args:
        chosen: What the negotiation led to.
        pool: Where large read buffers come from.
        flush: Sends `out`; called in the middle of a large batch.
        notify: Called when a request that had to wait has put its reply into `out`, or has
            made room for further ones.

    Attributes:
        out: Replies to send, in order.
        out_bytes: Payload bytes in `out`.
        borrowed: Buffers of the pool in `out`, to be given back when sent.
        is_held: Whether nothing new may begin now.
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
        flush: Callable[[], None],
        notify: Callable[[], None],
    ):
        export = chosen.export
        self.export = export
        self.out: list[Piece] = []
        self.out_bytes = 0
        self.borrowed: list[memoryview] = []
        self.is_held = False
        self.is_over = False
        self.batch = 0
        self.needed = 0
        self._backend = export.backend
        self._style = chosen.style
        self._replies = REPLIES[chosen.style]
        self._contexts: Mapping[int, MetaContext] = chosen.contexts
        self._allocation = _allocation_context(chosen)
        self._alignment_mask = export.minimum_block_size - 1
        self._pool = pool
        self._flush = flush
        self._notify = notify
        self._in_batch = False
        self._is_blocked = False
        self._bytes_in_flight = 0
        self._tasks: set[asyncio.Task[None]] = set()
        is_extended = chosen.style is HeaderStyle.EXTENDED
        self._request = EXTENDED_REQUEST if is_extended else COMPACT_REQUEST
        self._magic = EXTENDED_REQUEST_MAGIC if is_extended else REQUEST_MAGIC
        self.needed = self._request.size

    @property
    def in_flight(self) -> int:
        """How many requests are begun and not answered."""
        return len(self._tasks)

    def set_blocked(self, is_blocked: bool) -> None:
        """Say whether the client takes replies; while it does not, little more is begun."""
        self._is_blocked = is_blocked
        self._update_held()

    def _update_held(self) -> None:
        is_far_ahead = self.out_bytes >= AHEAD_BYTES or len(self.out) >= FLUSH_PIECES
        self.is_held = (
            (self._is_blocked and is_far_ahead)
            or len(self._tasks) >= MAX_REQUESTS
            or self._bytes_in_flight >= MAX_BYTES
        )

    def cancel(self) -> None:
        """Give up on requests in flight; `notify` is still called for each."""
        for task in self._tasks:
            task.cancel()

    def consume(self, buffer: ReceiveBuffer) -> None:
        """Begin every whole request in the buffer, as long as nothing holds them.

        Raises:
            ProtocolError: The client broke the rules; requests before that were begun.
        """
        unpack_from = self._request.unpack_from
        header_size = self._request.size
        magic = self._magic
        is_extended = self._style is HeaderStyle.EXTENDED
        size = self._backend.size
        maximum = self.export.maximum_payload
        alignment_mask = self._alignment_mask
        view = buffer.view
        position = buffer.start
        end = buffer.end
        needed = header_size
        batch = 0
        self._in_batch = True
        try:
            while end - position >= header_size and not self.is_held:
                got_magic, flags, command, cookie, offset, length = unpack_from(view, position)
                if got_magic != magic:
                    raise ProtocolError(f"invalid magic (got {got_magic:#x})")
                payload: memoryview | None = None
                if flags & _PAYLOAD_LEN if is_extended else command == _WRITE:
                    if length > maximum:
                        # As QEMU: skipping so much is no service to anybody.
                        self._refuse(cookie, offset, errno.EINVAL, _too_long(length, maximum))
                        raise ProtocolError(_too_long(length, maximum))
                    if end - position < header_size + length:
                        needed = header_size + length
                        break
                    position += header_size
                    payload = view[position : position + length]
                    position += length
                else:
                    position += header_size
                batch += 1
                if command == _DISC:
                    self.is_over = True
                    break
                is_plain_read = (
                    command == _READ
                    and not flags
                    and length <= maximum
                    and offset + length <= size
                    and not (offset | length) & alignment_mask
                )
                refusal = (
                    None
                    if is_plain_read
                    else self._refusal(command, flags, offset, length, payload, size)
                )
                if is_plain_read and self._read_now(cookie, offset, length):
                    pass
                elif refusal is not None:
                    self._refuse(cookie, offset, *refusal)
                else:
                    operation = self._operation(command, flags, cookie, offset, length, payload)
                    try:
                        task = start(operation)
                    except Exception as error:
                        self._refuse_failed(cookie, offset, error)
                    else:
                        if task is not None:
                            cost = length if command == _READ or payload is not None else 0
                            self._track(task, buffer, cookie, offset, cost)
                if self.out_bytes >= FLUSH_BYTES or len(self.out) >= FLUSH_PIECES:
                    self._flush()
                    if self._is_blocked:
                        self._update_held()
        finally:
            self._in_batch = False
            buffer.start = position
            self.needed = needed
            self.batch = batch

    def _refusal(
        self,
        command: int,
        flags: int,
        offset: int,
        length: int,
        payload: memoryview | None,
        size: int,
    ) -> tuple[int, str] | None:
        """Check a request: None, or the errno and the sentence it is refused with.

        Source: specification, "Error values"; the texts are QEMU's.
        """
        allowed = _FLAGS.get(command)
        if allowed is None:
            return errno.EINVAL, f"invalid request type ({command}) received"
        if self._style is HeaderStyle.EXTENDED:
            if (payload is not None) != (command == _WRITE):
                return self._payload_refusal(command, flags, offset, payload, size)
            flags &= ~_PAYLOAD_LEN
        if flags & ~allowed or (flags & _DF and self._style is HeaderStyle.SIMPLE):
            name = Command(command).name.lower().replace("_", " ")
            return errno.EINVAL, f"unsupported flags for command {name} (got {flags:#x})"
        if command == _FLUSH:
            return None
        if length > self.export.maximum_payload and command in _MOVING_DATA:
            return errno.EINVAL, _too_long(length, self.export.maximum_payload)
        if command in _CHANGING and not self.export.is_writable:
            return errno.EPERM, "Export is read-only"
        if command == _BLOCK_STATUS:
            return self._status_refusal(offset, length, size)
        return self._range_refusal(command, offset, length, size)

    def _range_refusal(
        self, command: int, offset: int, length: int, size: int
    ) -> tuple[int, str] | None:
        if offset + length > size:
            number = errno.ENOSPC if command in (_WRITE, _WRITE_ZEROES) else errno.EINVAL
            text = f"operation past EOF; From: {offset}, Len: {length}, Size: {size}"
            return number, text
        if (offset | length) & self._alignment_mask:
            unit = self.export.minimum_block_size
            text = f"unaligned request; From: {offset}, Len: {length}, Alignment: {unit}"
            return errno.EINVAL, text
        return None

    def _status_refusal(self, offset: int, length: int, size: int) -> tuple[int, str] | None:
        if not self._contexts:
            return errno.EINVAL, "CMD_BLOCK_STATUS not negotiated"
        if not length:
            return errno.EINVAL, "need non-zero length"
        return self._range_refusal(_BLOCK_STATUS, offset, length, size)

    def _payload_refusal(
        self, command: int, flags: int, offset: int, payload: memoryview | None, size: int
    ) -> tuple[int, str] | None:
        """Check a request that has a payload and should not, or the reverse."""
        name = Command(command).name.lower().replace("_", " ")
        if payload is None:
            return errno.EINVAL, f"command {name} needs a payload"
        if command != _BLOCK_STATUS:
            return errno.EINVAL, f"command {name} takes no payload"
        if flags & ~(_FUA | _REQ_ONE | _PAYLOAD_LEN):
            return errno.EINVAL, f"unsupported flags for command {name} (got {flags:#x})"
        try:
            length, ids = unpack_status_payload(payload)
        except ProtocolError as error:
            return errno.EINVAL, str(error)
        if len(set(ids)) != len(ids) or not self._contexts.keys() >= set(ids):
            return errno.EINVAL, "unknown or repeated metadata context id"
        return self._status_refusal(offset, length, size)

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
        if command == _READ:
            if (
                self._allocation is None
                or flags & _DF
                or self._backend.is_known_data(offset, length)
            ):
                return self._read(cookie, offset, length)
            return self._read_sparse(self._allocation, cookie, offset, length)
        if command == _WRITE:
            assert payload is not None
            return self._write(cookie, offset, payload, flags)
        if command == _BLOCK_STATUS:
            return self._block_status(cookie, offset, length, flags, payload)
        return self._without_data(command, cookie, offset, length, flags)

    def _track(
        self,
        task: asyncio.Task[None],
        buffer: ReceiveBuffer,
        cookie: int,
        offset: int,
        cost: int,
    ) -> None:
        """Count a request that had to wait, with `cost` bytes of payload, until it ends."""
        self._pool.keep_scratch()
        buffer.pins += 1
        self._bytes_in_flight += cost
        self._tasks.add(task)
        self._update_held()

        def ended(task: asyncio.Task[None]) -> None:
            buffer.unpin()
            self._bytes_in_flight -= cost
            self._tasks.discard(task)
            self._update_held()
            if not task.cancelled() and (error := task.exception()) is not None:
                self._refuse_failed(cookie, offset, error)
            self._notify()

        task.add_done_callback(ended)

    def _refuse_failed(self, cookie: int, offset: int, error: BaseException) -> None:
        """Reply to a request whose operation failed."""
        if isinstance(error, NodeError):
            self._refuse(cookie, offset, error.errno, error.message, error.offset)
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
        runs = _runs(await allocation.extents(offset, length, MAX_READ_EXTENTS), length)
        if len(runs) == 1 and not runs[0].flags:
            await self._read(cookie, offset, length)
            return
        pieces: list[Piece] = []
        buffers: list[memoryview] = []
        start = offset
        for number, (run_length, is_hole) in enumerate(runs, 1):
            done = _DONE if number == len(runs) else 0
            if is_hole:
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
            await self._backend.pwrite(offset, payload, fua=bool(flags & _FUA))
        self.out.append(self._replies.done(cookie, offset))

    async def _without_data(
        self, command: int, cookie: int, offset: int, length: int, flags: int
    ) -> None:
        """Do what moves no data; of an empty range nothing is done, successfully, as in QEMU."""
        backend = self._backend
        fua = bool(flags & _FUA)
        if command == _FLUSH:
            await backend.flush()
        elif not length:
            pass
        elif command == _TRIM:
            await backend.pdiscard(offset, length, fua=fua)
        elif command == _CACHE:
            await backend.cache(offset, length)
        else:
            assert command == _WRITE_ZEROES
            await backend.pwrite_zeroes(
                offset,
                length,
                fua=fua,
                may_unmap=not flags & _NO_HOLE,
                fast_only=bool(flags & _FAST_ZERO),
            )
        self.out.append(self._replies.done(cookie, offset))

    async def _block_status(
        self, cookie: int, offset: int, length: int, flags: int, payload: memoryview | None
    ) -> None:
        contexts = self._contexts
        if payload is not None:
            length, ids = unpack_status_payload(payload)
            contexts = {number: contexts[number] for number in ids}
        limit = 1 if flags & _REQ_ONE else MAX_EXTENTS
        found = [
            (number, await context.extents(offset, length, limit))
            for number, context in contexts.items()
        ]
        last = found[-1][0]
        for number, extents in found:
            done = _DONE if number == last else 0
            self.out.append(self._replies.status(cookie, offset, number, extents, done))
            self.out_bytes += len(self.out[-1])


def _allocation_context(chosen: Chosen) -> MetaContext | None:
    """Find what tells holes from data; simple replies cannot describe holes."""
    if chosen.style is HeaderStyle.SIMPLE:
        return None
    found = (context for context in chosen.export.contexts if context.name == BASE_ALLOCATION)
    return next(found, None)


def _runs(extents: Sequence[Extent], length: int) -> list[Extent]:
    """Merge extents into runs that read as zeroes (flags 1) or may not (0).

    They cover exactly `length` bytes; what the extents leave out counts as data.
    """
    runs: list[Extent] = []
    for run_length, flags in (*extents, (length - sum(extent.length for extent in extents), 0)):
        is_zero = 1 if flags & _ZERO else 0
        if runs and runs[-1].flags == is_zero:
            runs[-1] = Extent(runs[-1].length + run_length, is_zero)
        elif run_length:
            runs.append(Extent(run_length, is_zero))
    return runs


def _too_long(length: int, maximum: int) -> str:
    return f"len ({length}) is larger than max len ({maximum})"
