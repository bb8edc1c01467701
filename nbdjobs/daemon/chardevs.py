# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""All character devices: what `--chardev` and `chardev-add` make, and monitors are on.

Source: QEMU qapi/char.json; texts of its storage daemon.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from nbdjobs.daemon.addresses import InetSocketAddress, SocketAddressLegacy, flattened
from nbdjobs.daemon.addresses import UnixSocketAddress as UnixAddress
from nbdjobs.daemon.chardev import (
    RINGBUF_SIZE,
    Chardev,
    FileChardev,
    NullChardev,
    RingbufChardev,
)
from nbdjobs.daemon.chardev_addresses import SocketOptions
from nbdjobs.daemon.chardev_socket import SocketChardev
from nbdjobs.errors import CommandError
from nbdjobs.qapi.types import flat_union, member

KINDS: Final = ("null", "ringbuf", "socket", "file", "memory")
"""What can be made; `memory` is the older name of `ringbuf`."""


@flat_union(
    "type",
    lambda: {
        "file": FileBackend,
        "memory": RingbufBackend,
        "null": NullBackend,
        "ringbuf": RingbufBackend,
        "socket": SocketBackend,
    },
)
@dataclass(frozen=True, slots=True, kw_only=True)
class ChardevBackend:
    """What a character device is to be (QAPI `ChardevBackend`)."""

    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChardevCommon:
    """Members of the kinds that need none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NullBackend(ChardevBackend):
    """Nothing."""

    data: ChardevCommon


@dataclass(frozen=True, slots=True, kw_only=True)
class ChardevFile:
    """A file for what is sent, and one for input."""

    source: str | None = field(default=None, metadata=member("in"))
    out: str
    append: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileBackend(ChardevBackend):
    """A file."""

    data: ChardevFile


@dataclass(frozen=True, slots=True, kw_only=True)
class ChardevRingbuf:
    """How many bytes are kept."""

    size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RingbufBackend(ChardevBackend):
    """The last bytes written."""

    data: ChardevRingbuf


@dataclass(frozen=True, slots=True, kw_only=True)
class ChardevSocket:
    """A socket; `nodelay` is so anyway."""

    addr: SocketAddressLegacy
    server: bool = True
    wait: bool | None = None
    nodelay: bool | None = None
    reconnect: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketBackend(ChardevBackend):
    """A socket."""

    data: ChardevSocket


class Chardevs:
    """The character devices by id."""

    def __init__(self) -> None:
        self._chardevs: dict[str, Chardev] = {}

    def __iter__(self) -> Iterator[Chardev]:
        """All of them, oldest first."""
        return iter(list(self._chardevs.values()))

    def find(self, name: str) -> Chardev | None:
        """The one of that id, if there is one."""
        return self._chardevs.get(name)

    def existing(self, name: str) -> Chardev:
        """The one of that id; `CommandError` if there is none."""
        found = self._chardevs.get(name)
        if found is None:
            raise CommandError(f"Chardev '{name}' not found")
        return found

    async def add(self, name: str, backend: ChardevBackend) -> None:
        """Make one.

        Raises:
            CommandError: The id is taken, or it cannot be made.
        """
        self._check_new(name)
        chardev = await self.make(name, backend)
        try:
            self._check_new(name)  # another command may have been faster
        except CommandError:
            await chardev.close()
            raise
        self._chardevs[name] = chardev

    def _check_new(self, name: str) -> None:
        if name in self._chardevs:
            raise CommandError(f"Chardev with id '{name}' already exists")

    async def change(self, name: str, backend: ChardevBackend) -> None:
        """Put another one in the place of one that nobody uses.

        Raises:
            CommandError: It is used, is not there, or the new one cannot be made; the old stays.
        """
        self.check_changeable(name)
        chardev = await self.make(name, backend)
        try:
            self._check_unused(name, f"Chardev '{name}' is busy")
        except CommandError:
            await chardev.close()
            raise
        old, self._chardevs[name] = self._chardevs[name], chardev
        await old.close()

    def check_changeable(self, name: str) -> None:
        """Raise `CommandError` for one that is used or not there."""
        if name not in self._chardevs:
            raise CommandError(f"Chardev '{name}' does not exist")
        self._check_unused(name, "Chardev user does not support chardev hotswap")

    async def remove(self, name: str) -> None:
        """Close one that nobody uses.

        Raises:
            CommandError: It is used, or is not there.
        """
        self._check_unused(name, f"Chardev '{name}' is busy")
        await self._chardevs.pop(name).close()

    def _check_unused(self, name: str, sentence: str) -> None:
        if self.existing(name).is_in_use:
            raise CommandError(sentence)

    async def close(self) -> None:
        """Close all of them, used or not."""
        while self._chardevs:
            _, chardev = self._chardevs.popitem()
            await chardev.close()

    async def make(self, name: str, backend: ChardevBackend) -> Chardev:
        """Make one and nothing else; a rehearsal only looks whether it could be made.

        Raises:
            CommandError: It cannot.
        """
        match backend:
            case FileBackend(data=data):
                return FileChardev(
                    name, data.out, is_appended=bool(data.append), source=data.source
                )
            case RingbufBackend(data=data):
                size = RINGBUF_SIZE if data.size is None else data.size
                return RingbufChardev(name, size, filename=backend.type)
            case SocketBackend(data=data):
                socket = SocketChardev(name, socket_options(data))
                await socket.open()
                return socket
            case _:
                return NullChardev(name)


def socket_options(data: ChardevSocket) -> SocketOptions:
    """Check the options of a socket.

    Raises:
        CommandError: They do not go together.
    """
    if data.server and data.reconnect:
        raise CommandError("'reconnect' option is incompatible with socket in server listen mode")
    if not data.server and data.wait is not None:
        raise CommandError("'wait' option is incompatible with socket in client connect mode")
    options = SocketOptions(
        is_server=data.server, wait=bool(data.wait), reconnect=data.reconnect or 0
    )
    address = flattened(data.addr)
    if isinstance(address, UnixAddress):
        return replace(options, path=address.path, is_abstract=bool(address.abstract))
    assert isinstance(address, InetSocketAddress)
    return replace(
        options, host=address.host, port=address.port, ipv4=address.ipv4, ipv6=address.ipv6
    )
