# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What a service manager and its service tell each other: readiness, and sockets made before.

Source: sd_notify(3) and sd_listen_fds(3); both are plain protocols over environment variables.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Final

from nbdjobs.cli.exits import CliError

logger = logging.getLogger(__name__)

READY: Final = "READY=1"
STOPPING: Final = "STOPPING=1"

FIRST_DESCRIPTOR: Final = 3
"""Passed sockets follow standard error."""

_PATIENCE_S: Final = 1.0
"""Seconds for a manager whose queue is full: it must not hold the server up."""


@dataclass(frozen=True, slots=True)
class PassedSocket:
    """A socket made by the service manager.

    Attributes:
        descriptor: Its number.
        address: Where it listens: a path, or host and port.
    """

    descriptor: int
    address: str | tuple[str, int]


def notify(state: str, environment: Mapping[str, str]) -> None:
    """Tell the service manager something, if there is one that wants to know.

    A manager that cannot be reached is logged and does not stop the server.

    Args:
        state: An assignment such as `READY`.
        environment: The process's.
    """
    address = environment.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # Linux's abstract sockets, which have no file
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.settimeout(_PATIENCE_S)
            manager.sendto(state.encode(), address)
    except OSError as error:
        logger.warning("the service manager could not be told %s: %s", state, error)


def take_socket(environment: MutableMapping[str, str], pid: int) -> PassedSocket | None:
    """Find the listening socket that the service manager made, and keep it from children.

    Args:
        environment: The process's; what speaks of sockets is removed, for it is meant for this
            process alone.
        pid: The process's id: variables that a parent left over are not meant for it.

    Returns:
        The socket, or None if there is none.

    Raises:
        CliError: There is more than one, or it is none that NBD clients can connect to.
    """
    addressee = environment.pop("LISTEN_PID", None)
    count = environment.pop("LISTEN_FDS", None)
    environment.pop("LISTEN_FDNAMES", None)
    if addressee != str(pid) or count is None:
        return None
    if count != "1":
        raise CliError(f"the service manager passed {count} sockets: expected one, for NBD clients")
    try:
        os.set_inheritable(FIRST_DESCRIPTOR, False)
        with socket.socket(fileno=os.dup(FIRST_DESCRIPTOR)) as passed:
            address = _address(passed)
    except OSError as error:
        raise CliError(f"the socket that was passed cannot be used: {error.strerror}") from error
    if address is None:
        raise CliError(
            "the socket that was passed cannot be used: expected one that listens on TCP or at a"
            " path (ListenStream= in systemd, with Accept=no)"
        )
    return PassedSocket(FIRST_DESCRIPTOR, address)


def _address(passed: socket.socket) -> str | tuple[str, int] | None:
    """Where it listens; None if it does not, or has no address that clients can name."""
    is_listening = passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if passed.type != socket.SOCK_STREAM or not is_listening:
        return None
    name = passed.getsockname()
    if passed.family in (socket.AF_INET, socket.AF_INET6):
        return str(name[0]), int(name[1])
    return name if passed.family == socket.AF_UNIX and isinstance(name, str) and name else None
