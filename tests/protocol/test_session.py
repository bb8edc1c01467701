# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import errno
import random
import struct

import pytest

from nbdjobs.errors import NodeError
from nbdjobs.protocol.constants import Command, HeaderStyle, NbdError, ReplyType
from nbdjobs.protocol.constants import CommandFlag as Flag
from nbdjobs.protocol.turns import ALONE
from tests.protocol.client import Client
from tests.protocol.rig import BLOCK, SIZE, running

STYLES = pytest.mark.parametrize("style", list(HeaderStyle))
CHUNKED = pytest.mark.parametrize("style", [HeaderStyle.STRUCTURED, HeaderStyle.EXTENDED])
BOTH = ("base:allocation", "test:even")


@STYLES
@pytest.mark.parametrize("length", [1, 4096, 65536, 1_000_000])
def test_what_is_written_is_read(style: HeaderStyle, length: int) -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path, style=style)
            data = random.Random(length).randbytes(length)
            await client.write(77, data)
            assert await client.read(77, length) == data
            assert rig.disk.content[77 : 77 + length] == data
            await client.close()

    asyncio.run(main())


@STYLES
def test_the_largest_payload_goes_both_ways(style: HeaderStyle) -> None:
    async def main() -> None:
        size = 32 * 1024 * 1024
        async with running(size=size) as rig:
            client = await Client.attach(rig.path, style=style)
            data = random.Random(1).randbytes(4096) * (size // 4096)
            await client.write(0, data)
            assert await client.read(0, size) == data
            await client.close()

    asyncio.run(main())


@STYLES
@pytest.mark.parametrize(
    ("command", "flags", "call"),
    [
        (Command.FLUSH, 0, ("flush",)),
        (Command.FLUSH, Flag.FUA, ("flush",)),
        (Command.TRIM, 0, ("pdiscard", 512, 1024, False)),
        (Command.TRIM, Flag.FUA, ("pdiscard", 512, 1024, True)),
        (Command.CACHE, Flag.FUA, ("cache", 512, 1024)),
        (Command.WRITE_ZEROES, 0, ("pwrite_zeroes", 512, 1024, False, True, False)),
        (Command.WRITE_ZEROES, Flag.FUA, ("pwrite_zeroes", 512, 1024, True, True, False)),
        (Command.WRITE_ZEROES, Flag.NO_HOLE, ("pwrite_zeroes", 512, 1024, False, False, False)),
        (Command.WRITE_ZEROES, Flag.FAST_ZERO, ("pwrite_zeroes", 512, 1024, False, True, True)),
        (Command.READ, Flag.FUA, ("pread", 512, 1024)),
    ],
)
def test_each_command_and_flag_reaches_the_disk(
    style: HeaderStyle, command: Command, flags: int, call: tuple[object, ...]
) -> None:
    async def main() -> None:
        async with running() as rig:
            rig.disk.is_data_known = True
            client = await Client.attach(rig.path, style=style)
            assert await client.error(command, 512, 1024, flags=flags) == 0
            assert rig.disk.calls == [call]
            await client.close()

    asyncio.run(main())


@STYLES
@pytest.mark.parametrize("flags", [0, Flag.FUA])
def test_fua_of_a_write_reaches_the_disk(style: HeaderStyle, flags: int) -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path, style=style)
            await client.write(0, b"abc", flags=flags)
            assert rig.disk.calls == [("pwrite", 0, 3, bool(flags))]
            await client.close()

    asyncio.run(main())


def test_a_fast_zero_that_would_be_slow_is_refused_with_enotsup() -> None:
    async def main() -> None:
        async with running() as rig:
            rig.disk.can_zero_fast = False
            client = await Client.attach(rig.path)
            fast = await client.error(Command.WRITE_ZEROES, 0, 512, flags=Flag.FAST_ZERO)
            assert fast == NbdError.ENOTSUP
            assert await client.error(Command.WRITE_ZEROES, 0, 512) == 0
            await client.close()

    asyncio.run(main())


