# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Sets a daemon up, one command line option after the other."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from nbdjobs.cli.daemon_chardev import read_chardev
from nbdjobs.cli.daemon_options import Step
from nbdjobs.cli.daemon_trace import check_trace
from nbdjobs.daemon.chardev_socket import SocketChardev
from nbdjobs.daemon.chardevs import KINDS
from nbdjobs.daemon.daemon import Daemon
from nbdjobs.daemon.exports import BlockExportOptions, NbdServerOptions
from nbdjobs.daemon.object_options import ObjectOptions
from nbdjobs.errors import CommandError
from nbdjobs.nodes.graph import is_well_formed_id
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.qapi.keyval import parse_option
from nbdjobs.qapi.visitor import visit
from nbdjobs.qmp.server import QmpServer


class MonitorMode(StrEnum):
    """What is spoken on a monitor."""

    READLINE = "readline"
    CONTROL = "control"


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorOptions:
    """The value of `--monitor` (QAPI `MonitorOptions`)."""

    id: str | None = None
    mode: MonitorMode | None = None
    pretty: bool = False
    chardev: str


class Setup:
    """Applies options to a daemon.

    Args:
        daemon: What is set up.
        monitors: Serves QMP.
        warn: Takes warnings for the user.
    """

    def __init__(
        self, daemon: Daemon, monitors: QmpServer, warn: Callable[[str], None] | None = None
    ):
        self._daemon = daemon
        self._monitors = monitors
        self._warn = warn or _warn_on_stderr
        self._monitor_ids: set[str] = set()
        self._appliers: Final[Mapping[str, Callable[[str], Awaitable[None]]]] = {
            "blockdev": self._blockdev,
            "chardev": self._chardev,
            "export": self._export,
            "monitor": self._monitor,
            "nbd-server": self._nbd_server,
            "object": self._object,
            "trace": self._trace,
        }
        self._typed = ""

    async def apply(self, step: Step) -> None:
        """Apply one option.

        Raises:
            CommandError: It is refused.
        """
        self._typed = step.typed
        await self._appliers[step.option](step.text)

    async def _blockdev(self, text: str) -> None:
        value, is_keyval = parse_option(text, implied_key="driver")
        await self._daemon.blockdev_add(visit(BlockdevOptions, value, keyval=is_keyval))

    async def _export(self, text: str) -> None:
        value, is_keyval = parse_option(text, implied_key="type")
        await self._daemon.exports.add(visit(BlockExportOptions, value, keyval=is_keyval))

    async def _nbd_server(self, text: str) -> None:
        value, is_keyval = parse_option(text)
        options = visit(NbdServerOptions, value, keyval=is_keyval)
        await self._daemon.exports.start_server(options)

    async def _object(self, text: str) -> None:
        value, is_keyval = parse_option(text, implied_key="qom-type")
        self._daemon.objects.add(visit(ObjectOptions, value, keyval=is_keyval))

    async def _trace(self, text: str) -> None:
        for warning in check_trace(text, self._typed):
            self._warn(warning)

    async def _chardev(self, text: str) -> None:
        options = read_chardev(text, self._warn)
        if not is_well_formed_id(options.id):
            raise CommandError("Parameter 'id' expects an identifier")
        if options.backend not in KINDS:
            raise CommandError(f"'{options.backend}' is not a valid char driver name")
        await self._daemon.chardevs.add(options.id, options.as_backend())

    async def _monitor(self, text: str) -> None:
        value, is_keyval = parse_option(text, implied_key="chardev")
        options = visit(MonitorOptions, value, keyval=is_keyval)
        if options.mode is MonitorMode.READLINE:
            raise CommandError("Only QMP is supported")
        chardev = self._daemon.chardevs.find(options.chardev)
        if chardev is None:
            raise CommandError(f'chardev "{options.chardev}" not found')
        if chardev.is_in_use:
            raise CommandError(f"Device '{options.chardev}' is in use")
        if options.id is not None and options.id in self._monitor_ids:
            raise CommandError(f"Duplicate ID '{options.id}' for monitor")
        if not isinstance(chardev, SocketChardev):
            raise CommandError(f"Device '{chardev.name}' is no socket, which a monitor needs")
        await self._monitors.attach(chardev, pretty=options.pretty)
        if options.id is not None:
            self._monitor_ids.add(options.id)


def _warn_on_stderr(text: str) -> None:
    print(f"nbdjobs: {text}", file=sys.stderr)
