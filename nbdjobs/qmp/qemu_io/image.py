# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`length`, `truncate`, `map`, `alloc`, `flush` and `aio_flush`: about the image as a whole.

Source: behaviour of qemu-io 7.2.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from nbdjobs.errors import NodeError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.config import SECTOR
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.status import Status
from nbdjobs.qmp.qemu_io.report import failure_text, size_text
from nbdjobs.qmp.qemu_io.table import IoCommand
from nbdjobs.qmp.qemu_io.target import Target
from nbdjobs.qmp.qemu_io.words import RefusedError, Words, parse_bytes

MAX_RUNS: Final = 10_000
"""Most lines of a map: a much fragmented image would fill the memory with text."""

_PREALLOCATION: Final = frozenset({"off", "metadata", "falloc", "full"})
_ALLOCATED: Final = int(Status.ALLOCATED)


async def _length(command: IoCommand, target: Target, words: Words) -> str:
    return f"{size_text(target.node.size)}\n"


async def _truncate(command: IoCommand, target: Target, words: Words) -> str:
    mode = words.options.get("m", "off")
    if mode not in _PREALLOCATION:
        raise RefusedError(f"Invalid preallocation mode '{mode}'\n")
    command.check_operands(words, 1)
    size = parse_bytes(words.operands[0])
    if mode != "off":
        raise RefusedError(f"Unsupported preallocation mode '{mode}'\n")
    async with (
        target.opened(Permission.WRITE | Permission.RESIZE) as device,
        target.daemon.graph.drained(device.node),
    ):
        await device.node.truncate(size)
    return ""


async def _flush(command: IoCommand, target: Target, words: Words) -> str:
    try:
        async with target.opened(permissions.NONE) as device:
            await device.flush()
    except NodeError as error:
        return failure_text("flush failed", error)
    return ""


async def _aio_flush(command: IoCommand, target: Target, words: Words) -> str:
    await target.settled()
    return ""


async def _runs(device: Device, offset: int, end: int) -> AsyncIterator[tuple[int, int, bool]]:
    """Where content is the node's own and where not: begin, end, which; neighbours differ."""
    begin = offset
    was_allocated: bool | None = None
    while offset < end:
        length, status = await device.block_status(offset, end - offset)
        is_allocated = int(status) & _ALLOCATED != 0
        if was_allocated not in (None, is_allocated):
            yield begin, offset, not is_allocated
            begin = offset
        was_allocated = is_allocated
        offset += length
    if was_allocated is not None:
        yield begin, offset, was_allocated


async def _map(command: IoCommand, target: Target, words: Words) -> str:
    lines: list[str] = []
    async with target.opened(permissions.NONE) as device:
        try:
            async for begin, end, is_allocated in _runs(device, 0, device.size):
                if len(lines) == MAX_RUNS:
                    lines.append(f"only the first {MAX_RUNS} areas are shown\n")
                    break
                length = end - begin
                lines.append(
                    f"{size_text(length)} (0x{length:x}) bytes"
                    f" {'    allocated' if is_allocated else 'not allocated'}"
                    f" at offset {size_text(begin)} (0x{begin:x})\n"
                )
        except NodeError as error:
            lines.append(failure_text("Failed to get allocation status", error))
    return "".join(lines) or "Unexpected end of image\n"


async def _alloc(command: IoCommand, target: Target, words: Words) -> str:
    offset = parse_bytes(words.operands[0])
    length = parse_bytes(words.operands[1]) if len(words.operands) > 1 else SECTOR
    async with target.opened(permissions.NONE) as device:
        end = min(offset + length, device.size)
        length = max(end - offset, 0)
        try:
            allocated = 0
            async for begin, stop, is_allocated in _runs(device, offset, end):
                allocated += stop - begin if is_allocated else 0
        except NodeError as error:
            return failure_text("is_allocated failed", error)
    return f"{allocated}/{length} bytes allocated at offset {size_text(offset)}\n"


COMMANDS: Final = (
    IoCommand(
        name="length",
        short_name="l",
        summary="gets the length of the current file",
        run=_length,
    ),
    IoCommand(
        name="truncate",
        short_name="t",
        arguments="[-m prealloc_mode] off",
        summary="truncates the current file at the given offset",
        letters="m:",
        at_least=1,
        at_most=3,
        run=_truncate,
    ),
    IoCommand(name="map", summary="prints the allocated areas of a file", run=_map),
    IoCommand(
        name="alloc",
        short_name="a",
        arguments="offset [count]",
        summary="checks if offset is allocated in the file",
        at_least=1,
        at_most=2,
        run=_alloc,
    ),
    IoCommand(
        name="flush",
        short_name="f",
        summary="flush all in-core file state to disk",
        run=_flush,
    ),
    IoCommand(
        name="aio_flush",
        summary="completes all outstanding aio requests",
        run=_aio_flush,
    ),
)
