# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The handshake of a server, without I/O: bytes of the client go in, bytes for the client come out.

    receive(bytes)            whatever arrived, in any pieces
    advance() -> bytes|None   act on one message; None: more bytes are needed, or it is over
    outcome                   how it ended: None (not yet), `Chosen` or `Ended`
    unconsumed                bytes that already belong to the transmission phase

One message per `advance` lets the caller stop when the client does not read its answers, so
no client can make the server pile them up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final, TypeVar

from nbdjobs.errors import ProtocolError
from nbdjobs.protocol.constants import (
    ClientFlag,
    HandshakeFlag,
    HeaderStyle,
    InfoType,
    Option,
    OptionReplyType,
    TransmissionFlag,
)
from nbdjobs.protocol.export import Export, MetaContext
from nbdjobs.protocol.messages import (
    ExportQuery,
    Greeting,
    MetaContextQuery,
    OptionHeader,
    OptionReply,
    decode_name,
    pack_info_block_size,
    pack_info_export,
    pack_info_text,
    pack_meta_context,
    pack_server,
)

MAX_OPTION_LENGTH: Final = 32 * 1024 * 1024
"""A longer option ends the session, as in QEMU: skipping it would be work without end."""

MAX_STORED_OPTION: Final = 64 * 1024
"""Bytes of option data that are kept; enough for a name and a dozen queries of 4096 bytes."""

MAX_OPTIONS: Final = 1024
"""Options of one session; real clients send fewer than twenty."""

_CLIENT_FLAGS: Final = Struct(">I")
_EXPORT_NAME_REPLY: Final = Struct(">QH")
_KNOWN_CLIENT_FLAGS: Final = int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)
_MAX_SHOWN_NAME: Final = 80

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Chosen:
    """The client goes on to the transmission phase.

    Attributes:
        export: What it chose.
        style: The headers both sides use from now on.
        contexts: Selected metadata contexts by the ids the client knows them under.
    """

    export: Export
    style: HeaderStyle
    contexts: Mapping[int, MetaContext]


@dataclass(frozen=True, slots=True)
class Ended:
    """The session is over; `reason` is a sentence for the log, "" when the client asked for it."""

    reason: str


class _Refusal(Exception):  # noqa: N818 - an answer to an option, no failure of the session
    """An option gets an error reply, and the negotiation goes on."""

    def __init__(self, kind: OptionReplyType, text: str):
        self.kind = kind
        self.text = text
        super().__init__(text)


