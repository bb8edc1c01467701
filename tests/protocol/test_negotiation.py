# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdjobs.protocol.constants import (
    OPTION_MAGIC,
    HeaderStyle,
    InfoType,
    Option,
    TransmissionFlag,
)
from nbdjobs.protocol.constants import (
    OptionReplyType as Kind,
)
from nbdjobs.protocol.export import Export
from nbdjobs.protocol.messages import ExportQuery, MetaContextQuery, OptionHeader, OptionReply
from nbdjobs.protocol.negotiation import (
    MAX_OPTION_LENGTH,
    MAX_OPTIONS,
    MAX_STORED_OPTION,
    Chosen,
    Ended,
    Negotiation,
)
from tests.protocol.rig import SIZE, Allocation, Even, MemoryDisk

DISK = MemoryDisk()
EXPORT = Export(
    name="disk",
    backend=DISK,
    description="a disk",
    is_writable=True,
    contexts=(Allocation(DISK), Even()),
)
OTHER = replace(EXPORT, name="other", description="", is_writable=False, contexts=())
EXPORTS = {"disk": EXPORT, "other": OTHER}

LONG = "n" * 4097


class Talk:
    """A negotiation and all that it answered."""

    def __init__(self, flags: int = 3):
        self.negotiation = Negotiation(EXPORTS)
        self.send(struct.pack(">I", flags))

    def send(self, data: bytes) -> bytes:
        self.negotiation.receive(data)
        answer = b""
        while (reply := self.negotiation.advance()) is not None:
            answer += reply
        return answer

    def option(self, number: int, data: bytes = b"") -> list[tuple[Kind, bytes]]:
        header = struct.pack(">QII", OPTION_MAGIC, number, len(data))
        return split(self.send(header + data))

    @property
    def chosen(self) -> Chosen:
        assert isinstance(self.negotiation.outcome, Chosen)
        return self.negotiation.outcome

    @property
    def end(self) -> str:
        assert isinstance(self.negotiation.outcome, Ended)
        return self.negotiation.outcome.reason


def split(data: bytes) -> list[tuple[Kind, bytes]]:
    replies = []
    while data:
        end = 20 + OptionReply.LAYOUT.unpack(data[:20])[3]
        reply = OptionReply.unpack(data[:end])
        replies.append((reply.kind, reply.data))
        data = data[end:]
    return replies


def query(name: str = "disk", *wanted: int) -> bytes:
    return ExportQuery(name, wanted).pack()


def contexts(*queries: str, name: str = "disk") -> bytes:
    return MetaContextQuery(name, queries).pack()


def meta(context_id: int, name: str) -> tuple[Kind, bytes]:
    return Kind.META_CONTEXT, struct.pack(">I", context_id) + name.encode()


ACK = (Kind.ACK, b"")
WRITABLE = 0xD6D  # what qemu-nbd answers for a writable disk without structured replies


def export_info(flags: int) -> tuple[Kind, bytes]:
    return Kind.INFO, struct.pack(">HQH", InfoType.EXPORT, SIZE, flags)


BLOCK_SIZE = (Kind.INFO, struct.pack(">HIII", 3, 1, 4096, 32 << 20))


def test_the_greeting_offers_fixed_newstyle_without_zeroes() -> None:
    assert Negotiation(EXPORTS).greeting() == b"NBDMAGICIHAVEOPT\0\3"


@pytest.mark.parametrize("flags", [4, 0x80000000, 7])
def test_unknown_client_flags_end_the_session(flags: int) -> None:
    assert "Unknown client flags" in Talk(flags).end


@pytest.mark.parametrize(("flags", "zeroes"), [(3, 0), (1, 124), (0, 124), (2, 0)])
def test_export_name_chooses_with_and_without_zeroes(flags: int, zeroes: int) -> None:
    talk = Talk(flags)
    answer = talk.send(struct.pack(">QII", OPTION_MAGIC, Option.EXPORT_NAME, 4) + b"disk")
    assert answer == struct.pack(">QH", SIZE, WRITABLE) + bytes(zeroes)
    assert talk.chosen == Chosen(EXPORT, HeaderStyle.SIMPLE, {})


