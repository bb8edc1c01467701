# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Sets a daemon up, one command line option after the other."""

from __future__ import annotations

import re
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from nbdjobs.cli.daemon_options import Step
from nbdjobs.cli.daemon_trace import check_trace
from nbdjobs.daemon.daemon import Daemon
from nbdjobs.daemon.exports import BlockExportOptions, NbdServerOptions
from nbdjobs.daemon.object_options import ObjectOptions
from nbdjobs.errors import CommandError
from nbdjobs.nodes.graph import is_well_formed_id
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.qapi.keyval import parse_keyval, parse_option
from nbdjobs.qapi.visitor import visit
from nbdjobs.qmp.chardev import SocketChardev
from nbdjobs.qmp.server import QmpServer


@dataclass(frozen=True, slots=True, kw_only=True)
class ChardevOptions:
    """The value of `--chardev`."""

    backend: str
    id: str
    path: str | None = None
    host: str | None = None
    port: str | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    server: bool = False
    wait: bool | None = None


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
        self._chardevs: dict[str, SocketChardev] = {}
        self._chardevs_in_use: set[str] = set()
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
        options = self._read_chardev(text)
        if not is_well_formed_id(options.id):
            raise CommandError("Parameter 'id' expects an identifier")
        if options.id in self._chardevs:
            raise CommandError(f"Chardev with id '{options.id}' already exists")
        if options.backend != "socket":
            raise CommandError(f"'{options.backend}' is not a valid char driver name")
        if options.path is None and options.host is None:
            raise CommandError("chardev: socket: neither path nor host given")
        if options.path is None and options.port is None:
            raise CommandError("chardev: socket: no port given")
        if options.wait is not None and not options.server:
            raise CommandError("'wait' option is incompatible with socket in client connect mode")
        self._chardevs[options.id] = SocketChardev(
            path=options.path,
            host=options.host,
            port=options.port,
            ipv4=options.ipv4,
            ipv6=options.ipv6,
            is_server=options.server,
            wait=options.server and options.wait is not False,
        )

    def _read_chardev(self, text: str) -> ChardevOptions:
        value = parse_keyval(self._with_long_booleans(text), implied_key="backend")
        if isinstance(value, dict) and "id" not in value:
            raise CommandError("chardev: no id specified")
        if isinstance(value, dict) and "backend" not in value:
            raise CommandError(f'chardev: "{value["id"]}" missing backend')
        try:
            return visit(ChardevOptions, value, keyval=True)
        except CommandError as error:
            # This option is older than the others, and so is its wording.
            unknown = re.fullmatch(r"Parameter '(.*)' is unexpected", error.description)
            if unknown is None:
                raise
            raise CommandError(f"Invalid parameter '{unknown[1]}'") from error

    def _with_long_booleans(self, text: str) -> str:
        """Write `server,nowait` as `server=on,wait=off`, as old command lines expect."""
        first, *others = re.split(r"(?<!,),(?!,)", text)
        return ",".join([first, *(self._with_long_boolean(part, text) for part in others)])

    def _with_long_boolean(self, part: str, text: str) -> str:
        if "=" in part or not part:
            return part
        long = f"{part[2:]}=off" if part.startswith("no") else f"{part}=on"
        self._warn(
            f"--chardev {text}: warning: short-form boolean option '{part}' deprecated\n"
            f"Please use {long} instead"
        )
        return long

    async def _monitor(self, text: str) -> None:
        value, is_keyval = parse_option(text, implied_key="chardev")
        options = visit(MonitorOptions, value, keyval=is_keyval)
        if options.mode is MonitorMode.READLINE:
            raise CommandError("Only QMP is supported")
        chardev = self._chardevs.get(options.chardev)
        if chardev is None:
            raise CommandError(f'chardev "{options.chardev}" not found')
        if options.chardev in self._chardevs_in_use:
            raise CommandError(f"Device '{options.chardev}' is in use")
        if options.id is not None and options.id in self._monitor_ids:
            raise CommandError(f"Duplicate ID '{options.id}' for monitor")
        await self._monitors.open(chardev, pretty=options.pretty)
        self._chardevs_in_use.add(options.chardev)
        if options.id is not None:
            self._monitor_ids.add(options.id)


def _warn_on_stderr(text: str) -> None:
    print(f"nbdjobs: {text}", file=sys.stderr)
