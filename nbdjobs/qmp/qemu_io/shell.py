# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Runs one line of qemu-io: `COMMANDS` is the table of all commands.

A request that is held, by a break point for example, would hold up the session that waits for
it: `aio_read` and `aio_write` do not wait, and what came of them is told with the answer to the
next command about the same node or device. `aio_flush` waits for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.errors import CommandError, NodeError
from nbdjobs.qmp.qemu_io import breaks, image, reads, writes
from nbdjobs.qmp.qemu_io.table import IoCommand
from nbdjobs.qmp.qemu_io.target import Target, find_target
from nbdjobs.qmp.qemu_io.words import RefusedError, Words


async def _help(command: IoCommand, target: Target, words: Words) -> str:
    if not words.operands:
        names = sorted({each.name for each in COMMANDS.values()})
        return "".join(COMMANDS[name].usage for name in names)
    (name,) = words.operands
    if name not in COMMANDS:
        return f"command {name} not found\n"
    return COMMANDS[name].usage


_HELP: Final = IoCommand(
    name="help",
    short_name="?",
    arguments="[command]",
    summary="help for one or all commands",
    at_most=1,
    run=_help,
)

COMMANDS: Final[Mapping[str, IoCommand]] = {
    name: command
    for group in (reads.COMMANDS, writes.COMMANDS, image.COMMANDS, breaks.COMMANDS, (_HELP,))
    for command in group
    for name in (command.name, command.short_name)
    if name
}


async def run_line(daemon: Daemon, name: str, line: str, *, is_device_id: bool = False) -> str:
    """Run a line and give what there is to tell, earlier requests first.

    Args:
        daemon: Where to find what is named.
        name: A named device or a node.
        line: The command and its words, with spaces between them.
        is_device_id: The name is the id of an export.

    Raises:
        CommandError: There is no such device or node.
    """
    target = find_target(daemon, name, is_device_id=is_device_id)
    text = await _run(target, [word for word in line.split(" ") if word])
    return daemon.side_requests.take_reports(name) + text


async def _run(target: Target, words: list[str]) -> str:
    if not words:
        return ""
    command = COMMANDS.get(words[0])
    if command is None:
        return f'command "{words[0]}" not found\n'
    try:
        return await command.execute(target, words[1:])
    except RefusedError as error:
        return str(error)
    except (CommandError, NodeError) as error:
        return f"{error}\n"
