# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""One client on its socket: moves bytes between the transport and negotiation or session.

receiving   into one buffer, used over and over; payloads are used where they lie. It grows
            for a large write and shrinks again; one that a waiting request still uses is
            left to it, and another takes its place
sending     all replies of a batch in one `writev`, straight to the socket; only what the
            socket does not take goes through the transport, which waits until it does.
            Until then nothing else is sent, begun or read: that bounds memory
ending      requests in flight are always finished: a write is never torn by a disconnect.
            Those that a disk holds back are not in flight: they go with their client
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from typing import Final, cast

from nbdjobs.errors import ProtocolError
from nbdjobs.protocol.buffers import (
    POOLED_FROM,
    BufferPool,
    CallLater,
    ReceiveBuffer,
    Timer,
    receive_capacity,
)
from nbdjobs.protocol.export import Export
from nbdjobs.protocol.memory import Budget
from nbdjobs.protocol.negotiation import Chosen, Ended, Negotiation
from nbdjobs.protocol.polling import TURN_NS, Polling
from nbdjobs.protocol.sending import Memory, Piece, send, send_with_files, unread_from
from nbdjobs.protocol.session import NEVER, Session
from nbdjobs.protocol.turns import Turns

BASE_CAPACITY: Final = 256 * 1024
"""Receive buffer of a client without large writes; only pages it has used take memory."""

SHRINK_AFTER_S: Final = 2.0
"""A grown receive buffer is given up when no large write came for so long."""

_MINIMUM_ROOM: Final = 32 * 1024

_log = logging.getLogger(__name__)


