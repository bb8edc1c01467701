# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Replies of the transmission phase as bytes, one class per header style.

A session picks its style once, so no request asks which headers were negotiated. Methods
return headers only where data follows; the data itself is sent from where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from struct import Struct
from typing import Final, Protocol

from nbdjobs.protocol.constants import (
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    HeaderStyle,
    NbdError,
    ReplyFlag,
    ReplyType,
)
from nbdjobs.protocol.export import Extent
from nbdjobs.protocol.messages import truncated

SIMPLE_HEADER: Final = Struct(">IIQ")
STRUCTURED_HEADER: Final = Struct(">IHHQI")
EXTENDED_HEADER: Final = Struct(">IHHQQQ")

_pack_simple = SIMPLE_HEADER.pack
_pack_structured = STRUCTURED_HEADER.pack
_pack_extended = EXTENDED_HEADER.pack
_pack_structured_data = Struct(">IHHQIQ").pack
_pack_extended_data = Struct(">IHHQQQQ").pack
_pack_hole = Struct(">QI").pack
_pack_error = Struct(">IH").pack
_pack_offset = Struct(">Q").pack

_DONE: Final = int(ReplyFlag.DONE)
_NONE: Final = int(ReplyType.NONE)
_OFFSET_DATA: Final = int(ReplyType.OFFSET_DATA)


class Replies(Protocol):
    """How one header style says things.

    `cookie` and `offset` are those of the request, `start` is where a chunk lies on the
    export, and `flags` is `ReplyFlag.DONE` in the last chunk and 0 before it.
    """

    def done(self, cookie: int, offset: int) -> bytes:
        """Say that a request without data succeeded."""
        ...

    def empty(self, cookie: int, offset: int) -> bytes:
        """Say that a read of no bytes succeeded."""
        ...

    def data(self, cookie: int, offset: int, start: int, length: int, flags: int) -> bytes:
        """Announce `length` bytes of data, which follow."""
        ...

    def hole(self, cookie: int, offset: int, start: int, length: int, flags: int) -> bytes:
        """Say that a range reads as zeroes."""
        ...

    def status(
        self, cookie: int, offset: int, context_id: int, extents: Sequence[Extent], flags: int
    ) -> bytes:
        """List the extents of one metadata context."""
        ...

    def error(
        self, cookie: int, offset: int, error: NbdError, message: str, at: int | None
    ) -> bytes:
        """Say that a request failed, and where if that is known."""
        ...


class SimpleReplies:
    """Replies without structure: no holes, no status, no error texts."""

    def done(self, cookie: int, offset: int) -> bytes:
        """Say that a request without data succeeded."""
        return _pack_simple(SIMPLE_REPLY_MAGIC, 0, cookie)

    empty = done

    def data(self, cookie: int, offset: int, start: int, length: int, flags: int) -> bytes:
        """Announce the data, which follows."""
        return _pack_simple(SIMPLE_REPLY_MAGIC, 0, cookie)

    def hole(self, cookie: int, offset: int, start: int, length: int, flags: int) -> bytes:
        """Never called: a session without structured replies reads holes as data."""
        raise AssertionError("simple replies cannot describe holes")

    def status(
        self, cookie: int, offset: int, context_id: int, extents: Sequence[Extent], flags: int
    ) -> bytes:
        """Never called: contexts cannot be negotiated without structured replies."""
        raise AssertionError("simple replies cannot describe extents")

    def error(
        self, cookie: int, offset: int, error: NbdError, message: str, at: int | None
    ) -> bytes:
        """Send the error value alone."""
        return _pack_simple(SIMPLE_REPLY_MAGIC, error, cookie)


