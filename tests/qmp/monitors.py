# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Opens monitors as the command line does: a socket, and QMP on it."""

from __future__ import annotations

import socket

from nbdjobs.daemon.chardev_addresses import SocketOptions
from nbdjobs.daemon.chardev_socket import SocketChardev
from nbdjobs.qmp.server import QmpServer


async def open_monitor(
    server: QmpServer, options: SocketOptions, *, pretty: bool = False
) -> list[socket.socket]:
    """Serve QMP on a socket; the sockets that listen."""
    chardev = SocketChardev("monitor", options)
    await chardev.open()
    await server.attach(chardev, pretty=pretty)
    return chardev.listeners
