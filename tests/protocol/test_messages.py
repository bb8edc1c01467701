# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import errno
import struct
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdjobs.errors import ProtocolError
from nbdjobs.protocol.buffers import BufferPool, ReceiveBuffer
from nbdjobs.protocol.constants import HandshakeFlag, HeaderStyle, NbdError, OptionReplyType
from nbdjobs.protocol.export import Export, MetaContext
from nbdjobs.protocol.memory import Budget
from nbdjobs.protocol.messages import (
    ExportQuery,
    Greeting,
    MetaContextQuery,
    OptionHeader,
    OptionReply,
    nbd_error,
    truncated,
    unpack_status_payload,
)
from nbdjobs.protocol.negotiation import Chosen
from nbdjobs.protocol.session import Session
from nbdjobs.protocol.turns import ALONE
from tests.protocol.rig import Allocation, Even, MemoryDisk

NAMES = st.text(max_size=20)


@pytest.mark.parametrize(
    "message",
    [
        Greeting(HandshakeFlag.FIXED_NEWSTYLE),
        OptionHeader(7, 12),
        OptionReply(7, OptionReplyType.ACK),
        OptionReply(3, OptionReplyType.SERVER, b"data"),
    ],
)
def test_messages_survive_the_wire(message: Greeting | OptionHeader | OptionReply) -> None:
    assert type(message).unpack(message.pack()) == message


@given(name=NAMES, wanted=st.lists(st.integers(0, 2**16 - 1), max_size=5))
def test_export_queries_survive_the_wire(name: str, wanted: list[int]) -> None:
    query = ExportQuery(name, tuple(wanted))
    assert ExportQuery.unpack(query.pack()) == query


@given(name=NAMES, queries=st.lists(NAMES, max_size=5))
def test_context_queries_survive_the_wire(name: str, queries: list[str]) -> None:
    query = MetaContextQuery(name, tuple(queries))
    assert MetaContextQuery.unpack(query.pack()) == query


@pytest.mark.parametrize(
    "unpack",
    [
        Greeting.unpack,
        OptionHeader.unpack,
        OptionReply.unpack,
        ExportQuery.unpack,
        MetaContextQuery.unpack,
        unpack_status_payload,
    ],
)
@given(data=st.binary(max_size=64))
def test_any_bytes_are_a_message_or_a_protocol_error(
    unpack: Callable[[bytes], object], data: bytes
) -> None:
    with suppress(ProtocolError):
        unpack(data)


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EPERM, NbdError.EPERM),
        (errno.EROFS, NbdError.EPERM),
        (errno.EIO, NbdError.EIO),
        (errno.ENOMEM, NbdError.ENOMEM),
        (errno.EINVAL, NbdError.EINVAL),
        (errno.ENOSPC, NbdError.ENOSPC),
        (errno.EDQUOT, NbdError.ENOSPC),
        (errno.EFBIG, NbdError.ENOSPC),
        (errno.EOVERFLOW, NbdError.EOVERFLOW),
        (errno.EOPNOTSUPP, NbdError.ENOTSUP),
        (errno.ESHUTDOWN, NbdError.ESHUTDOWN),
        (errno.ENXIO, NbdError.EINVAL),
        (0, NbdError.EINVAL),
    ],
)
def test_each_errno_has_an_error_on_the_wire(number: int, error: NbdError) -> None:
    assert nbd_error(number) is error


@given(text=st.text(max_size=30), limit=st.integers(0, 40))
def test_texts_are_cut_between_characters(text: str, limit: int) -> None:
    cut = truncated(text, limit)
    assert len(cut) <= limit
    assert text.encode("utf-8", "replace").startswith(cut)
    cut.decode()


def test_the_pool_keeps_no_more_than_its_limit() -> None:
    pool = BufferPool(2 * 65536)
    first = [pool.take(65536) for _ in range(3)]
    kept = {id(buffer.obj) for buffer in first[:2]}
    for buffer in first:
        pool.give_back(buffer)
    second = [pool.take(60_000 + number) for number in range(3)]
    assert [len(buffer) for buffer in second] == [60_000, 60_001, 60_002]
    assert {id(buffer.obj) for buffer in second} & {id(b.obj) for b in first} == kept


def test_scratch_memory_is_used_again_unless_it_is_kept() -> None:
    pool = BufferPool(0)
    first = pool.scratch(100)
    pool.end_batch()
    second = pool.scratch(100)
    assert second.obj is first.obj
    pool.keep_scratch()
    pool.end_batch()
    assert pool.scratch(100).obj is not first.obj


REQUESTS = st.builds(
    lambda magic, flags, command, offset, length, payload: (
        struct.pack(">IHHQQI", magic, flags, command, 1, offset, length) + payload
    ),
    st.sampled_from([0x25609513] * 9 + [0]),
    st.integers(0, 63),
    st.integers(0, 9),
    st.one_of(st.integers(0, 70_000), st.integers(0, 2**64 - 1)),
    st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1)),
    st.binary(max_size=300),
)
EXTENDED_REQUESTS = st.builds(
    lambda flags, command, offset, length, payload: (
        struct.pack(">IHHQQQ", 0x21E41C71, flags, command, 1, offset, length) + payload
    ),
    st.integers(0, 63),
    st.integers(0, 9),
    st.one_of(st.integers(0, 70_000), st.integers(0, 2**64 - 1)),
    st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1)),
    st.binary(max_size=300),
)


@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("style", list(HeaderStyle))
@given(data=st.data())
def test_any_bytes_are_requests_or_a_protocol_error(
    style: HeaderStyle, data: st.DataObject
) -> None:
    requests = EXTENDED_REQUESTS if style is HeaderStyle.EXTENDED else REQUESTS
    pieces = data.draw(st.lists(st.one_of(requests, st.binary(max_size=40)), max_size=8))

    async def main() -> None:
        disk = MemoryDisk(65536)
        both: dict[int, MetaContext] = {0: Allocation(disk), 1: Even()}
        contexts = {} if style is HeaderStyle.SIMPLE else both
        export = Export(name="", backend=disk, is_writable=True, contexts=tuple(contexts.values()))
        pool = BufferPool(0)
        session = Session(
            Chosen(export, style, contexts),
            pool=pool,
            budget=Budget(),
            flush=lambda: None,
            notify=lambda: None,
        )
        buffer = ReceiveBuffer(BufferPool(0), 65536)
        for piece in pieces:
            buffer.append(piece)
            try:
                session.consume(buffer, ALONE)
            except ProtocolError:
                return
            pool.end_batch()
        assert session.in_flight == 0

    asyncio.run(main())