@STYLES
@pytest.mark.parametrize(
    ("command", "offset", "length", "flags", "payload", "error", "text"),
    [
        (Command.READ, SIZE, 4, 0, b"", NbdError.EINVAL, "past EOF"),
        (Command.READ, 2**63, 4, 0, b"", NbdError.EINVAL, "past EOF"),
        (Command.READ, 0, 2**25 + 1, 0, b"", NbdError.EINVAL, "larger than max len"),
        (Command.CACHE, 0, 2**25 + 1, 0, b"", NbdError.EINVAL, "larger than max len"),
        (Command.WRITE, SIZE - 1, 0, 0, b"ab", NbdError.ENOSPC, "past EOF"),
        (Command.WRITE_ZEROES, SIZE, 1, 0, b"", NbdError.ENOSPC, "past EOF"),
        (Command.TRIM, 1, SIZE, 0, b"", NbdError.EINVAL, "past EOF"),
        (Command.READ, 0, 1, Flag.NO_HOLE, b"", NbdError.EINVAL, "unsupported flags"),
        (Command.WRITE, 0, 0, 1 << 9, b"ab", NbdError.EINVAL, "command write (got 0x200)"),
        (Command.FLUSH, 0, 0, Flag.DF, b"", NbdError.EINVAL, "unsupported flags"),
        (Command.TRIM, 0, 1, Flag.FAST_ZERO, b"", NbdError.EINVAL, "unsupported flags"),
        (99, 0, 0, 0, b"", NbdError.EINVAL, "invalid request type (99)"),
        (Command.BLOCK_STATUS, 0, 1, 0, b"", NbdError.EINVAL, "not negotiated"),
    ],
)
def test_bad_requests_are_refused_and_the_connection_lives(
    style: HeaderStyle,
    command: int,
    offset: int,
    length: int,
    flags: int,
    payload: bytes,
    error: NbdError,
    text: str,
) -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path, style=style)
            chunks = await client.ask(command, offset, length, flags=flags, payload=payload)
            assert chunks[-1].error == error
            if style is not HeaderStyle.SIMPLE:
                assert text in chunks[-1].text
            assert rig.disk.calls == []
            await client.write(0, b"alive")
            await client.close()

    asyncio.run(main())


@STYLES
@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
def test_read_only_exports_refuse_changes(style: HeaderStyle, command: Command) -> None:
    async def main() -> None:
        async with running(is_writable=False) as rig:
            client = await Client.attach(rig.path, style=style)
            payload = bytes(512) if command is Command.WRITE else b""
            assert await client.error(command, 0, 512, payload=payload) == NbdError.EPERM
            assert await client.error(Command.FLUSH) == 0
            assert rig.disk.calls == [("flush",)]
            await client.close()

    asyncio.run(main())


@STYLES
@pytest.mark.parametrize(("offset", "length"), [(1, 512), (512, 511)])
def test_unaligned_requests_are_refused(style: HeaderStyle, offset: int, length: int) -> None:
    async def main() -> None:
        async with running(minimum_block_size=512) as rig:
            client = await Client.attach(rig.path, style=style)
            assert await client.error(Command.READ, offset, length) == NbdError.EINVAL
            assert await client.error(Command.READ, 512, 512) == 0
            await client.close()

    asyncio.run(main())


@STYLES
@pytest.mark.parametrize("flags", [0, Flag.FUA])
@pytest.mark.parametrize("offset", [0, SIZE])
def test_empty_requests_succeed_and_do_nothing(style: HeaderStyle, flags: int, offset: int) -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path, style=style)
            for command in (Command.READ, Command.WRITE, Command.TRIM, Command.CACHE, 6):
                assert await client.error(command, offset, 0, flags=flags) == 0
            assert rig.disk.calls == []
            await client.close()

    asyncio.run(main())


@STYLES
@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EROFS, NbdError.EPERM),
        (errno.EIO, NbdError.EIO),
        (errno.EDQUOT, NbdError.ENOSPC),
        (errno.ENODEV, NbdError.EINVAL),
    ],
)
def test_errors_of_the_disk_travel_with_text_and_offset(
    style: HeaderStyle, number: int, error: NbdError
) -> None:
    async def main() -> None:
        async with running() as rig:
            rig.disk.is_data_known = True
            client = await Client.attach(rig.path, style=style)
            rig.disk.failures["pread"] = NodeError(number, "the sector is bad", offset=1024)
            rig.disk.failures["flush"] = NodeError(number, "Ü" * 4096)
            chunk = (await client.ask(Command.READ, 512, 1024))[-1]
            assert chunk.error == error
            if style is not HeaderStyle.SIMPLE:
                assert chunk.kind is ReplyType.ERROR_OFFSET
                assert chunk.text == "the sector is bad"
                assert chunk.error_offset == 1024
            chunk = (await client.ask(Command.FLUSH))[-1]
            assert chunk.error == error
            if style is not HeaderStyle.SIMPLE:
                assert chunk.kind is ReplyType.ERROR
                assert chunk.text == "Ü" * 2048
            await client.close()

    asyncio.run(main())


