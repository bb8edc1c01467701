# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The value of `--chardev`, which is older than other options: its form and words are its own.

Source: QEMU docs about `-chardev`; texts of qemu-storage-daemon 7.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from nbdjobs.daemon.addresses import (
    InetSocketAddressBase,
    LegacyInetAddress,
    LegacyUnixAddress,
    SocketAddressLegacy,
    UnixSocketAddressBase,
)
from nbdjobs.daemon.chardevs import (
    ChardevBackend,
    ChardevCommon,
    ChardevFile,
    ChardevRingbuf,
    ChardevSocket,
    FileBackend,
    NullBackend,
    RingbufBackend,
    SocketBackend,
)
from nbdjobs.errors import CommandError
from nbdjobs.qapi.keyval import parse_keyval
from nbdjobs.qapi.types import Size
from nbdjobs.qapi.visitor import visit


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
    abstract: bool | None = None
    tight: bool | None = None
    delay: bool | None = None
    nodelay: bool | None = None
    reconnect: int | None = None
    append: bool | None = None
    size: Size | None = None

    def as_backend(self) -> ChardevBackend:
        """The same as QMP has it.

        Raises:
            CommandError: Something is missing.
        """
        match self.backend:
            case "socket":
                return SocketBackend(type="socket", data=self._socket())
            case "file":
                if self.path is None:
                    raise CommandError("chardev: file: no filename given")
                return FileBackend(type="file", data=ChardevFile(out=self.path, append=self.append))
            case "ringbuf" | "memory":
                return RingbufBackend(type=self.backend, data=ChardevRingbuf(size=self.size))
        return NullBackend(type="null", data=ChardevCommon())

    def _socket(self) -> ChardevSocket:
        return ChardevSocket(
            addr=self._address(),
            server=self.server,
            # Given as "on" where a server's default is meant: that of the command line.
            wait=self.wait is not False if self.server else self.wait,
            reconnect=self.reconnect,
        )

    def _address(self) -> SocketAddressLegacy:
        if self.path is not None and self.host is not None:
            raise CommandError("None or one of 'path', 'fd' or 'host' option required.")
        if self.path is not None:
            unix = UnixSocketAddressBase(path=self.path, abstract=self.abstract, tight=self.tight)
            return LegacyUnixAddress(type="unix", data=unix)
        if self.host is None:
            raise CommandError("chardev: socket: neither path nor host given")
        if self.port is None:
            raise CommandError("chardev: socket: no port given")
        inet = InetSocketAddressBase(host=self.host, port=self.port, ipv4=self.ipv4, ipv6=self.ipv6)
        return LegacyInetAddress(type="inet", data=inet)


def read_chardev(text: str, warn: Callable[[str], None]) -> ChardevOptions:
    """Take the value apart.

    Args:
        text: The value.
        warn: Takes warnings for the user.

    Raises:
        CommandError: It cannot be understood.
    """
    value = parse_keyval(_with_long_booleans(text, warn), implied_key="backend")
    if isinstance(value, dict) and "id" not in value:
        raise CommandError("chardev: no id specified")
    if isinstance(value, dict) and "backend" not in value:
        raise CommandError(f'chardev: "{value["id"]}" missing backend')
    try:
        return visit(ChardevOptions, value, keyval=True)
    except CommandError as error:
        raise CommandError(_reworded(error.description)) from error


def _reworded(sentence: str) -> str:
    unknown = re.fullmatch(r"Parameter '(.*)' is unexpected", sentence)
    if unknown is not None:
        return f"Invalid parameter '{unknown[1]}'"
    return re.sub(r"('reconnect') expects integer", r"\1 expects a number", sentence)


def _with_long_booleans(text: str, warn: Callable[[str], None]) -> str:
    """Write `server,nowait` as `server=on,wait=off`, as old command lines expect."""

    def long(part: str) -> str:
        if "=" in part or not part:
            return part
        option = f"{part[2:]}=off" if part.startswith("no") else f"{part}=on"
        warn(
            f"--chardev {text}: warning: short-form boolean option '{part}' deprecated\n"
            f"Please use {option} instead"
        )
        return option

    first, *others = re.split(r"(?<!,),(?!,)", text)
    return ",".join([first, *map(long, others)])
