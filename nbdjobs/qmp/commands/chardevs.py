# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Commands about character devices.

Source: QEMU qapi/char.json.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from nbdjobs.daemon.chardev import RingbufChardev
from nbdjobs.daemon.chardevs import KINDS, ChardevBackend
from nbdjobs.daemon.daemon import Daemon
from nbdjobs.errors import CommandError
from nbdjobs.qmp.registry import command

_BASE64: Final = re.compile(r"[A-Za-z0-9+/=\n]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChardevInfo:
    """A character device."""

    label: str
    filename: str
    frontend_open: bool


@command("query-chardev")
def query_chardev(daemon: Daemon) -> list[ChardevInfo]:
    """All character devices."""
    return [
        ChardevInfo(label=each.name, filename=each.filename, frontend_open=each.is_in_use)
        for each in daemon.chardevs
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChardevBackendInfo:
    """A kind of character devices."""

    name: str


@command("query-chardev-backends")
def query_chardev_backends(daemon: Daemon) -> list[ChardevBackendInfo]:
    """The kinds that can be made."""
    return [ChardevBackendInfo(name=name) for name in KINDS]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChardevAdd:
    """Arguments of chardev-add and chardev-change."""

    id: str
    backend: ChardevBackend


@dataclass(frozen=True, slots=True, kw_only=True)
class ChardevReturn:
    """What is to be known of a new character device: nothing, as none is a terminal."""

    pty: str | None = None


@command("chardev-add")
async def chardev_add(daemon: Daemon, arguments: ChardevAdd) -> ChardevReturn:
    """Make a character device."""
    try:
        await daemon.chardevs.add(arguments.id, arguments.backend)
    except CommandError as error:
        raise _not_added(arguments.id, error) from error
    return ChardevReturn()


@command("chardev-change")
async def chardev_change(daemon: Daemon, arguments: ChardevAdd) -> ChardevReturn:
    """Put another character device in the place of an unused one."""
    daemon.chardevs.check_changeable(arguments.id)
    try:
        await daemon.chardevs.change(arguments.id, arguments.backend)
    except CommandError as error:
        raise _not_added(arguments.id, error) from error
    return ChardevReturn()


def _not_added(name: str, error: CommandError) -> CommandError:
    if error.description.endswith("already exists"):
        return error
    return CommandError(f"Failed to add chardev '{name}': {error.description}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChardevId:
    """Arguments of commands about one character device."""

    id: str


@command("chardev-remove")
async def chardev_remove(daemon: Daemon, arguments: ChardevId) -> None:
    """Close a character device that nobody uses."""
    await daemon.chardevs.remove(arguments.id)


@command("chardev-send-break")
def chardev_send_break(daemon: Daemon, arguments: ChardevId) -> None:
    """Send a break, which means something to serial lines only."""
    daemon.chardevs.existing(arguments.id)


class DataFormat(StrEnum):
    """How bytes are written in JSON."""

    UTF8 = "utf8"
    BASE64 = "base64"


@dataclass(frozen=True, slots=True, kw_only=True)
class RingbufWrite:
    """Arguments of ringbuf-write."""

    device: str
    data: str
    format: DataFormat | None = None


@command("ringbuf-write")
def ringbuf_write(daemon: Daemon, arguments: RingbufWrite) -> None:
    """Add to what a ring buffer holds."""
    ringbuf = _ringbuf(daemon, arguments.device)
    if arguments.format is not DataFormat.BASE64:
        ringbuf.write(arguments.data.encode())
        return
    if _BASE64.fullmatch(arguments.data) is None:
        raise CommandError("Base64 data contains invalid characters")
    digits = arguments.data.replace("\n", "").partition("=")[0]
    digits = digits[: len(digits) - (len(digits) % 4 == 1)]
    ringbuf.write(base64.b64decode(digits + "=" * (-len(digits) % 4)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RingbufRead:
    """Arguments of ringbuf-read; the size is in bytes."""

    device: str
    size: int
    format: DataFormat | None = None


@command("ringbuf-read")
def ringbuf_read(daemon: Daemon, arguments: RingbufRead) -> str:
    """Take the oldest bytes out of a ring buffer; what is no text is replaced."""
    ringbuf = _ringbuf(daemon, arguments.device)
    if arguments.size <= 0:
        raise CommandError("size must be greater than zero")
    data = ringbuf.read(arguments.size)
    if arguments.format is DataFormat.BASE64:
        return base64.b64encode(data).decode()
    return data.decode(errors="replace")


def _ringbuf(daemon: Daemon, name: str) -> RingbufChardev:
    found = daemon.chardevs.find(name)
    if found is None:
        raise CommandError(f"Device '{name}' not found")
    if not isinstance(found, RingbufChardev):
        raise CommandError(f"{name} is not a ringbuf device")
    return found
