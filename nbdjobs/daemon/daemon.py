# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The daemon: owner of nodes, devices, exports and jobs; what commands act on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from nbdjobs.daemon.chardevs import Chardevs
from nbdjobs.daemon.exports import BlockExports
from nbdjobs.daemon.objects import Objects
from nbdjobs.daemon.run_state import RunControl
from nbdjobs.daemon.side_requests import SideRequests
from nbdjobs.errors import CommandError, ErrorClass, NbdJobsError
from nbdjobs.jobs.block_job import BlockJob
from nbdjobs.jobs.collection import Jobs
from nbdjobs.nodes import permissions
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.driver import AnyDriver
from nbdjobs.nodes.drivers import DRIVERS
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.op_blockers import BlockOp
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.nodes.permissions import Permission
from nbdjobs.qapi.types import Uint64, event

logger = logging.getLogger(__name__)


@event("BLOCK_WRITE_THRESHOLD")
@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWriteThreshold:
    """A write has gone beyond the threshold of a node, which is not there any more."""

    node_name: str
    amount_exceeded: Uint64
    write_threshold: Uint64


class Daemon:
    """Everything that one daemon holds.

    Attributes:
        graph: The nodes.
        devices: Devices that commands know by name.
        objects: User-created objects.
        chardevs: Character devices, such as the sockets of monitors.
        run: Whether clients are served.
        exports: The NBD server and what it offers.
        jobs: All jobs.
        side_requests: Requests that commands began and did not wait for.
        drivers: Who opens nodes, by the driver's name.
    """

    drivers: ClassVar[Mapping[str, AnyDriver]] = DRIVERS

    def __init__(self) -> None:
        self._listeners: list[Callable[[object], None]] = []
        self._is_asked_to_quit = asyncio.Event()
        self.graph = Graph()
        self.graph.on_event = self.emit
        self.devices: dict[str, Device] = {}
        self.objects = Objects(self.graph)
        self.chardevs = Chardevs()
        self.run = RunControl(self.all_devices, self.emit)
        self.exports = BlockExports(self.graph, self.objects, self.run, self.emit)
        self.jobs = Jobs(self.emit)
        self.side_requests = SideRequests()

    # Events and the end

    def subscribe(self, listener: Callable[[object], None]) -> None:
        """Let `listener` have every event from now on."""
        self._listeners.append(listener)

    def emit(self, event: object) -> None:
        """Tell everyone of an event."""
        for listener in self._listeners:
            listener(event)

    def quit(self) -> None:
        """Ask the daemon to end; returns at once."""
        self._is_asked_to_quit.set()

    @property
    def is_asked_to_quit(self) -> bool:
        """Whether the end has begun: no command has an effect any more."""
        return self._is_asked_to_quit.is_set()

    async def asked_to_quit(self) -> None:
        """Wait until somebody wants the daemon to end."""
        await self._is_asked_to_quit.wait()

    async def shutdown(self) -> None:
        """End everything, users first: jobs, exports with their clients, devices, nodes.

        All data that clients had confirmed is on stable storage afterwards, as far as the
        storage allows.
        """
        for node in self.graph.nodes.values():
            node.begin_shutdown()
        await self.jobs.shutdown()
        if self.exports.is_server_running:
            await self.exports.stop_server()
        for device in list(self.devices.values()):
            await device.close()
        self.devices.clear()
        await self.side_requests.close()
        for node in list(self.graph.nodes.values()):
            await self._flush(node)
        for node in list(self.graph.nodes.values()):
            node.is_owned_by_user = False
            await self.graph.drop_if_unused(node)
        await self.chardevs.close()

    @staticmethod
    async def _flush(node: Node) -> None:
        try:
            await node.flush()
        except NbdJobsError as error:
            logger.error("node %s could not be flushed: %s", node.name, error)

    # Devices

    def all_devices(self) -> Iterator[Device]:
        """All devices: those with names, and those of exports."""
        yield from list(self.devices.values())
        yield from reversed([export.device for export in self.exports])

    def cont(self) -> None:
        """Serve clients again, and forget what errors have stopped, jobs included."""
        for job in self.jobs:
            if isinstance(job, BlockJob):
                job.reset_io_status()
        self.run.cont()

    # Nodes

    async def blockdev_add(self, options: BlockdevOptions) -> Node:
        """Open a node and keep it until it is deleted.

        Raises:
            CommandError: It cannot be opened; nothing is left half-open.
        """
        return await open_node(self.graph, options, self.drivers)

    async def blockdev_del(self, name: str) -> None:
        """Close a node that was added by name and that nobody uses.

        Raises:
            CommandError: It is in use, or was not added by name.
        """
        node = self.graph.find(name)
        if any(isinstance(edge.parent, Device) for edge in node.parents):
            raise CommandError(f"Node {name} is in use")
        node.op_blockers.check(BlockOp.DRIVE_DEL)
        if not node.is_owned_by_user:
            raise CommandError(f"Node {name} is not owned by the monitor")
        if node.parents:
            raise CommandError(f"Block device {name} is in use")
        node.is_owned_by_user = False
        await self.graph.drop(node)

    async def resize(self, device: str | None, node_name: str | None, size: int) -> None:
        """Change the size of the node below a device, or else of the node of a name.

        Raises:
            CommandError: It is in use, or cannot change its size, in QEMU's words.
        """
        if device in self.devices:
            node = self.devices[device].node
        elif node_name in self.graph.nodes:
            node = self.graph.nodes[node_name]
        else:
            raise CommandError(
                f"Cannot find device='{device or ''}' nor node-name='{node_name or ''}'"
            )
        if size < 0:
            raise CommandError("Parameter 'size' expects a >0 size")
        if node.op_blockers.rules_out(BlockOp.RESIZE):
            raise CommandError(f"Device '{device or '(null)'}' is in use")
        async with self.graph.node_changes:
            self.graph.check_present(node)
            user = Device(self.graph, node, needed=Permission.RESIZE, shared=permissions.ALL)
            try:
                async with self.graph.drained(node):
                    await node.truncate(size)
            finally:
                await user.close()

    def set_write_threshold(self, name: str, threshold: int) -> None:
        """Emit BLOCK_WRITE_THRESHOLD once, at the first write to a node beyond a place.

        Raises:
            CommandError: There is no node of that name.
        """
        node = self.graph.nodes.get(name)
        if node is None:
            raise CommandError(f"Device '{name}' not found")

        def tell(threshold: int, amount: int) -> None:
            self.emit(
                BlockWriteThreshold(
                    node_name=name, amount_exceeded=amount, write_threshold=threshold
                )
            )

        node.set_write_threshold(threshold, tell)

    def find_device(self, name: str) -> Device:
        """The device of the export with that id, or else the one of that name.

        Raises:
            CommandError: There is neither.
        """
        export = self.exports.find(name)
        device = export.device if export is not None else self.devices.get(name)
        if device is None:
            raise CommandError(f"Device '{name}' not found", ErrorClass.DEVICE_NOT_FOUND)
        return device

    def named_device(self, device: str | None, device_id: str | None) -> Device:
        """The device that a command names in the older way, or else by the id of an export.

        Raises:
            CommandError: It names none or two, or one that is not there.
        """
        if (device is None) == (device_id is None):
            raise CommandError("Need exactly one of 'device' and 'id'")
        if device_id is not None:
            return self.find_device(device_id)
        if device not in self.devices:
            raise CommandError(f"Device '{device}' not found", ErrorClass.DEVICE_NOT_FOUND)
        return self.devices[device]

    def find_device_or_node(self, name: str) -> Node:
        """The node below the device of that name, or the node of that name.

        Raises:
            CommandError: There is neither.
        """
        device = self.devices.get(name)
        node = device.node if device is not None else self.graph.nodes.get(name)
        if node is None:
            raise CommandError(f"Cannot find device='{name}' nor node-name='{name}'")
        return node
