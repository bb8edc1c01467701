# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs daemon --check`: a rehearsal of the whole command line, with all errors in one go.

The options act, in order, on a real daemon that lacks only its hands: files have stand-ins that
cannot be written, and addresses are looked at instead of listened to. So whatever the
daemon itself would refuse is refused here, in the same words. Nothing is opened for writing.

An option that refers to what a wrong one before it should have made is not complained about: the
first error would be told again and again.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar, Final

from nbdjobs.cli.daemon_options import CommandLine, Step, UsageError, parse_command_line
from nbdjobs.cli.daemon_setup import Setup
from nbdjobs.cli.exits import ExitCode
from nbdjobs.cli.looked_at import REHEARSED
from nbdjobs.cli.units import plural
from nbdjobs.daemon.addresses import (
    FdSocketAddress,
    InetSocketAddress,
    SocketAddress,
    UnixSocketAddress,
    bind,
    check_unix_path,
    flattened,
    passed_socket,
)
from nbdjobs.daemon.chardev import Chardev, NullChardev
from nbdjobs.daemon.chardev_socket import SocketChardev
from nbdjobs.daemon.chardevs import (
    ChardevBackend,
    ChardevFile,
    Chardevs,
    FileBackend,
    SocketBackend,
    socket_options,
)
from nbdjobs.daemon.daemon import Daemon
from nbdjobs.daemon.exports import BlockExports
from nbdjobs.errors import CommandError
from nbdjobs.nodes.driver import AnyDriver
from nbdjobs.protocol.server import Server
from nbdjobs.qmp.commands import REGISTRY
from nbdjobs.qmp.server import QmpServer

#: What names things that later options refer to.
_NAMES: Final = re.compile(r'"?\b(?:node-name|id)"?\s*[=:]\s*"?([A-Za-z0-9._-]+)')

#: Stands for the server that exports need, and that no option calls by a name.
NBD_SERVER: Final = "--nbd-server"

_WORDS: Final = re.compile(r"[A-Za-z0-9._-]+")


def check_main(arguments: list[str]) -> int:
    """Check a command line and print every error found.

    Args:
        arguments: The command line behind `nbdjobs daemon`, without `--check`.

    Returns:
        Exit code: 0 if the daemon would start with it, 1 if not.
    """
    line, errors = _parse(arguments)
    errors += asyncio.run(check(line))
    for error in errors:
        print(f"nbdjobs: {error}", file=sys.stderr)
    if errors:
        return ExitCode.FAILED
    print(f"the command line is right: {summary(line.steps)}")
    return ExitCode.DONE


def summary(steps: Iterable[Step]) -> str:
    """What there would be: `2 nodes, 1 export, 1 monitor`."""
    options = [step.option for step in steps]
    return ", ".join(
        plural(options.count(option), noun)
        for option, noun in (("blockdev", "node"), ("export", "export"), ("monitor", "monitor"))
    )


def _parse(arguments: list[str]) -> tuple[CommandLine, list[str]]:
    """Take the command line apart; words that are wrong are left out and complained about."""
    errors: list[str] = []
    while True:
        try:
            return parse_command_line(arguments), errors
        except UsageError as error:
            errors.append(str(error))
            arguments = _without(arguments, error.word)


def _without(arguments: list[str], wrong: str) -> list[str]:
    # An option without its value is the last word; an equal one before it may be right.
    for number in reversed(range(len(arguments))):
        word = arguments[number]
        if word.startswith("-") and word.lstrip("-").partition("=")[0] == wrong:
            return arguments[:number] + arguments[number + 1 :]
    if wrong in arguments:
        number = arguments.index(wrong)
        return arguments[:number] + arguments[number + 1 :]
    # In a bundle of short options, none of which has a value: nothing behind it is lost.
    return [word for word in arguments if not re.fullmatch(r"-[^-]+", word)]


async def check(line: CommandLine, doubtful: Iterable[str] = ()) -> list[str]:
    """Rehearse all options and return the errors, in their order.

    Args:
        line: The options.
        doubtful: Names that are not there because of errors which are known already.
    """
    daemon = _Rehearsal()
    setup = Setup(daemon, _Monitors(REGISTRY, daemon))
    errors: list[str] = []
    doubtful = set(doubtful)
    try:
        for step in line.steps:
            try:
                await setup.apply(step)
                daemon.raise_put_off()
            except CommandError as error:
                if doubtful.isdisjoint(_references(step)):
                    errors.append(step.complain(error))
                doubtful.update(_NAMES.findall(step.text))
                if step.option == "nbd-server" and not daemon.exports.is_server_running:
                    doubtful.add(NBD_SERVER)
    finally:
        await daemon.shutdown()
    return errors + _pidfile_errors(line.pidfile)


