# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The messages of the negotiation, and the errors of the transmission phase, as bytes.

Headers that are read and written for every request are in `replies` and `session`: there a
dataclass per message would cost more than the work it describes.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from struct import error as StructError  # noqa: N812 - an exception, named as one
from typing import ClassVar, Final

from nbdjobs.errors import ProtocolError
from nbdjobs.protocol.constants import (
    INIT_MAGIC,
    MAX_STRING,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    HandshakeFlag,
    InfoType,
    NbdError,
    OptionReplyType,
    TransmissionFlag,
)

_UINT16: Final = Struct(">H")
_UINT32: Final = Struct(">I")

_ERRNO_TO_NBD: Final = {
    errno.EPERM: NbdError.EPERM,
    errno.EROFS: NbdError.EPERM,
    errno.EIO: NbdError.EIO,
    errno.ENOMEM: NbdError.ENOMEM,
    errno.EINVAL: NbdError.EINVAL,
    errno.ENOSPC: NbdError.ENOSPC,
    errno.EDQUOT: NbdError.ENOSPC,
    errno.EFBIG: NbdError.ENOSPC,
    errno.EOVERFLOW: NbdError.EOVERFLOW,
    errno.ENOTSUP: NbdError.ENOTSUP,
    errno.EOPNOTSUPP: NbdError.ENOTSUP,
    errno.ESHUTDOWN: NbdError.ESHUTDOWN,
}


def nbd_error(number: int) -> NbdError:
    """Translate an errno; what has no name on the wire becomes EINVAL, as in QEMU."""
    return _ERRNO_TO_NBD.get(number, NbdError.EINVAL)


