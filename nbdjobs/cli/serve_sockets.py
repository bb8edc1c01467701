# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The sockets of `nbdjobs serve`: those that were chosen, its own, and one passed to it."""

from __future__ import annotations

import os
from pathlib import Path

from nbdjobs.cli import systemd
from nbdjobs.cli.runtime import check_socket_path, private_dir, runtime_dir
from nbdjobs.cli.serve_options import PassedListen, TcpListen, UnixListen


def unix_socket(chosen: Path | None, name: str) -> Path:
    """Return where a socket is to be: the chosen path, or this name in the folder of this user.

    Raises:
        CliError: It cannot be made there.
    """
    path = private_dir(runtime_dir()) / name if chosen is None else chosen.absolute()
    check_socket_path(path)
    return path


def passed_socket() -> PassedListen | None:
    """Return the socket that a service manager made for NBD clients, or None.

    Raises:
        CliError: What was passed cannot be used.
    """
    passed = systemd.take_socket(os.environ, os.getpid())
    if passed is None:
        return None
    address = passed.address
    where = UnixListen(Path(address)) if isinstance(address, str) else TcpListen(*address)
    return PassedListen(passed.descriptor, where)
