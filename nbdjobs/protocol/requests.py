# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Requests of the transmission phase: how they look on the wire, and which are refused.

Everything is checked here once, before anything is done; behind it, code trusts a request.
"""

from __future__ import annotations

import errno
from collections.abc import Collection
from struct import Struct
from typing import Final

from nbdjobs.errors import ProtocolError
from nbdjobs.protocol.constants import (
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
    HeaderStyle,
)
from nbdjobs.protocol.export import Export
from nbdjobs.protocol.messages import unpack_status_payload

COMPACT_REQUEST: Final = Struct(">IHHQQI")
EXTENDED_REQUEST: Final = Struct(">IHHQQQ")

# Plain numbers: the hot loop compares them with what `struct` returns.
READ: Final = int(Command.READ)
WRITE: Final = int(Command.WRITE)
DISC: Final = int(Command.DISC)
FLUSH: Final = int(Command.FLUSH)
TRIM: Final = int(Command.TRIM)
CACHE: Final = int(Command.CACHE)
WRITE_ZEROES: Final = int(Command.WRITE_ZEROES)
BLOCK_STATUS: Final = int(Command.BLOCK_STATUS)
FUA: Final = int(CommandFlag.FUA)
NO_HOLE: Final = int(CommandFlag.NO_HOLE)
DF: Final = int(CommandFlag.DF)
REQ_ONE: Final = int(CommandFlag.REQ_ONE)
FAST_ZERO: Final = int(CommandFlag.FAST_ZERO)
PAYLOAD_LEN: Final = int(CommandFlag.PAYLOAD_LEN)

_CHANGING: Final = frozenset({WRITE, TRIM, WRITE_ZEROES})
_MOVING_DATA: Final = frozenset({READ, WRITE, CACHE})

# FUA is valid with every command (specification, "Command flags").
_FLAGS: Final[dict[int, int]] = {
    READ: FUA | DF,
    WRITE: FUA,
    FLUSH: FUA,
    TRIM: FUA,
    CACHE: FUA,
    WRITE_ZEROES: FUA | NO_HOLE | FAST_ZERO,
    BLOCK_STATUS: FUA | REQ_ONE,
}

Refusal = tuple[int, str]
"""An errno, and the sentence for the client; the texts are QEMU's."""


class Rules:
    """What requests of one client have to keep to.

    Args:
        export: What it is attached to.
        style: The headers it agreed on.
        context_ids: The metadata contexts it has selected.

    Attributes:
        layout: The header of a request.
        magic: What it begins with.
        payload_flag: The flag that says that a payload follows; 0 where every write has one.
        alignment_mask: Bits that offsets and lengths must not have.
    """

    def __init__(self, export: Export, style: HeaderStyle, context_ids: Collection[int]):
        is_extended = style is HeaderStyle.EXTENDED
        self.layout = EXTENDED_REQUEST if is_extended else COMPACT_REQUEST
        self.magic = EXTENDED_REQUEST_MAGIC if is_extended else REQUEST_MAGIC
        self.payload_flag = PAYLOAD_LEN if is_extended else 0
        self.alignment_mask = export.minimum_block_size - 1
        self._export = export
        self._style = style
        self._context_ids = context_ids

    def refusal(
        self,
        command: int,
        flags: int,
        offset: int,
        length: int,
        payload: memoryview | None,
        size: int,
    ) -> Refusal | None:
        """Check a request: None, or the errno and the sentence it is refused with.

        Source: specification, "Error values"; the texts are QEMU's.
        """
        allowed = _FLAGS.get(command)
        if allowed is None:
            return errno.EINVAL, f"invalid request type ({command}) received"
        if self._style is HeaderStyle.EXTENDED:
            if (payload is not None) != (command == WRITE):
                return self._payload_refusal(command, flags, offset, payload, size)
            flags &= ~PAYLOAD_LEN
        if flags & ~allowed or (flags & DF and self._style is HeaderStyle.SIMPLE):
            name = Command(command).name.lower().replace("_", " ")
            return errno.EINVAL, f"unsupported flags for command {name} (got {flags:#x})"
        if command == FLUSH:
            return None
        if length > self._export.maximum_payload and command in _MOVING_DATA:
            return errno.EINVAL, too_long(length, self._export.maximum_payload)
        if command in _CHANGING and not self._export.is_writable:
            return errno.EPERM, "Export is read-only"
        if command == BLOCK_STATUS:
            return self._status_refusal(offset, length, size)
        return self._range_refusal(command, offset, length, size)

    def _range_refusal(self, command: int, offset: int, length: int, size: int) -> Refusal | None:
        if offset + length > size:
            number = errno.ENOSPC if command in (WRITE, WRITE_ZEROES) else errno.EINVAL
            text = f"operation past EOF; From: {offset}, Len: {length}, Size: {size}"
            return number, text
        if (offset | length) & self.alignment_mask:
            unit = self._export.minimum_block_size
            text = f"unaligned request; From: {offset}, Len: {length}, Alignment: {unit}"
            return errno.EINVAL, text
        return None

    def _status_refusal(self, offset: int, length: int, size: int) -> Refusal | None:
        if not self._context_ids:
            return errno.EINVAL, "CMD_BLOCK_STATUS not negotiated"
        if not length:
            return errno.EINVAL, "need non-zero length"
        return self._range_refusal(BLOCK_STATUS, offset, length, size)

    def _payload_refusal(
        self, command: int, flags: int, offset: int, payload: memoryview | None, size: int
    ) -> Refusal | None:
        """Check a request that has a payload and should not, or the reverse."""
        name = Command(command).name.lower().replace("_", " ")
        if payload is None:
            return errno.EINVAL, f"command {name} needs a payload"
        if command != BLOCK_STATUS:
            return errno.EINVAL, f"command {name} takes no payload"
        if flags & ~(FUA | REQ_ONE | PAYLOAD_LEN):
            return errno.EINVAL, f"unsupported flags for command {name} (got {flags:#x})"
        try:
            length, ids = unpack_status_payload(payload)
        except ProtocolError as error:
            return errno.EINVAL, str(error)
        if len(set(ids)) != len(ids) or not set(ids) <= set(self._context_ids):
            return errno.EINVAL, "unknown or repeated metadata context id"
        return self._status_refusal(offset, length, size)


def too_long(length: int, maximum: int) -> str:
    """Word what is wrong with a request for too much data."""
    return f"len ({length}) is larger than max len ({maximum})"