def truncated(text: str, limit: int = MAX_STRING) -> bytes:
    """Encode a text, cut where it would exceed `limit` bytes, never inside a character."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= limit:
        return encoded
    return encoded[:limit].decode("utf-8", "ignore").encode()


@dataclass(frozen=True, slots=True)
class Greeting:
    """The first message of a newstyle server."""

    LAYOUT: ClassVar = Struct(">QQH")
    flags: HandshakeFlag

    def pack(self) -> bytes:
        """Return the message as bytes."""
        return self.LAYOUT.pack(INIT_MAGIC, OPTION_MAGIC, self.flags)

    @classmethod
    def unpack(cls, data: bytes) -> Greeting:
        """Read the message.

        Raises:
            ProtocolError: It is not the greeting of a newstyle server.
        """
        magic, option_magic, flags = _unpack(cls.LAYOUT, data)
        if (magic, option_magic) != (INIT_MAGIC, OPTION_MAGIC):
            raise ProtocolError("Server does not speak the newstyle NBD protocol")
        return cls(HandshakeFlag(flags))


@dataclass(frozen=True, slots=True)
class OptionHeader:
    """What precedes the data of an option."""

    LAYOUT: ClassVar = Struct(">QII")
    option: int
    length: int

    def pack(self) -> bytes:
        """Return the header as bytes."""
        return self.LAYOUT.pack(OPTION_MAGIC, self.option, self.length)

    @classmethod
    def unpack(cls, data: bytes) -> OptionHeader:
        """Read the header.

        Raises:
            ProtocolError: The magic number is wrong.
        """
        magic, option, length = _unpack(cls.LAYOUT, data)
        if magic != OPTION_MAGIC:
            raise ProtocolError("Bad magic received")
        return cls(option, length)


@dataclass(frozen=True, slots=True)
class OptionReply:
    """An answer to an option."""

    LAYOUT: ClassVar = Struct(">QIII")
    option: int
    kind: OptionReplyType
    data: bytes = b""

    def pack(self) -> bytes:
        """Return the message as bytes."""
        header = self.LAYOUT.pack(OPTION_REPLY_MAGIC, self.option, self.kind, len(self.data))
        return header + self.data

    @classmethod
    def unpack(cls, data: bytes) -> OptionReply:
        """Read the message.

        Raises:
            ProtocolError: The magic number, the kind or the length is wrong.
        """
        size = cls.LAYOUT.size
        magic, option, kind, length = _unpack(cls.LAYOUT, data[:size])
        if magic != OPTION_REPLY_MAGIC:
            raise ProtocolError("Bad magic in option reply")
        if length != len(data) - size:
            raise ProtocolError("Inconsistent lengths in option reply")
        if kind not in OptionReplyType._value2member_map_:
            raise ProtocolError(f"Unknown option reply type {kind:#x}")
        return cls(option, OptionReplyType(kind), data[size:])


@dataclass(frozen=True, slots=True)
class ExportQuery:
    """The data of the options INFO and GO."""

    name: str
    wanted: tuple[int, ...]

    def pack(self) -> bytes:
        """Return the data as bytes."""
        items = b"".join(_UINT16.pack(item) for item in self.wanted)
        return _pack_string(self.name) + _UINT16.pack(len(self.wanted)) + items

    @classmethod
    def unpack(cls, data: bytes) -> ExportQuery:
        """Read the data.

        Raises:
            ProtocolError: Lengths do not fit together, or the name is too long or not UTF-8.
        """
        name, rest = _take_string(data)
        if len(rest) < _UINT16.size:
            raise ProtocolError("Inconsistent lengths")
        (count,) = _UINT16.unpack_from(rest)
        items = rest[_UINT16.size :]
        if len(items) < count * _UINT16.size:
            raise ProtocolError("Inconsistent lengths")
        if len(items) > count * _UINT16.size:
            raise ProtocolError("Unexpected length")
        return cls(name, tuple(item for (item,) in _UINT16.iter_unpack(items)))


@dataclass(frozen=True, slots=True)
class MetaContextQuery:
    """The data of the options LIST_META_CONTEXT and SET_META_CONTEXT."""

    export_name: str
    queries: tuple[str, ...]

    def pack(self) -> bytes:
        """Return the data as bytes."""
        packed = b"".join(_pack_string(query) for query in self.queries)
        return _pack_string(self.export_name) + _UINT32.pack(len(self.queries)) + packed

    @classmethod
    def unpack(cls, data: bytes) -> MetaContextQuery:
        """Read the data; queries that are too long or not UTF-8 match nothing.

        Raises:
            ProtocolError: Lengths do not fit together, or the name is too long or not UTF-8.
        """
        name, rest = _take_string(data)
        if len(rest) < _UINT32.size:
            raise ProtocolError("Inconsistent lengths")
        (count,) = _UINT32.unpack_from(rest)
        rest = rest[_UINT32.size :]
        queries = []
        for _ in range(count):
            query, rest = _take_bytes(rest)
            queries.append(query.decode("utf-8", "replace") if len(query) <= MAX_STRING else "")
        if rest:
            raise ProtocolError("Unexpected length")
        return cls(name, tuple(queries))


def pack_server(name: str, description: str) -> bytes:
    """Return the data of a SERVER reply: a name, and a description if it is not empty."""
    return _pack_string(name) + truncated(description)


def pack_info_export(size: int, flags: TransmissionFlag) -> bytes:
    """Return the data of an INFO reply about size (bytes) and abilities."""
    return Struct(">HQH").pack(InfoType.EXPORT, size, flags)


def pack_info_text(kind: InfoType, text: str) -> bytes:
    """Return the data of an INFO reply about name or description."""
    return _UINT16.pack(kind) + truncated(text)


def pack_info_block_size(minimum: int, preferred: int, maximum: int) -> bytes:
    """Return the data of an INFO reply about size limits in bytes."""
    return Struct(">HIII").pack(InfoType.BLOCK_SIZE, minimum, preferred, maximum)


def pack_meta_context(context_id: int, name: str) -> bytes:
    """Return the data of a META_CONTEXT reply."""
    return _UINT32.pack(context_id) + truncated(name)


def unpack_status_payload(payload: bytes | memoryview) -> tuple[int, Sequence[int]]:
    """Read the payload of a BLOCK_STATUS request.

    Returns:
        The effect length in bytes, and the context ids.

    Raises:
        ProtocolError: Its length is not 8 + n * 4 with n of at least 1.
    """
    if len(payload) < 12 or len(payload) % 4:
        raise ProtocolError("Block status payload must be 8 bytes and at least one context id")
    numbers = Struct(f">Q{(len(payload) - 8) // 4}I").unpack(payload)
    return numbers[0], numbers[1:]


def _unpack(layout: Struct, data: bytes) -> tuple[int, ...]:
    try:
        return layout.unpack(data)
    except StructError as error:
        raise ProtocolError(f"Message must be {layout.size} bytes, not {len(data)}") from error


def _pack_string(text: str) -> bytes:
    encoded = text.encode()
    return _UINT32.pack(len(encoded)) + encoded


def _take_bytes(data: bytes) -> tuple[bytes, bytes]:
    """Split off a string that follows its 32-bit length."""
    if len(data) < _UINT32.size:
        raise ProtocolError("Inconsistent lengths")
    (length,) = _UINT32.unpack_from(data)
    end = _UINT32.size + length
    if end > len(data):
        raise ProtocolError("Inconsistent lengths")
    return data[_UINT32.size : end], data[end:]


def _take_string(data: bytes) -> tuple[str, bytes]:
    """Split off a name that follows its 32-bit length."""
    name, rest = _take_bytes(data)
    return decode_name(name), rest


def decode_name(name: bytes) -> str:
    """Check and decode the name of an export.

    Raises:
        ProtocolError: It is longer than 4096 bytes or not UTF-8.
    """
    if len(name) > MAX_STRING:
        raise ProtocolError(f"Invalid name length: {len(name)}")
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError("Export name is not valid UTF-8") from error