@CHUNKED
@pytest.mark.parametrize("at", [0, 511, 1536, 4096])
def test_an_error_outside_the_request_has_no_offset(style: HeaderStyle, at: int) -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path, style=style)
            rig.disk.failures["pwrite"] = NodeError(errno.EIO, "not copied", offset=at)
            chunk = (await client.ask(Command.WRITE, 512, payload=bytes(1024)))[-1]
            assert chunk.kind is ReplyType.ERROR
            assert chunk.text == "not copied"
            await client.close()

    asyncio.run(main())


def test_an_unexpected_exception_is_an_io_error_for_one_request_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path)
            rig.disk.failures["flush"] = ZeroDivisionError()
            assert await client.error(Command.FLUSH) == NbdError.EIO
            await client.write(0, b"alive")
            await client.close()

    asyncio.run(main())
    assert "failed unexpectedly" in caplog.text


@CHUNKED
def test_holes_travel_as_holes(style: HeaderStyle) -> None:
    async def main() -> None:
        async with running() as rig:
            data = b"x" * BLOCK
            rig.disk.content[2 * BLOCK : 3 * BLOCK] = data
            client = await Client.attach(rig.path, style=style)
            chunks = await client.ask(Command.READ, 0, 5 * BLOCK)
            kinds = [chunk.kind for chunk in chunks]
            hole, data_kind = ReplyType.OFFSET_HOLE, ReplyType.OFFSET_DATA
            assert kinds == [hole, data_kind, hole]
            assert rig.disk.calls.count(("note_hole", 2 * BLOCK)) == 2
            assert await client.read(0, 5 * BLOCK) == bytes(2 * BLOCK) + data + bytes(2 * BLOCK)
            chunks = await client.ask(Command.READ, 0, 5 * BLOCK, flags=Flag.DF)
            assert [chunk.kind for chunk in chunks] == [data_kind]
            rig.disk.is_data_known = True
            chunks = await client.ask(Command.READ, 0, 5 * BLOCK)
            assert [chunk.kind for chunk in chunks] == [data_kind]
            await client.close()

    asyncio.run(main())


def test_df_needs_structured_replies() -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path, style=HeaderStyle.SIMPLE)
            assert await client.error(Command.READ, 0, 1, flags=Flag.DF) == NbdError.EINVAL
            await client.close()

    asyncio.run(main())


def test_a_very_fragmented_read_is_whole() -> None:
    async def main() -> None:
        async with running(size=4 * SIZE) as rig:
            for block in range(0, 4 * SIZE, 2 * BLOCK):
                rig.disk.content[block] = 1
            client = await Client.attach(rig.path)
            assert await client.read(0, 4 * SIZE) == rig.disk.content
            await client.close()

    asyncio.run(main())


def extents(payload: bytes, style: HeaderStyle) -> tuple[int, list[tuple[int, int]]]:
    if style is HeaderStyle.STRUCTURED:
        context_id, *numbers = struct.unpack(f">{len(payload) // 4}I", payload)
    else:
        context_id, count = struct.unpack_from(">II", payload)
        numbers = list(struct.unpack(f">{2 * count}Q", payload[8:]))
    return context_id, list(zip(numbers[::2], numbers[1::2], strict=True))


@CHUNKED
def test_block_status_tells_every_selected_context(style: HeaderStyle) -> None:
    async def main() -> None:
        async with running() as rig:
            rig.disk.content[BLOCK] = 1
            client = await Client.attach(rig.path, style=style, contexts=BOTH)
            chunks = await client.ask(Command.BLOCK_STATUS, 0, 3 * BLOCK)
            assert [extents(chunk.payload, style) for chunk in chunks] == [
                (0, [(BLOCK, 3), (BLOCK, 0), (BLOCK, 3)]),
                (1, [(3 * BLOCK, 7)]),
            ]
            chunks = await client.ask(Command.BLOCK_STATUS, 0, 3 * BLOCK, flags=Flag.REQ_ONE)
            assert extents(chunks[0].payload, style) == (0, [(BLOCK, 3)])
            assert await client.error(Command.BLOCK_STATUS, 0, 0) == NbdError.EINVAL
            assert await client.error(Command.BLOCK_STATUS, SIZE, 1) == NbdError.EINVAL
            await client.close()

    asyncio.run(main())


def test_block_status_with_payload_chooses_contexts() -> None:
    async def main() -> None:
        async with running() as rig:
            style = HeaderStyle.EXTENDED
            client = await Client.attach(rig.path, style=style, contexts=BOTH)
            payload = struct.pack(">QI", BLOCK, 1)
            chunks = await client.ask(Command.BLOCK_STATUS, 0, payload=payload)
            assert [extents(c.payload, style) for c in chunks] == [(1, [(BLOCK, 7)])]
            for bad in (
                struct.pack(">QI", BLOCK, 9),
                struct.pack(">QII", BLOCK, 1, 1),
                struct.pack(">Q", BLOCK),
                struct.pack(">QIB", BLOCK, 1, 0),
                struct.pack(">QI", 0, 1),
                struct.pack(">QI", SIZE + 1, 1),
            ):
                error = await client.error(Command.BLOCK_STATUS, 0, payload=bad)
                assert error == NbdError.EINVAL
            await client.close()

    asyncio.run(main())