class StructuredReplies:
    """Replies in chunks with 32-bit lengths; success without data is a simple reply, as in QEMU."""

    def done(self, cookie: int, offset: int) -> bytes:
        """Say that a request without data succeeded."""
        return _pack_simple(SIMPLE_REPLY_MAGIC, 0, cookie)

    def empty(self, cookie: int, offset: int) -> bytes:
        """Say that a read of no bytes succeeded; a read must not get a simple reply."""
        return _pack_structured(STRUCTURED_REPLY_MAGIC, _DONE, _NONE, cookie, 0)

    def data(self, cookie: int, offset: int, start: int, length: int, flags: int) -> bytes:
        """Announce `length` bytes of data, which follow."""
        return _pack_structured_data(
            STRUCTURED_REPLY_MAGIC, flags, _OFFSET_DATA, cookie, length + 8, start
        )

    def hole(self, cookie: int, offset: int, start: int, length: int, flags: int) -> bytes:
        """Say that a range reads as zeroes."""
        return self._chunk(cookie, flags, ReplyType.OFFSET_HOLE, _pack_hole(start, length))

    def status(
        self, cookie: int, offset: int, context_id: int, extents: Sequence[Extent], flags: int
    ) -> bytes:
        """List the extents of one metadata context in 32 bits each."""
        layout = Struct(f">I{2 * len(extents)}I")
        payload = layout.pack(context_id, *chain.from_iterable(extents))
        return self._chunk(cookie, flags, ReplyType.BLOCK_STATUS, payload)

    def error(
        self, cookie: int, offset: int, error: NbdError, message: str, at: int | None
    ) -> bytes:
        """Say that a request failed, and where if that is known."""
        kind, payload = _error_payload(error, message, at)
        return self._chunk(cookie, _DONE, kind, payload)

    def _chunk(self, cookie: int, flags: int, kind: ReplyType, payload: bytes) -> bytes:
        header = _pack_structured(STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(payload))
        return header + payload


class ExtendedReplies:
    """Replies in chunks with 64-bit lengths, each repeating the offset of the request."""

    def done(self, cookie: int, offset: int) -> bytes:
        """Say that a request without data succeeded."""
        return _pack_extended(EXTENDED_REPLY_MAGIC, _DONE, _NONE, cookie, offset, 0)

    empty = done

    def data(self, cookie: int, offset: int, start: int, length: int, flags: int) -> bytes:
        """Announce `length` bytes of data, which follow."""
        return _pack_extended_data(
            EXTENDED_REPLY_MAGIC, flags, _OFFSET_DATA, cookie, offset, length + 8, start
        )

    def hole(self, cookie: int, offset: int, start: int, length: int, flags: int) -> bytes:
        """Say that a range reads as zeroes."""
        payload = _pack_hole(start, length)
        return self._chunk(cookie, offset, flags, ReplyType.OFFSET_HOLE, payload)

    def status(
        self, cookie: int, offset: int, context_id: int, extents: Sequence[Extent], flags: int
    ) -> bytes:
        """List the extents of one metadata context in 64 bits each."""
        layout = Struct(f">II{2 * len(extents)}Q")
        payload = layout.pack(context_id, len(extents), *chain.from_iterable(extents))
        return self._chunk(cookie, offset, flags, ReplyType.BLOCK_STATUS_EXT, payload)

    def error(
        self, cookie: int, offset: int, error: NbdError, message: str, at: int | None
    ) -> bytes:
        """Say that a request failed, and where if that is known."""
        kind, payload = _error_payload(error, message, at)
        return self._chunk(cookie, offset, _DONE, kind, payload)

    def _chunk(
        self, cookie: int, offset: int, flags: int, kind: ReplyType, payload: bytes
    ) -> bytes:
        header = _pack_extended(EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, len(payload))
        return header + payload


REPLIES: Final[dict[HeaderStyle, Replies]] = {
    HeaderStyle.SIMPLE: SimpleReplies(),
    HeaderStyle.STRUCTURED: StructuredReplies(),
    HeaderStyle.EXTENDED: ExtendedReplies(),
}


def _error_payload(error: NbdError, message: str, at: int | None) -> tuple[ReplyType, bytes]:
    text = truncated(message)
    payload = _pack_error(error, len(text)) + text
    if at is None:
        return ReplyType.ERROR, payload
    return ReplyType.ERROR_OFFSET, payload + _pack_offset(at)
