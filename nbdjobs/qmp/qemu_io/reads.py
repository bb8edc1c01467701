# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`read`, `readv` and `aio_read`: read, compare with a pattern, show.

Source: behaviour of qemu-io 7.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Final

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes import permissions
from nbdjobs.qmp.qemu_io.report import dump_text, failure_text, transfer_text
from nbdjobs.qmp.qemu_io.table import IoCommand
from nbdjobs.qmp.qemu_io.target import Target
from nbdjobs.qmp.qemu_io.words import (
    MAX_BUFFER,
    RefusedError,
    Words,
    check_length,
    check_sector_aligned,
    parse_bytes,
    parse_lengths,
    parse_pattern,
)

MAX_DUMP: Final = 256 * 1024
"""Most bytes that are shown, as each takes four characters of the answer and more."""

_UNREAD: Final = b"\xab"
"""What is in the buffer before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """One read.

    Attributes:
        offset: First byte.
        length: Bytes.
        pattern: What each byte is compared with, if anything.
        checked: Where in the buffer that begins and ends.
        is_quiet: Say nothing of success.
        is_terse: Say it for programs.
        is_dumped: Show the content.
        failure: What a failure is called.
    """

    offset: int
    length: int
    pattern: int | None
    checked: tuple[int, int]
    is_quiet: bool
    is_terse: bool
    is_dumped: bool
    failure: str

    async def run(self, target: Target) -> str:
        """Do it and tell how it went."""
        buffer = memoryview(bytearray(_UNREAD) * self.length)
        try:
            async with target.opened(permissions.NONE) as device:
                begun = perf_counter()
                await device.pread(self.offset, buffer)
                duration_s = perf_counter() - begun
        except NodeError as error:
            return failure_text(f"{self.failure} failed", error)
        except CommandError as error:
            return f"{error}\n"
        text = self._check_pattern(buffer)
        if self.is_quiet:
            return text
        if self.is_dumped:
            text += dump_text(buffer, self.offset)
        return text + transfer_text(
            "read", self.offset, self.length, duration_s, is_terse=self.is_terse
        )

    def _check_pattern(self, buffer: memoryview) -> str:
        begin, end = self.checked
        if self.pattern is None or buffer[begin:end] == bytes([self.pattern]) * (end - begin):
            return ""
        return f"Pattern verification failed at offset {self.offset + begin}, {end - begin} bytes\n"


def _make_read(
    words: Words,
    offset: int,
    length: int,
    *,
    checked: tuple[int, int] | None = None,
    failure: str = "readv",
) -> _Read:
    if "v" in words and length > MAX_DUMP:
        raise RefusedError(f"-v shows at most {MAX_DUMP} bytes\n")
    return _Read(
        offset=offset,
        length=length,
        pattern=parse_pattern(words.options["P"]) if "P" in words else None,
        checked=(0, length) if checked is None else checked,
        is_quiet="q" in words,
        is_terse="C" in words,
        is_dumped="v" in words,
        failure=failure,
    )


async def _read(command: IoCommand, target: Target, words: Words) -> str:
    options = words.options
    start = parse_bytes(options["s"]) if "s" in words else 0
    checked = parse_bytes(options["l"]) if "l" in words else None
    command.check_operands(words, 2, 2)
    offset, length = (parse_bytes(text) for text in words.operands)
    check_length(length, words.operands[1], MAX_BUFFER)
    if "P" not in words and ("s" in words or "l" in words):
        raise RefusedError(command.usage)
    count = length - start if checked is None else checked
    if count < 0 or start + count > length:
        raise RefusedError("pattern verification range exceeds end of read data\n")
    read = _make_read(words, offset, length, checked=(start, start + count), failure="read")
    if "b" in words:
        check_sector_aligned("offset", offset)
        check_sector_aligned("count", length)
        raise RefusedError("read failed: Operation not supported\n")
    return await read.run(target)


async def _readv(command: IoCommand, target: Target, words: Words) -> str:
    command.check_operands(words, 2)
    offset, length = parse_bytes(words.operands[0]), parse_lengths(words.operands[1:])
    return await _make_read(words, offset, length).run(target)


async def _aio_read(command: IoCommand, target: Target, words: Words) -> str:
    if "i" in words:
        if target.device is not None:
            target.device.accounting.read.invalid += 1
        return "injecting invalid read request\n"
    command.check_operands(words, 2)
    offset, length = parse_bytes(words.operands[0]), parse_lengths(words.operands[1:])
    target.begin(length, _make_read(words, offset, length).run(target))
    return ""


COMMANDS: Final = (
    IoCommand(
        name="read",
        short_name="r",
        arguments="[-abCqv] [-P pattern [-s off] [-l len]] off len",
        summary="reads a number of bytes at a specified offset",
        letters="bCl:pP:qs:v",
        at_least=2,
        at_most=None,
        run=_read,
    ),
    IoCommand(
        name="readv",
        arguments="[-Cqv] [-P pattern] off len [len..]",
        summary="reads a number of bytes at a specified offset",
        letters="CP:qv",
        at_least=2,
        at_most=None,
        run=_readv,
    ),
    IoCommand(
        name="aio_read",
        arguments="[-Ciqv] [-P pattern] off len [len..]",
        summary="asynchronously reads a number of bytes",
        letters="CP:iqv",
        at_least=2,
        at_most=None,
        run=_aio_read,
    ),
)