def test_payloads_where_none_belong_are_consumed() -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path, style=HeaderStyle.EXTENDED)
            for command in (Command.READ, Command.FLUSH, Command.TRIM, 99):
                error = await client.error(command, 0, payload=b"what is this?")
                assert error == NbdError.EINVAL
            client.writer.write(struct.pack(">IHHQQQ", 0x21E41C71, 0, Command.WRITE, 0, 0, 512))
            assert (await client.reply())[-1].error == NbdError.EINVAL
            await client.write(0, b"alive")
            await client.close()

    asyncio.run(main())


def test_extended_lengths_exceed_32_bits() -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path, style=HeaderStyle.EXTENDED)
            chunk = (await client.ask(Command.TRIM, 0, 2**40))[-1]
            assert f"Len: {2**40}" in chunk.text
            await client.close()

    asyncio.run(main())


@STYLES
def test_replies_leave_in_the_order_of_completion(style: HeaderStyle) -> None:
    async def main() -> None:
        async with running() as rig:
            rig.disk.is_data_known = True
            client = await Client.attach(rig.path, style=style)
            gate = rig.disk.hold("pread")
            slow = client.send(Command.READ, 0, 10)
            await gate.reached()
            fast = client.send(Command.WRITE, 20, payload=b"quick")
            assert (await client.reply())[0].cookie == fast
            rig.disk.unhold("pread")
            assert (await client.reply())[0].cookie == slow
            await client.close()

    asyncio.run(main())


def test_a_payload_of_a_waiting_write_is_not_overwritten_by_later_ones() -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path)
            gate = rig.disk.hold("pwrite")
            parts = [bytes([number]) * 50_000 for number in range(1, 21)]
            for number, part in enumerate(parts):
                client.send(Command.WRITE, number * 50_000, payload=part)
            await gate.reached(20)
            rig.disk.unhold("pwrite")
            for _ in parts:
                assert not (await client.reply())[0].error
            assert rig.disk.content[: 20 * 50_000] == b"".join(parts)
            await client.close()

    asyncio.run(main())


def test_requests_in_flight_are_bounded() -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path)
            gate = rig.disk.hold("flush")
            count = ALONE.waiting + 50
            client.writer.write(b"".join(client.pack(Command.FLUSH) for _ in range(count)))
            await gate.reached(ALONE.waiting)
            other = await Client.attach(rig.path)
            await other.write(0, b"another client is not stopped")
            assert gate.waiting == ALONE.waiting
            rig.disk.unhold("flush")
            for _ in range(count):
                assert not (await client.reply())[0].error
            await client.close()
            await other.close()

    asyncio.run(main())


def test_bytes_one_by_one_are_requests_too() -> None:
    async def main() -> None:
        async with running() as rig:
            client = await Client.attach(rig.path)
            for byte in client.pack(Command.WRITE, 5, payload=b"slow"):
                client.writer.write(bytes([byte]))
                await client.writer.drain()
                await asyncio.sleep(0)
            assert not (await client.reply())[0].error
            assert rig.disk.content[5:9] == b"slow"
            await client.close()

    asyncio.run(main())


@STYLES
@pytest.mark.parametrize("seed", range(3))
def test_random_requests_against_a_model(style: HeaderStyle, seed: int) -> None:
    async def main() -> None:
        rng = random.Random(seed)
        model = bytearray(SIZE)
        async with running() as rig:
            client = await Client.attach(rig.path, style=style)
            for _ in range(150):
                offset = rng.randrange(SIZE)
                length = rng.randint(0, min(SIZE - offset, rng.choice([8, 5000, 300_000])))
                match rng.randrange(4):
                    case 0:
                        data = rng.randbytes(length)
                        await client.write(offset, data)
                        model[offset : offset + length] = data
                    case 1:
                        kind = rng.choice([Command.WRITE_ZEROES, Command.TRIM])
                        assert await client.error(kind, offset, length) == 0
                        model[offset : offset + length] = bytes(length)
                    case _:
                        content = await client.read(offset, length)
                        assert content == model[offset : offset + length]
            assert rig.disk.content == model
            await client.close()

    asyncio.run(main())
