# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What a qemu-io command works on: a device, or a node through a device made for the command."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.errors import CommandError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.permissions import Permission


@dataclass(frozen=True, slots=True)
class Target:
    """A device or a node, as the user named it.

    Attributes:
        daemon: Where it is.
        name: What the user called it.
        device: The device; None for a node.
        node: The node that requests go to now.
    """

    daemon: Daemon
    name: str
    device: Device | None
    node: Node

    @asynccontextmanager
    async def opened(self, needed: Permission) -> AsyncIterator[Device]:
        """A way in for requests, for as long as they take.

        An export's or a named device's own door is as it is: what it does not let its clients
        do, nobody does through it.

        Raises:
            CommandError: The permissions that are needed cannot be had.
        """
        if self.device is not None:
            if needed & ~self.device.edge.needed:
                raise CommandError(f"Device '{self.name}' does not allow that")
            yield self.device
            return
        device = Device(self.daemon.graph, self.node, needed=needed, shared=permissions.ALL)
        try:
            yield device
        finally:
            await device.close()

    def begin(self, length: int, request: Coroutine[Any, Any, str]) -> None:
        """Begin a request and do not wait for it (see `SideRequests.start`)."""
        self.daemon.side_requests.start(self.name, length, request)

    async def settled(self) -> None:
        """Wait until no such request is in flight here."""
        await self.daemon.side_requests.settled(self.name)


def find_target(daemon: Daemon, name: str, *, is_device_id: bool) -> Target:
    """What a user named: an export by its id, or else a named device or a node.

    Raises:
        CommandError: There is no such thing.
    """
    if is_device_id:
        device = daemon.find_device(name)
        return Target(daemon, name, device, device.node)
    if name in daemon.devices:
        device = daemon.devices[name]
        return Target(daemon, name, device, device.node)
    node = daemon.graph.nodes.get(name)
    if node is None:
        raise CommandError(f"Cannot find device='' nor node-name='{name}'")
    return Target(daemon, name, None, node)