class Negotiation:
    """One client's handshake (fixed newstyle, and plain newstyle for old clients).

    Args:
        exports: What is on offer, by name; looked at anew for every option.
        has_room: Whether one more client may attach to an export now.
    """

    def __init__(
        self,
        exports: Mapping[str, Export],
        has_room: Callable[[Export], bool] = lambda export: True,
    ):
        self._exports = exports
        self._has_room = has_room
        self._received = bytearray()
        self._outcome: Chosen | Ended | None = None
        self._client_flags: ClientFlag | None = None
        self._option_count = 0
        self._to_skip = 0
        self._after_skip = b""
        self._style = HeaderStyle.SIMPLE
        self._selected_export: Export | None = None
        self._selected: dict[int, MetaContext] = {}

    @property
    def outcome(self) -> Chosen | Ended | None:
        """How the handshake ended, or None while it goes on."""
        return self._outcome

    @property
    def unconsumed(self) -> bytes:
        """Bytes received and not acted on."""
        return bytes(self._received)

    def greeting(self) -> bytes:
        """Return what the server says first."""
        return Greeting(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES).pack()

    def receive(self, data: bytes | memoryview) -> None:
        """Take bytes of the client; data of options that are refused anyway is dropped here."""
        skipped = min(self._to_skip, len(data))
        self._to_skip -= skipped
        self._received += data[skipped:]

    def advance(self) -> bytes | None:
        """Act on the next message of the client.

        Returns:
            What to send, perhaps nothing (b""), or None when the next message is not complete
            or the handshake is over.
        """
        if self._outcome is not None or self._to_skip:
            return None
        if self._after_skip:
            reply, self._after_skip = self._after_skip, b""
            return reply
        try:
            if self._client_flags is None:
                return self._take_client_flags()
            return self._take_option()
        except ProtocolError as error:
            return self._end(str(error))

    def _end(self, reason: str, reply: bytes = b"") -> bytes:
        self._outcome = Ended(reason)
        return reply

    def _take(self, length: int) -> bytes:
        taken = bytes(self._received[:length])
        del self._received[:length]
        return taken

    def _take_client_flags(self) -> bytes | None:
        if len(self._received) < _CLIENT_FLAGS.size:
            return None
        (flags,) = _CLIENT_FLAGS.unpack(self._take(_CLIENT_FLAGS.size))
        if flags & ~_KNOWN_CLIENT_FLAGS:
            raise ProtocolError(f"Unknown client flags {flags & ~_KNOWN_CLIENT_FLAGS:#x} received")
        self._client_flags = ClientFlag(flags)
        return b""

    def _take_option(self) -> bytes | None:
        size = OptionHeader.LAYOUT.size
        if len(self._received) < size:
            return None
        header = OptionHeader.unpack(bytes(self._received[:size]))
        self._check_session(header)
        if header.option == Option.ABORT:
            return self._end("", _ack(header.option))  # its data, if any, is ignored
        if header.option == Option.SET_META_CONTEXT:
            self._selected_export, self._selected = None, {}  # forgotten even if it fails
        refusal = _refuse_unread(header)
        if refusal is not None:
            self._count_option()
            del self._received[:size]
            return self._skip(header.length, _error_reply(header.option, refusal))
        if len(self._received) < size + header.length:
            return None
        self._count_option()
        del self._received[:size]
        return self._answer(Option(header.option), self._take(header.length))

    def _check_session(self, header: OptionHeader) -> None:
        """Find the mistakes that no error reply can answer."""
        assert self._client_flags is not None
        is_export_name = header.option == Option.EXPORT_NAME
        if not self._client_flags & ClientFlag.FIXED_NEWSTYLE and not is_export_name:
            raise ProtocolError(
                f"Unsupported option {header.option} ({option_name(header.option)})"
            )
        if header.length > MAX_OPTION_LENGTH:
            raise ProtocolError(
                f"len ({header.length}) is larger than max len ({MAX_OPTION_LENGTH})"
            )
        if is_export_name and header.length > MAX_STORED_OPTION:
            raise ProtocolError(f"Invalid name length: {header.length}")

    def _count_option(self) -> None:
        self._option_count += 1
        if self._option_count > MAX_OPTIONS:
            raise ProtocolError(f"More than {MAX_OPTIONS} options received")

    def _skip(self, length: int, reply: bytes) -> bytes:
        """Drop the data of an option, without storing it, before the answer is given."""
        present = min(length, len(self._received))
        del self._received[:present]
        self._to_skip = length - present
        if self._to_skip:
            self._after_skip = reply
            return b""
        return reply

    def _answer(self, option: Option, data: bytes) -> bytes:
        try:
            return _HANDLERS[option](self, option, data)
        except _Refusal as refusal:
            return _error_reply(option, refusal)

    def _find(self, name: str) -> Export:
        export = self._exports.get(name)
        if export is None:
            raise _Refusal(OptionReplyType.ERR_UNKNOWN, f"export '{_shown(name)}' not present")
        return export

    def _contexts_for(self, export: Export) -> dict[int, MetaContext]:
        """Return the contexts selected last, provided they were selected for this export."""
        return self._selected if self._selected_export is export else {}

    def _flags_of(self, export: Export) -> TransmissionFlag:
        return transmission_flags(
            export, self._style, has_contexts=bool(self._contexts_for(export))
        )

    def _choose(self, export: Export) -> None:
        self._outcome = Chosen(export, self._style, self._contexts_for(export))

    def _export_name(self, option: Option, data: bytes) -> bytes:
        """Choose an export the old way: there is no error reply, only the end."""
        if self._style is HeaderStyle.EXTENDED:
            raise ProtocolError("Option export name is not allowed after extended headers")
        export = self._exports.get(decode_name(data))
        if export is None:
            raise ProtocolError("export not found")
        if not self._has_room(export):
            raise ProtocolError(_too_many_clients(export))
        self._choose(export)
        reply = _EXPORT_NAME_REPLY.pack(export.backend.size, self._flags_of(export))
        assert self._client_flags is not None
        return reply if self._client_flags & ClientFlag.NO_ZEROES else reply + bytes(124)

    def _list(self, option: Option, data: bytes) -> bytes:
        servers = [
            OptionReply(
                option, OptionReplyType.SERVER, pack_server(export.name, export.description)
            ).pack()
            for export in self._exports.values()
        ]
        return b"".join(servers) + _ack(option)

    def _starttls(self, option: Option, data: bytes) -> bytes:
        raise _Refusal(OptionReplyType.ERR_POLICY, "TLS not configured")

    def _info(self, option: Option, data: bytes) -> bytes:
        query = _parse(ExportQuery.unpack, option, data)
        export = self._find(query.name)
        if option is Option.GO and not self._has_room(export):
            raise _Refusal(OptionReplyType.ERR_POLICY, _too_many_clients(export))
        replies = b"".join(
            OptionReply(option, OptionReplyType.INFO, item).pack()
            for item in self._describe(export, query.wanted)
        )
        if option is Option.GO:
            self._choose(export)
        return replies + _ack(option)

    def _describe(self, export: Export, wanted: Sequence[int]) -> list[bytes]:
        """Return name, description, block sizes and export in QEMU's order."""
        items = []
        if InfoType.NAME in wanted:
            items.append(pack_info_text(InfoType.NAME, export.name))
        if export.description:
            items.append(pack_info_text(InfoType.DESCRIPTION, export.description))
        items.append(
            pack_info_block_size(
                export.minimum_block_size, export.preferred_block_size, export.maximum_payload
            )
        )
        items.append(pack_info_export(export.backend.size, self._flags_of(export)))
        return items

    def _structured_reply(self, option: Option, data: bytes) -> bytes:
        if self._style is HeaderStyle.EXTENDED:
            raise _Refusal(
                OptionReplyType.ERR_EXT_HEADER_REQD, "extended headers already negotiated"
            )
        if self._style is HeaderStyle.STRUCTURED:
            raise _Refusal(OptionReplyType.ERR_INVALID, "structured reply already negotiated")
        self._style = HeaderStyle.STRUCTURED
        return _ack(option)

    def _extended_headers(self, option: Option, data: bytes) -> bytes:
        if self._style is HeaderStyle.EXTENDED:
            raise _Refusal(OptionReplyType.ERR_INVALID, "extended headers already negotiated")
        self._style = HeaderStyle.EXTENDED
        return _ack(option)

    def _list_meta_context(self, option: Option, data: bytes) -> bytes:
        query = _parse(MetaContextQuery.unpack, option, data)
        export = self._find(query.export_name)
        found = [
            context.name
            for context in export.contexts
            if not query.queries or any(_is_listed_by(context.name, q) for q in query.queries)
        ]
        replies = [_meta_context_reply(option, 0, name) for name in found]
        return b"".join(replies) + _ack(option)

    def _set_meta_context(self, option: Option, data: bytes) -> bytes:
        """Select contexts by their full names."""
        if self._style is HeaderStyle.SIMPLE:
            raise _Refusal(
                OptionReplyType.ERR_INVALID,
                "request option 'set meta context' when structured reply is not negotiated",
            )
        query = _parse(MetaContextQuery.unpack, option, data)
        export = self._find(query.export_name)
        self._selected_export = export
        self._selected = {
            number: context
            for number, context in enumerate(export.contexts)
            if context.name in query.queries
        }
        replies = [
            _meta_context_reply(option, number, context.name)
            for number, context in self._selected.items()
        ]
        return b"".join(replies) + _ack(option)