@pytest.mark.parametrize("name", [b"nope", b"n" * 4097, b"\xff", b"n" * (MAX_STORED_OPTION + 1)])
def test_export_name_without_such_an_export_ends_the_session(name: bytes) -> None:
    talk = Talk()
    header = struct.pack(">QII", OPTION_MAGIC, Option.EXPORT_NAME, len(name))
    assert talk.send(header + name) == b""
    assert talk.end


def test_export_name_is_not_allowed_with_extended_headers() -> None:
    talk = Talk()
    talk.option(Option.EXTENDED_HEADERS)
    talk.option(Option.EXPORT_NAME, b"disk")
    assert talk.end


@pytest.mark.parametrize("option", [Option.LIST, Option.GO, Option.ABORT, 99])
def test_a_client_that_is_not_fixed_may_only_choose(option: int) -> None:
    talk = Talk(2)
    assert talk.option(option) == []
    assert "Unsupported option" in talk.end


@pytest.mark.parametrize("data", [b"", b"ignored"])
def test_abort_is_acknowledged(data: bytes) -> None:
    talk = Talk()
    assert talk.option(Option.ABORT, data) == [ACK]
    assert talk.end == ""


def test_list_names_and_describes() -> None:
    assert Talk().option(Option.LIST) == [
        (Kind.SERVER, b"\0\0\0\4diska disk"),
        (Kind.SERVER, b"\0\0\0\5other"),
        ACK,
    ]


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (Option.LIST, "list"),
        (Option.STARTTLS, "starttls"),
        (Option.STRUCTURED_REPLY, "structured reply"),
        (Option.EXTENDED_HEADERS, "extended headers"),
    ],
)
@pytest.mark.parametrize("length", [1, 100_000])
def test_options_without_data_refuse_data_and_go_on(option: int, name: str, length: int) -> None:
    talk = Talk()
    text = f"option '{name}' has unexpected length".encode()
    assert talk.option(option, bytes(length)) == [(Kind.ERR_INVALID, text)]
    assert talk.option(Option.LIST)[-1] == ACK


def test_starttls_is_refused_by_a_server_without_tls() -> None:
    assert Talk().option(Option.STARTTLS) == [(Kind.ERR_POLICY, b"TLS not configured")]


def test_info_tells_all_and_chooses_nothing() -> None:
    talk = Talk()
    assert talk.option(Option.INFO, query("disk", 1, 2, 3, 77)) == [
        (Kind.INFO, b"\0\1disk"),
        (Kind.INFO, b"\0\2a disk"),
        BLOCK_SIZE,
        export_info(WRITABLE),
        ACK,
    ]
    assert talk.negotiation.outcome is None


def test_go_chooses_and_leaves_the_rest_for_transmission() -> None:
    talk = Talk()
    data = query("other")
    header = struct.pack(">QII", OPTION_MAGIC, Option.GO, len(data))
    answer = talk.send(header + data + b"a request")
    assert split(answer) == [BLOCK_SIZE, export_info(0x50F), ACK]
    assert talk.chosen == Chosen(OTHER, HeaderStyle.SIMPLE, {})
    assert talk.negotiation.unconsumed == b"a request"


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
@pytest.mark.parametrize(
    ("data", "kind", "text"),
    [
        (query("nope"), Kind.ERR_UNKNOWN, "export 'nope' not present"),
        (query("n" * 90), Kind.ERR_UNKNOWN, f"export '{'n' * 80}...' not present"),
        (query("") + b"", Kind.ERR_UNKNOWN, "export '' not present"),
        (query(LONG), Kind.ERR_INVALID, "Invalid name length: 4097"),
        (query("disk") + b"x", Kind.ERR_INVALID, "option '{}' has unexpected length"),
        (b"", Kind.ERR_INVALID, "Inconsistent lengths in option {}"),
        (b"\0\0\0\4disk", Kind.ERR_INVALID, "Inconsistent lengths in option {}"),
        (b"\0\0\1\0disk\0\0", Kind.ERR_INVALID, "Inconsistent lengths in option {}"),
        (b"\0\0\0\4disk\0\2\0\0", Kind.ERR_INVALID, "Inconsistent lengths in option {}"),
        (b"\0\0\0\1\xff\0\0", Kind.ERR_INVALID, "Export name is not valid UTF-8"),
    ],
)
def test_info_and_go_explain_what_is_wrong(
    option: Option, data: bytes, kind: Kind, text: str
) -> None:
    talk = Talk()
    assert talk.option(option, data) == [(kind, text.format(option.name.lower()).encode())]
    assert talk.option(Option.GO, query())[-1] == ACK