class Connection(asyncio.BufferedProtocol):
    """A client, from being accepted to its end.

    Args:
        exports: What is on offer, by name.
        has_room: Whether one more client may attach to an export now.
        pool: Where large read buffers come from.
        budget: What all clients may hold.
        polling: When to look for requests instead of sleeping.
        turns: How much is done for this client before it is everybody's turn.
        handshake_limit_s: Seconds until negotiation must be over; 0 for no limit.
        call_later: Timers.
        on_end: Called once, when the client is gone and its last request has ended.
        use_writev: Send straight to the socket; must be False where the transport encrypts.
    """

    def __init__(
        self,
        exports: Mapping[str, Export],
        *,
        has_room: Callable[[Export], bool],
        pool: BufferPool,
        budget: Budget,
        polling: Polling,
        turns: Turns,
        handshake_limit_s: float,
        call_later: CallLater,
        on_end: Callable[[Connection], None],
        use_writev: bool = True,
    ):
        self._pool = pool
        self._budget = budget
        self._polling = polling
        self._turns = turns
        self._handshake_limit_s = handshake_limit_s
        self._call_later = call_later
        self._on_end = on_end
        self._use_writev = use_writev
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._descriptor = -1
        self._unread_from = NEVER
        self._negotiation: Negotiation | None = Negotiation(exports, has_room)
        self._session: Session | None = None
        self._incoming = ReceiveBuffer(pool, BASE_CAPACITY)
        self._receive_end = BASE_CAPACITY
        self._unsent: list[memoryview] = []
        self._is_blocked = False
        self._is_reading = True
        self._goes_on_reading = False
        self._is_at_eof = False
        self._is_ending = False
        self._pump_is_due = False
        self._handshake_timer: Timer | None = None
        self._shrink_timer: Timer | None = None
        self._grew_lately = False

    @property
    def export(self) -> Export | None:
        """What the client is attached to, or None while it negotiates."""
        return None if self._session is None else self._session.export

    def disconnect(self) -> None:
        """Cut the client off now; its requests in flight are still carried out."""
        self._is_ending = True
        if self._transport is not None:
            self._descriptor = -1
            self._transport.abort()

    def finish(self) -> None:
        """Take no further request; end when those in flight are answered."""
        self._is_ending = True
        self._pump()

    def cancel_requests(self) -> None:
        """Give up on requests in flight, when they take too long at the end."""
        if self._session is not None:
            self._session.cancel()

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet the client."""
        # A cast, not a check: uvloop's transports do not derive from asyncio's.
        self._transport = transport = cast(asyncio.Transport, transport)
        # With a limit of 0, `_is_blocked` is exactly "the transport holds bytes".
        transport.set_write_buffer_limits(high=0)
        if self._use_writev:
            sock = transport.get_extra_info("socket")
            self._descriptor = sock.fileno()
            self._unread_from = unread_from(sock.family)
        if self._handshake_limit_s:
            expire = self._handshake_expired
            self._handshake_timer = self._call_later(self._handshake_limit_s, expire)
        assert self._negotiation is not None
        transport.write(self._negotiation.greeting())

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where to put received bytes; there is always room."""
        incoming = self._incoming
        return incoming.view[incoming.end : self._receive_end]

    def buffer_updated(self, nbytes: int) -> None:
        """Act on received bytes, and perhaps look for more."""
        polling = self._polling
        polling.woken(self)
        incoming = self._incoming
        incoming.end += nbytes
        session = self._session
        if session is None:
            self._pump()
        else:
            if not self._goes_on_reading:
                session.spent = 0
            # Of a client that fills the buffer, uvloop reads on without a turn for anybody else.
            self._goes_on_reading = incoming.end == self._receive_end
            self._pump()
            self._turns.batch = session.batch
        if polling.budget_ns:
            self._look_for_more(polling)
        polling.idle()

    def _look_for_more(self, polling: Polling) -> None:
        """Serve a client that sends one request at a time without sleeping in between."""
        now = begun = polling.clock_ns()
        while self._waits_for_one_request() and now - begun < TURN_NS:
            deadline = now + polling.budget_ns
            received = 0
            while not received and now < deadline:
                received = self._receive_now()
                now = polling.clock_ns()
            if received <= 0:
                return
            self._incoming.end += received
            self._pump()

    def _waits_for_one_request(self) -> bool:
        session = self._session
        return (
            session is not None
            and session.batch == 1
            and not session.in_flight
            and not self._is_ending
            and not session.is_over
            and not session.is_turn_over
            and not self._is_blocked
            and self._descriptor >= 0
        )

    def _receive_now(self) -> int:
        """Receive what there is: a number of bytes, 0 for none yet, -1 for the end."""
        try:
            return os.readv(self._descriptor, [self.get_buffer(-1)]) or -1
        except BlockingIOError:
            return 0
        except OSError:
            return -1  # the transport will find the same

    def eof_received(self) -> bool:
        """Finish what the client has asked for, then close."""
        self._is_at_eof = True
        self._pump()
        return True

    def pause_writing(self) -> None:
        """Stop: the client does not take its replies."""
        self._is_blocked = True
        if self._session is not None:
            assert self._transport is not None
            self._session.set_blocked(True, self._transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Go on: everything is sent."""
        self._is_blocked = False
        self._give_back(self._unsent)
        if self._session is not None:
            self._session.set_blocked(False)
        self._pump_soon()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let requests in flight end, without anybody to tell."""
        self._transport = None
        self._descriptor = -1
        self._is_ending = True
        self._turns.left(self)
        if self._session is not None:
            self._session.set_blocked(False)
            self._session.abandon()
        for timer in (self._handshake_timer, self._shrink_timer):
            if timer is not None:
                timer.cancel()
        self._pump()

    # Receiving

    def _pump_soon(self) -> None:
        """Send what suspended requests answer in one turn of the loop together."""
        if not self._pump_is_due:
            self._pump_is_due = True
            self._loop.call_soon(self._begin_turn)

    def _begin_turn(self) -> None:
        """Go on where something had to wait."""
        self._pump_is_due = False
        if self._session is not None:
            self._session.spent = 0
        self._pump()

    def _pump(self) -> None:
        """Do all that can be done in this turn: parse, begin, send, end."""
        try:
            if self._negotiation is not None:
                self._negotiate(self._negotiation)
            session = self._session
            if session is not None and not self._is_ending and not session.is_over:
                session.consume(self._incoming, self._turns.allowance(self))
                if session.is_turn_over:
                    self._pump_soon()
        except ProtocolError as error:
            _log.info("client disconnected: %s", error)
            self._is_ending = True
        self._flush()
        self._pool.end_batch()
        if self._is_at_eof and not self._is_held():
            self._is_ending = True  # no whole request is left
        if self._is_at_eof and self._session is not None:
            self._session.abandon()
        session = self._session
        if self._is_ending or (session is not None and session.is_over):
            self._end_if_idle()
        else:
            self._prepare_to_receive()
            self._set_reading(not self._is_held())

    def _is_held(self) -> bool:
        session = self._session
        return self._is_blocked if session is None else session.is_held or session.is_turn_over

    def _set_reading(self, is_reading: bool) -> None:
        if is_reading == self._is_reading or self._transport is None:
            return
        self._is_reading = is_reading
        if is_reading:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _negotiate(self, negotiation: Negotiation) -> None:
        incoming = self._incoming
        negotiation.receive(incoming.view[incoming.start : incoming.end])
        incoming.start = incoming.end = 0
        while not self._is_blocked and not self._is_ending and self._transport is not None:
            reply = negotiation.advance()
            if reply is None:
                break
            if reply:
                self._transport.write(reply)
        outcome = negotiation.outcome
        if isinstance(outcome, Ended):
            _log.info("negotiation ended: %s", outcome.reason or "the client left")
            self._negotiation = None
            self._is_ending = True
        elif isinstance(outcome, Chosen):
            self._negotiation = None
            self._begin_session(outcome, negotiation.unconsumed)

    def _begin_session(self, chosen: Chosen, unconsumed: bytes) -> None:
        if self._handshake_timer is not None:
            self._handshake_timer.cancel()
        session = Session(
            chosen,
            pool=self._pool,
            budget=self._budget,
            flush=self._flush,
            notify=self._pump_soon,
            unread_from=self._unread_from,
        )
        session.set_blocked(self._is_blocked)
        self._session = session
        if len(unconsumed) > self._incoming.capacity:
            self._receive_into(receive_capacity(len(unconsumed), BASE_CAPACITY), unconsumed)
        else:
            self._incoming.append(unconsumed)

    def _handshake_expired(self) -> None:
        _log.info("client disconnected: it did not finish negotiation in time")
        self.disconnect()

    def _prepare_to_receive(self) -> None:
        """Choose where the next bytes go.

        A large payload is received to its end and no further: then nothing of the next request
        has to be moved, and the same warm memory serves one after the other.
        """
        needed = 1 if self._session is None else self._session.needed
        self._make_room(needed)
        incoming = self._incoming
        is_large = self._session is not None and needed >= POOLED_FROM
        self._receive_end = incoming.start + needed if is_large else incoming.capacity

    def _make_room(self, needed: int) -> None:
        """See to it that the rest of a request of `needed` bytes fits behind what is there."""
        incoming = self._incoming
        start = incoming.start
        end = incoming.end
        if start == end and not incoming.pins:
            incoming.start = incoming.end = 0
            return
        room = incoming.capacity - end
        has_large_room = needed >= POOLED_FROM or room >= _MINIMUM_ROOM
        if start + needed <= incoming.capacity and has_large_room:
            return
        if room and start + needed <= incoming.capacity and end - start >= needed:
            return  # held, not short: what is there is parsed first
        if not incoming.pins and needed <= incoming.capacity:
            incoming.compact()
        if incoming.pins or needed > incoming.capacity or incoming.end == incoming.capacity:
            self._replace_incoming(max(needed, incoming.end - incoming.start + _MINIMUM_ROOM))

    def _replace_incoming(self, needed: int) -> None:
        """Go on in another buffer, which takes over what is not parsed."""
        old = self._incoming
        capacity = receive_capacity(needed, BASE_CAPACITY)
        if capacity > BASE_CAPACITY:
            self._grew()
        self._receive_into(capacity, old.view[old.start : old.end])

    def _receive_into(self, capacity: int, data: bytes | memoryview = b"") -> None:
        """Go on in another buffer; the one before is left to the requests that still use it."""
        old, self._incoming = self._incoming, ReceiveBuffer(self._pool, capacity)
        self._incoming.append(data)
        still_used = old.retire()
        if self._session is not None:
            self._session.holdings.pinned += still_used
            self._session.holdings.receiving = capacity - BASE_CAPACITY
            self._session.update_held()

    def _grew(self) -> None:
        self._grew_lately = True
        if self._shrink_timer is None:
            self._shrink_timer = self._call_later(SHRINK_AFTER_S, self._shrink)

    def _shrink(self) -> None:
        """Give up a grown buffer when it is not needed any more."""
        self._shrink_timer = None
        incoming = self._incoming
        if incoming.capacity == BASE_CAPACITY or self._transport is None:
            return
        if self._grew_lately or incoming.start != incoming.end:
            self._grew()
            self._grew_lately = False
        else:
            self._receive_into(BASE_CAPACITY)
            self._receive_end = BASE_CAPACITY

    # Sending

    def _flush(self) -> None:
        """Send all replies there are, or leave them when the client takes none."""
        session = self._session
        if session is None or not session.out:
            return
        transport = self._transport
        if transport is None or transport.is_closing():
            session.out = []
            session.out_bytes = 0
            self._give_back(session.borrowed)
            return
        if self._is_blocked:
            self._pool.keep_scratch()
            return
        out = session.out
        session.out = []
        session.out_bytes = 0
        rest = self._send(out, session)
        if rest:
            self._unsent += session.borrowed
            session.borrowed.clear()
            self._pool.keep_scratch()
            transport.writelines(rest)
            if not self._is_blocked:
                self._give_back(self._unsent)
        elif session.borrowed:
            self._give_back(session.borrowed)

    def _send(self, out: list[Piece], session: Session) -> list[Memory]:
        """Send without waiting; return what the socket did not take."""
        try:
            if session.has_file_ranges:
                session.has_file_ranges = False
                return send_with_files(self._descriptor, out)
            memory = cast(list[Memory], out)
            return send(self._descriptor, memory) if self._descriptor >= 0 else memory
        except OSError as error:
            _log.info("client disconnected: %s", error)
            self.disconnect()
            return []

    def _give_back(self, buffers: list[memoryview]) -> None:
        for buffer in buffers:
            self._pool.give_back(buffer)
        buffers.clear()

    # Ending

    def _end_if_idle(self) -> None:
        """Close when everything is answered and sent; report the end when all is closed."""
        self._set_reading(False)
        session = self._session
        if session is not None and (session.in_flight or (session.out and self._transport)):
            return
        if self._transport is not None:
            self._descriptor = -1
            self._transport.close()
            return
        self._incoming.retire()
        if session is not None:
            session.holdings.close()
        on_end, self._on_end = self._on_end, _ignore
        on_end(self)


def _ignore(connection: Connection) -> None:
    """Take the place of a callback that was called."""
