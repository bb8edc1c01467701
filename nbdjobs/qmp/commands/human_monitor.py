# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The command that runs a line of the human monitor.

Source: QEMU qapi/misc.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.errors import CommandError
from nbdjobs.qmp.commands.human.monitor import run_monitor_line
from nbdjobs.qmp.registry import command


@dataclass(frozen=True, slots=True, kw_only=True)
class HumanMonitorCommand:
    """Arguments of human-monitor-command.

    Attributes:
        command_line: What to run.
        cpu_index: The processor meant; clients such as qmp-shell always name the first.
    """

    command_line: str
    cpu_index: int = 0


MAX_LINE: Final = 64 * 1024
"""Longest line in characters: its words take many times the memory that it takes itself."""


@command("human-monitor-command", features=("savevm-monitor-nodes",))
async def human_monitor_command(daemon: Daemon, arguments: HumanMonitorCommand) -> str:
    """Run a line, and answer with all that the monitor would print."""
    if arguments.cpu_index:
        raise CommandError("Parameter 'cpu-index' expects a CPU number")
    if len(arguments.command_line) > MAX_LINE:
        raise CommandError(f"Parameter 'command-line' has more than {MAX_LINE} characters")
    return await run_monitor_line(daemon, arguments.command_line)