@pytest.mark.parametrize("option", [Option.GO, Option.EXPORT_NAME])
def test_an_export_without_room_is_refused(option: Option) -> None:
    server = Negotiation(EXPORTS, lambda export: export.name != "disk")
    server.receive(struct.pack(">I", 3))
    assert server.advance() == b""
    name = b"disk"
    data = name if option is Option.EXPORT_NAME else ExportQuery("disk", ()).pack()
    server.receive(OptionHeader(option, len(data)).pack() + data)
    reply = server.advance()
    if option is Option.EXPORT_NAME:
        assert reply == b""
        assert isinstance(server.outcome, Ended)
    else:
        assert reply is not None
        refused = OptionReply.unpack(reply)
        assert refused.kind is Kind.ERR_POLICY
        assert refused.data == b"export 'disk' has too many clients"
        assert server.outcome is None


def test_structured_replies_once() -> None:
    talk = Talk()
    assert talk.option(Option.STRUCTURED_REPLY) == [ACK]
    again = (Kind.ERR_INVALID, b"structured reply already negotiated")
    assert talk.option(Option.STRUCTURED_REPLY) == [again]
    assert talk.option(Option.INFO, query())[-2] == export_info(WRITABLE | 0x80)


def test_extended_headers_win_over_structured_replies() -> None:
    talk = Talk()
    talk.option(Option.STRUCTURED_REPLY)
    assert talk.option(Option.EXTENDED_HEADERS) == [ACK]
    assert talk.option(Option.EXTENDED_HEADERS)[0][0] is Kind.ERR_INVALID
    assert talk.option(Option.STRUCTURED_REPLY)[0][0] is Kind.ERR_EXT_HEADER_REQD
    talk.option(Option.SET_META_CONTEXT, contexts("base:allocation"))
    flags = WRITABLE | TransmissionFlag.SEND_DF | TransmissionFlag.BLOCK_STATUS_PAYLOAD
    assert talk.option(Option.GO, query())[-2] == export_info(flags)
    assert talk.chosen.style is HeaderStyle.EXTENDED


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ([], ["base:allocation", "test:even"]),
        (["base:"], ["base:allocation"]),
        (["base:allocation", "base:"], ["base:allocation"]),
        (["test:", "base:allocation"], ["base:allocation", "test:even"]),
        (["base"], []),
        (["base:nope", "unknown:x", "", LONG], []),
    ],
)
def test_list_meta_context_matches_names_and_prefixes(queries: list[str], found: list[str]) -> None:
    replies = Talk().option(Option.LIST_META_CONTEXT, contexts(*queries))
    assert replies == [*(meta(0, name) for name in found), ACK]


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ([], {}),
        (["base:"], {}),
        (["base:allocation", "base:allocation"], {0: "base:allocation"}),
        (["test:even"], {1: "test:even"}),
        (["test:even", "base:allocation", "x:y"], {0: "base:allocation", 1: "test:even"}),
    ],
)
def test_set_meta_context_selects_whole_names(queries: list[str], found: dict[int, str]) -> None:
    talk = Talk()
    talk.option(Option.STRUCTURED_REPLY)
    replies = talk.option(Option.SET_META_CONTEXT, contexts(*queries))
    assert replies == [*(meta(number, name) for number, name in found.items()), ACK]
    talk.option(Option.GO, query())
    assert {n: context.name for n, context in talk.chosen.contexts.items()} == found


def test_set_meta_context_needs_structured_replies() -> None:
    reply = Talk().option(Option.SET_META_CONTEXT, contexts("base:allocation"))
    assert reply[0][0] is Kind.ERR_INVALID


@pytest.mark.parametrize(
    "second",
    [contexts(), contexts("x:y"), contexts("base:allocation", name="nope"), b"bad", bytes(70_000)],
)
def test_each_set_meta_context_forgets_the_one_before(second: bytes) -> None:
    talk = Talk()
    talk.option(Option.STRUCTURED_REPLY)
    talk.option(Option.SET_META_CONTEXT, contexts("base:allocation"))
    talk.option(Option.SET_META_CONTEXT, second)
    talk.option(Option.GO, query())
    assert talk.chosen.contexts == {}


