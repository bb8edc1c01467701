# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Where running servers put their sockets, and how they are found again.

Every `nbdjobs serve` puts `NAME.nbd.sock` and `NAME.qmp.sock` into one private folder, so that
`nbdjobs backup` finds a running server without being told.
"""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from pathlib import Path
from typing import Final

from nbdjobs.cli.exits import CliError

NBD_SUFFIX: Final = ".nbd.sock"
QMP_SUFFIX: Final = ".qmp.sock"

#: Bytes that fit into `sockaddr_un.sun_path` with its terminating zero.
SOCKET_PATH_MAX: Final = 107

#: Seconds to wait for a socket that may be stale: a unix socket answers at once or never.
LOOK_PATIENCE_S: Final = 1.0


def runtime_dir() -> Path:
    """Return the folder of this user's sockets; it may not exist yet.

    `$XDG_RUNTIME_DIR/nbdjobs`, else `/run/user/UID/nbdjobs`, else a folder of this user's own in
    the folder for temporary files.
    """
    configured = os.environ.get("XDG_RUNTIME_DIR")
    if configured and Path(configured).is_absolute() and Path(configured).is_dir():
        return Path(configured) / "nbdjobs"
    of_user = Path(f"/run/user/{os.getuid()}")
    if of_user.is_dir() and os.access(of_user, os.W_OK):
        return of_user / "nbdjobs"
    return Path(tempfile.gettempdir()) / f"nbdjobs-{os.getuid()}"


def private_dir(path: Path) -> Path:
    """Make a folder that only this user can enter, or check that it is one.

    The folder for temporary files is everybody's: somebody else may have put a folder or a
    symbolic link with our name there, and a control socket in it would be theirs.

    Raises:
        CliError: It cannot be made, or it is not private.
    """
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise CliError(f"cannot make the folder '{path}' for sockets: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise CliError(f"'{path}' is not a folder of this user: sockets in it would not be safe")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise CliError(f"'{path}' is open to other users: expected mode 0700")
    return path


def check_socket_path(path: Path) -> None:
    """See that a server can listen at this path.

    Raises:
        CliError: The path is too long, its folder is missing, something else is there, or a
            server listens there already.
    """
    if len(os.fsencode(path)) > SOCKET_PATH_MAX:
        raise CliError(
            f"the socket path '{path}' is too long: expected at most {SOCKET_PATH_MAX} bytes"
        )
    if not path.parent.is_dir():
        raise CliError(f"'{path.parent}', the folder of the socket '{path.name}', does not exist")
    if not os.path.lexists(path):
        return
    if not path.is_socket():
        raise CliError(f"'{path}' exists and is not a socket: expected a new path")
    if is_listening(path):
        raise CliError(f"another server listens at '{path}': stop it, or choose another name")


def is_listening(path: Path) -> bool:
    """Whether somebody accepts connections at a unix socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(LOOK_PATIENCE_S)
        try:
            connection.connect(str(path))
        except TimeoutError:
            return True  # its backlog is full: busy, not gone
        except OSError:
            return False
    return True


def running_servers(folder: Path) -> list[Path]:
    """Return the QMP sockets in a folder behind which a server runs, in order of their names."""
    return [path for path in sorted(folder.glob(f"*{QMP_SUFFIX}")) if is_listening(path)]


def find_server(folder: Path) -> Path:
    """Return the QMP socket of the one server that runs.

    Raises:
        CliError: There is none, or more than one; then the message lists them.
    """
    match running_servers(folder):
        case [path]:
            return path
        case []:
            raise CliError(
                f"no running server was found in '{folder}': start one with 'nbdjobs serve IMAGE',"
                " or name its QMP socket with --qmp"
            )
        case many:
            listed = ", ".join(str(path) for path in many)
            raise CliError(f"more than one server is running, choose one with --qmp: {listed}")