def _references(step: Step) -> set[str]:
    """All words of an option, some of which are names of what others made."""
    needs = {NBD_SERVER} if step.option == "export" else set()
    return {*_WORDS.findall(step.text), *needs}


def _pidfile_errors(pidfile: str | None) -> list[str]:
    if pidfile is None:
        return []
    path = Path(os.path.abspath(pidfile))
    reason = _why_not_made(path)
    if path.is_dir():
        reason = os.strerror(errno.EISDIR)
    elif path.exists() and not os.access(path, os.W_OK):
        reason = os.strerror(errno.EACCES)
    if reason is None:
        return []
    return [f"cannot create PID file: Could not create '{pidfile}': {reason}"]


class _Rehearsal(Daemon):
    """A daemon that has no files and does not listen."""

    drivers: ClassVar[Mapping[str, AnyDriver]] = REHEARSED

    def __init__(self) -> None:
        super().__init__()
        self.exports = BlockExports(
            self.graph, self.objects, self.run, self.emit, listen=self._listen
        )
        self.chardevs = _RehearsedChardevs()
        self._put_off: CommandError | None = None

    def raise_put_off(self) -> None:
        """Raise what is wrong with an address.

        It was put off so that the server is there, and exports can be looked at too.
        """
        error, self._put_off = self._put_off, None
        if error is not None:
            raise error

    async def _listen(self, _: Server, address: SocketAddress) -> None:
        try:
            await _look_at_address(address)
        except CommandError as error:
            self._put_off = error


class _RehearsedChardevs(Chardevs):
    """Looks whether character devices could be made."""

    async def make(self, name: str, backend: ChardevBackend) -> Chardev:
        if isinstance(backend, FileBackend):
            _check_output(backend.data)
            return NullChardev(name)
        if not isinstance(backend, SocketBackend):
            return await super().make(name, backend)
        options = socket_options(backend.data)
        if not options.is_server and not options.reconnect and options.path is not None:
            _check_peer(options.path)
        elif options.is_server:
            await _look_at_address(flattened(backend.data.addr))
        return SocketChardev(name, options)


class _Monitors(QmpServer):
    """Serves nobody."""

    async def attach(self, chardev: SocketChardev, *, pretty: bool = False) -> None:
        chardev.is_in_use = True


def _check_output(data: ChardevFile) -> None:
    path = Path(os.path.abspath(data.out))
    reason = _why_not_made(path)
    if path.is_dir():
        reason = os.strerror(errno.EISDIR)
    elif path.exists():
        reason = None if os.access(path, os.W_OK) else os.strerror(errno.EACCES)
    if reason is not None:
        raise CommandError(f"Could not open '{data.out}': {reason}")


# Addresses


async def _look_at_address(address: SocketAddress) -> None:
    if isinstance(address, UnixSocketAddress):
        check_unix_path(address.path)
        if not address.abstract:
            _check_unix(address.path)
    elif isinstance(address, FdSocketAddress):
        passed_socket(address).detach()  # it stays open, as whoever passed it may expect
    elif isinstance(address, InetSocketAddress):
        await _try_to_bind(address)


async def _try_to_bind(address: InetSocketAddress) -> None:
    """Bound but never listened to: nobody can connect meanwhile."""
    for sock in await bind(address):
        sock.close()


def _check_unix(path: str) -> None:
    """Look whether a unix socket could be made."""
    reason = _why_not_made(Path(path))
    if reason is None and os.path.lexists(path) and not Path(path).is_socket():
        reason = os.strerror(errno.EADDRINUSE)
    if reason is not None:
        raise CommandError(f"Failed to bind socket to {path}: {reason}")


def _check_peer(path: str) -> None:
    """Look whether anybody could be called at a unix socket."""
    if not os.path.exists(path):
        raise CommandError(f"Failed to connect to '{path}': {os.strerror(errno.ENOENT)}")


def _why_not_made(path: Path) -> str | None:
    """Why nothing could be made at a path, or None."""
    if not path.parent.is_dir():
        return os.strerror(errno.ENOENT)
    if not path.exists() and not os.access(path.parent, os.W_OK | os.X_OK):
        return os.strerror(errno.EACCES)
    return None