def test_contexts_are_those_of_the_chosen_export_only() -> None:
    talk = Talk()
    talk.option(Option.STRUCTURED_REPLY)
    talk.option(Option.SET_META_CONTEXT, contexts("base:allocation"))
    talk.option(Option.GO, query("other"))
    assert talk.chosen.contexts == {}


@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (contexts(name="nope"), Kind.ERR_UNKNOWN),
        (contexts(name=LONG), Kind.ERR_INVALID),
        (contexts() + b"x", Kind.ERR_INVALID),
        (contexts("base:")[:-1], Kind.ERR_INVALID),
        (b"\0\0\0\4disk", Kind.ERR_INVALID),
        (b"\0\0\0\4disk\0\0\0\2\0\0\0\0", Kind.ERR_INVALID),
        (bytes(MAX_STORED_OPTION + 1), Kind.ERR_TOO_BIG),
    ],
)
def test_meta_context_options_explain_what_is_wrong(
    option: Option, data: bytes, kind: Kind
) -> None:
    talk = Talk()
    talk.option(Option.STRUCTURED_REPLY)
    replies = talk.option(option, data)
    assert [reply[0] for reply in replies] == [kind]
    assert replies[0][1]
    assert talk.option(Option.LIST)[-1] == ACK


@pytest.mark.parametrize("length", [0, 3, 1_000_000])
def test_unknown_options_are_refused_and_skipped_without_storing(length: int) -> None:
    talk = Talk()
    header = struct.pack(">QII", OPTION_MAGIC, 99, length)
    answer = talk.send(header)
    for start in range(0, length, 1000):
        answer += talk.send(bytes(min(1000, length - start)))
        assert len(talk.negotiation.unconsumed) < 1000
    assert split(answer) == [(Kind.ERR_UNSUP, b"Unsupported option 99 (<unknown>)")]
    assert talk.option(Option.LIST)[-1] == ACK


def test_absurd_options_end_the_session() -> None:
    talk = Talk()
    talk.send(struct.pack(">QII", OPTION_MAGIC, 99, MAX_OPTION_LENGTH + 1))
    assert "larger than max len" in talk.end


def test_a_wrong_magic_number_ends_the_session() -> None:
    talk = Talk()
    talk.send(bytes(16))
    assert talk.end == "Bad magic received"


def test_options_without_end_end_the_session() -> None:
    talk = Talk()
    for _ in range(MAX_OPTIONS):
        assert talk.option(Option.STARTTLS)
    assert talk.option(99) == []
    assert "options" in talk.end


def test_bytes_may_come_one_by_one() -> None:
    whole, slow = Talk(), Talk()
    stream = b"".join(
        struct.pack(">QII", OPTION_MAGIC, number, len(data)) + data
        for number, data in [
            (Option.STRUCTURED_REPLY, b""),
            (99, b"unknown"),
            (Option.LIST, b"no"),
            (Option.SET_META_CONTEXT, contexts("base:allocation")),
            (Option.GO, query("disk", 1)),
        ]
    )
    answers = b"".join(slow.send(bytes([byte])) for byte in stream)
    assert answers == whole.send(stream)
    assert slow.chosen == whole.chosen
    assert 0 in slow.chosen.contexts


OPTIONS = st.tuples(
    st.sampled_from([*map(int, Option), 4, 99]),
    st.one_of(
        st.binary(max_size=40),
        st.just(query()),
        st.builds(lambda items: contexts(*items), st.lists(st.text(max_size=9), max_size=3)),
    ),
).map(lambda option: struct.pack(">QII", OPTION_MAGIC, option[0], len(option[1])) + option[1])


@settings(max_examples=200, deadline=None)
@given(flags=st.integers(0, 7), pieces=st.lists(st.one_of(OPTIONS, st.binary(max_size=30))))
def test_any_bytes_are_answered_or_end_the_session(flags: int, pieces: list[bytes]) -> None:
    talk = Talk(flags)
    answers = b"".join(talk.send(piece) for piece in pieces)
    single = Talk(flags)
    data = b"".join(pieces)
    assert b"".join(single.send(data[i : i + 1]) for i in range(len(data))) == answers
    assert single.negotiation.outcome == talk.negotiation.outcome