def transmission_flags(
    export: Export, style: HeaderStyle, *, has_contexts: bool
) -> TransmissionFlag:
    """Say what an export can do for a client with these headers.

    Source: the same flags as QEMU's server, plus those that came with extended headers.
    """
    flags = (
        TransmissionFlag.HAS_FLAGS
        | TransmissionFlag.SEND_FLUSH
        | TransmissionFlag.SEND_FUA
        | TransmissionFlag.SEND_CACHE
    )
    if export.is_writable:
        flags |= TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES
        flags |= TransmissionFlag.SEND_FAST_ZERO
    else:
        flags |= TransmissionFlag.READ_ONLY
    if export.is_rotational:
        flags |= TransmissionFlag.ROTATIONAL
    if export.can_multi_conn:
        flags |= TransmissionFlag.CAN_MULTI_CONN
    if style is not HeaderStyle.SIMPLE:
        flags |= TransmissionFlag.SEND_DF
    if style is HeaderStyle.EXTENDED and has_contexts:
        flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
    return flags


def _shown(name: str) -> str:
    return name if len(name) <= _MAX_SHOWN_NAME else name[:_MAX_SHOWN_NAME] + "..."


def _too_many_clients(export: Export) -> str:
    return f"export '{_shown(export.name)}' has too many clients"


