# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`write`, `writev`, `aio_write` and `discard`.

Source: behaviour of qemu-io 7.2.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Final

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.permissions import Permission
from nbdjobs.qmp.qemu_io.report import failure_text, transfer_text
from nbdjobs.qmp.qemu_io.table import IoCommand
from nbdjobs.qmp.qemu_io.target import Target
from nbdjobs.qmp.qemu_io.words import (
    MAX_BUFFER,
    MAX_REQUEST,
    RefusedError,
    Words,
    check_length,
    check_sector_aligned,
    parse_bytes,
    parse_lengths,
    parse_pattern,
)

_PATTERN: Final = 0xCD
"""What is written unless something else is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """One request that changes content.

    Attributes:
        offset: First byte.
        length: Bytes.
        request: Does it through a device.
        verb: What success is called.
        failure: What a failure is called.
        is_quiet: Say nothing of success.
        is_terse: Say it for programs.
    """

    offset: int
    length: int
    request: Callable[[Device], Awaitable[None]]
    verb: str = "wrote"
    failure: str
    is_quiet: bool
    is_terse: bool

    async def run(self, target: Target) -> str:
        """Do it and tell how it went."""
        try:
            async with target.opened(Permission.WRITE) as device:
                begun = perf_counter()
                await self.request(device)
                duration_s = perf_counter() - begun
        except NodeError as error:
            return failure_text(f"{self.failure} failed", error)
        except CommandError as error:
            return f"{error}\n"
        if self.is_quiet:
            return ""
        return transfer_text(
            self.verb, self.offset, self.length, duration_s, is_terse=self.is_terse
        )


def _make_write(words: Words, offset: int, data: bytes, failure: str) -> _Change:
    return _Change(
        offset=offset,
        length=len(data),
        request=lambda device: device.pwrite(offset, memoryview(data), fua="f" in words),
        failure=failure,
        is_quiet="q" in words,
        is_terse="C" in words,
    )


def _make_zeroing(words: Words, offset: int, length: int, failure: str) -> _Change:
    return _Change(
        offset=offset,
        length=length,
        request=lambda device: device.pwrite_zeroes(
            offset, length, fua="f" in words, may_unmap="u" in words, fast_only="n" in words
        ),
        failure=failure,
        is_quiet="q" in words,
        is_terse="C" in words,
    )


def _pattern_of(words: Words) -> int:
    return parse_pattern(words.options["P"]) if "P" in words else _PATTERN


def _check_write_options(words: Words) -> None:
    """Refuse options that exclude each other, in the order in which qemu-io does."""
    if "b" in words and "z" in words:
        raise RefusedError("-b and -z cannot be specified at the same time\n")
    if "f" in words and ("b" in words or "c" in words):
        raise RefusedError("-f and -b or -c cannot be specified at the same time\n")
    for letter in ("n", "u"):
        if letter in words and "z" not in words:
            raise RefusedError(f"-{letter} requires -z to be specified\n")
    if sum(letter in words for letter in ("z", "P", "s")) > 1:
        raise RefusedError("Only one of -z, -P, and -s can be specified at the same time\n")


async def _write(command: IoCommand, target: Target, words: Words) -> str:
    pattern = _pattern_of(words)
    command.check_operands(words, 2, 2)
    _check_write_options(words)
    offset, length = (parse_bytes(text) for text in words.operands)
    maximum = MAX_REQUEST if "z" in words else MAX_BUFFER
    if "n" not in words:
        check_length(length, words.operands[1], maximum, " without -n")
    if "b" in words or "c" in words:
        check_sector_aligned("offset", offset)
        check_sector_aligned("count", length)
        raise RefusedError("write failed: Operation not supported\n")
    if "z" in words:
        return await _make_zeroing(words, offset, length, "write").run(target)
    if "s" in words:
        data = await asyncio.to_thread(_from_file, words.options["s"], length)
    else:
        data = bytes([pattern]) * length
    return await _make_write(words, offset, data, "write").run(target)


def _from_file(path: str, length: int) -> bytes:
    """As many bytes as are wanted, from a file that is repeated as often as it takes."""
    try:
        # A pipe without a writer would hold up the thread for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
            content = file.read(length) if is_file else b""
    except OSError as error:
        raise RefusedError(f"{path}: {error.strerror}\n") from error
    if not content:
        raise RefusedError(f"{path}: file is empty\n")
    return (content * (length // len(content) + 1))[:length]


async def _writev(command: IoCommand, target: Target, words: Words) -> str:
    pattern = _pattern_of(words)
    command.check_operands(words, 2)
    offset, length = parse_bytes(words.operands[0]), parse_lengths(words.operands[1:])
    return await _make_write(words, offset, bytes([pattern]) * length, "writev").run(target)


async def _aio_write(command: IoCommand, target: Target, words: Words) -> str:
    pattern = _pattern_of(words)
    if "i" in words:
        if target.device is not None:
            target.device.accounting.write.invalid += 1
        return "injecting invalid write request\n"
    command.check_operands(words, 2)
    if "z" in words and len(words.operands) > 2:
        raise RefusedError("-z supports only a single length parameter\n")
    if "u" in words and "z" not in words:
        raise RefusedError("-u requires -z to be specified\n")
    offset = parse_bytes(words.operands[0])
    if "z" in words:
        length = parse_bytes(words.operands[1])
        change = _make_zeroing(words, offset, length, "aio_write")
        target.begin(0, change.run(target))
        return ""
    data = bytes([pattern]) * parse_lengths(words.operands[1:])
    target.begin(len(data), _make_write(words, offset, data, "aio_write").run(target))
    return ""


async def _discard(command: IoCommand, target: Target, words: Words) -> str:
    command.check_operands(words, 2, 2)
    offset, length = (parse_bytes(text) for text in words.operands)
    check_length(length, words.operands[1], MAX_REQUEST)
    change = _Change(
        offset=offset,
        length=length,
        request=lambda device: device.pdiscard(offset, length),
        verb="discard",
        failure="discard",
        is_quiet="q" in words,
        is_terse="C" in words,
    )
    return await change.run(target)


COMMANDS: Final = (
    IoCommand(
        name="write",
        short_name="w",
        arguments="[-bcCfnquz] [-P pattern | -s source_file] off len",
        summary="writes a number of bytes at a specified offset",
        letters="bcCfnpP:qs:uz",
        at_least=2,
        at_most=None,
        run=_write,
    ),
    IoCommand(
        name="writev",
        arguments="[-Cfq] [-P pattern] off len [len..]",
        summary="writes a number of bytes at a specified offset",
        letters="CfP:q",
        at_least=2,
        at_most=None,
        run=_writev,
    ),
    IoCommand(
        name="aio_write",
        arguments="[-Cfiquz] [-P pattern] off len [len..]",
        summary="asynchronously writes a number of bytes",
        letters="CfiP:quz",
        at_least=2,
        at_most=None,
        run=_aio_write,
    ),
    IoCommand(
        name="discard",
        short_name="d",
        arguments="[-Cq] off len",
        summary="discards a number of bytes at a specified offset",
        letters="Cq",
        at_least=2,
        at_most=None,
        run=_discard,
    ),
)
