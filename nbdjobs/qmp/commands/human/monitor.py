# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Runs one line of the human monitor: a table of commands, and one of `info` commands.

Source: QEMU's `hmp-commands.hx` for the lines; behaviour of QEMU 7.2's monitor.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.errors import CommandError
from nbdjobs.qmp.commands.human.info import (
    info_block,
    info_block_jobs,
    info_blockstats,
    info_status,
)
from nbdjobs.qmp.commands.human.line import Argument, Flag, LineError, Word, parse_arguments
from nbdjobs.qmp.qemu_io.shell import run_line

_NAME: Final = re.compile(r"\s*([^\s/]*)", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorCommand:
    """A command of the human monitor.

    Attributes:
        parameters: How help writes what follows the name.
        summary: What it does, in a few words.
        arguments: What follows the name.
        run: Does it; the answer is what the user is told.
    """

    parameters: str = ""
    summary: str
    arguments: tuple[Argument, ...] = ()
    run: Callable[[Daemon, Mapping[str, str]], Awaitable[str]]

    def help_line(self, name: str) -> str:
        """Its line in the help, with the name that it has there."""
        return f"{name} {self.parameters} -- {self.summary}\n"


async def _qemu_io(daemon: Daemon, arguments: Mapping[str, str]) -> str:
    return await run_line(
        daemon, arguments["device"], arguments["command"], is_device_id="d" in arguments
    )


async def _help(daemon: Daemon, arguments: Mapping[str, str]) -> str:
    return help_text(" ".join(arguments.values()))


async def _info(daemon: Daemon, arguments: Mapping[str, str]) -> str:
    return help_text("info")


INFO: Final[Mapping[str, MonitorCommand]] = {
    "block": MonitorCommand(
        parameters="[-n] [-v] [device]",
        summary="devices, or nodes with -n; in detail with -v",
        arguments=(Flag("n"), Flag("v"), Word("device")),
        run=info_block,
    ),
    "block-jobs": MonitorCommand(summary="how far jobs are", run=info_block_jobs),
    "blockstats": MonitorCommand(summary="what was done to each device", run=info_blockstats),
    "status": MonitorCommand(summary="whether clients are served", run=info_status),
}

COMMANDS: Final[Mapping[str, MonitorCommand]] = {
    "help": MonitorCommand(
        parameters="[cmd]",
        summary="this list, or the line of one command",
        arguments=(Word("name"), Word("topic")),
        run=_help,
    ),
    "info": MonitorCommand(parameters="[subcommand]", summary="shows what there is", run=_info),
    "qemu-io": MonitorCommand(
        parameters='[-d] [device] "[command]"',
        summary="a command of qemu-io for a device or node, or with -d for an export",
        arguments=(
            Flag("d"),
            Word("device", "block device name"),
            Word("command", "string"),
        ),
        run=_qemu_io,
    ),
}
_SHORT_NAMES: Final[Mapping[str, str]] = {"?": "help"}


def help_text(topic: str) -> str:
    """The help for nothing in particular, for `info`, or for one command."""
    if not topic:
        return "".join(command.help_line(name) for name, command in COMMANDS.items())
    name, _, info_name = topic.partition(" ")
    if topic == "info":
        return "".join(command.help_line(f"info {name}") for name, command in INFO.items())
    found = INFO.get(info_name) if name == "info" else COMMANDS.get(_SHORT_NAMES.get(name, name))
    return f"unknown command: '{topic}'\n" if found is None else found.help_line(topic)


async def run_monitor_line(daemon: Daemon, line: str) -> str:
    """Run a line and give all that there is to tell; complaints are texts, too."""
    name, rest = _take_name(line)
    if not name:
        return ""
    name = _SHORT_NAMES.get(name, name)
    full_name, table = name, COMMANDS
    if name == "info" and rest.strip():
        name, rest = _take_name(rest)
        full_name, table = f"info {name}", INFO
    command = table.get(name)
    if command is None:
        return f"unknown command: '{full_name}'\n"
    try:
        return await command.run(daemon, parse_arguments(rest, command.arguments))
    except LineError as error:
        # The complaint itself is the last line; what was wrong with a text is told before.
        *before, complaint = str(error).splitlines(keepends=True)
        return "".join(before) + f'{name}: {complaint}Try "help {full_name}" for more information\n'
    except CommandError as error:
        return f"Error: {error}\n"


def _take_name(text: str) -> tuple[str, str]:
    found = _NAME.match(text)
    assert found is not None, "it matches anything"
    return found[1], text[found.end() :]