def option_name(option: int) -> str:
    """Name an option as QEMU's messages do."""
    return _NAMES.get(option, "<unknown>")


def _refuse_unread(header: OptionHeader) -> _Refusal | None:
    """Find the options whose data need not be read to be refused."""
    name = option_name(header.option)
    if header.option not in _HANDLERS:
        text = f"Unsupported option {header.option} ({name})"
        return _Refusal(OptionReplyType.ERR_UNSUP, text)
    if header.option in _WITHOUT_DATA and header.length:
        return _Refusal(OptionReplyType.ERR_INVALID, f"option '{name}' has unexpected length")
    if header.length > MAX_STORED_OPTION:
        text = f"option '{name}' has {header.length} bytes, more than {MAX_STORED_OPTION}"
        return _Refusal(OptionReplyType.ERR_TOO_BIG, text)
    return None


def _parse(unpack: Callable[[bytes], T], option: Option, data: bytes) -> T:
    """Read the data of an option; a mistake in it is answered, and the session goes on."""
    try:
        return unpack(data)
    except ProtocolError as error:
        text = {
            "Inconsistent lengths": f"Inconsistent lengths in option {option_name(option)}",
            "Unexpected length": f"option '{option_name(option)}' has unexpected length",
        }.get(str(error), str(error))
        raise _Refusal(OptionReplyType.ERR_INVALID, text) from error


def _is_listed_by(context: str, query: str) -> bool:
    """Whether a query names a context, or is a prefix of it that ends in a colon (`base:`)."""
    return context == query or (query.endswith(":") and context.startswith(query))


def _ack(option: int) -> bytes:
    return OptionReply(option, OptionReplyType.ACK).pack()


def _error_reply(option: int, refusal: _Refusal) -> bytes:
    return OptionReply(option, refusal.kind, refusal.text.encode()).pack()


def _meta_context_reply(option: int, context_id: int, name: str) -> bytes:
    data = pack_meta_context(context_id, name)
    return OptionReply(option, OptionReplyType.META_CONTEXT, data).pack()


_Handler = Callable[[Negotiation, Option, bytes], bytes]

_HANDLERS: Final[Mapping[int, _Handler]] = {
    Option.EXPORT_NAME: Negotiation._export_name,
    Option.LIST: Negotiation._list,
    Option.STARTTLS: Negotiation._starttls,
    Option.INFO: Negotiation._info,
    Option.GO: Negotiation._info,
    Option.STRUCTURED_REPLY: Negotiation._structured_reply,
    Option.LIST_META_CONTEXT: Negotiation._list_meta_context,
    Option.SET_META_CONTEXT: Negotiation._set_meta_context,
    Option.EXTENDED_HEADERS: Negotiation._extended_headers,
}

_WITHOUT_DATA: Final = frozenset(
    {Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS}
)

_NAMES: Final = {option.value: option.name.lower().replace("_", " ") for option in Option}
