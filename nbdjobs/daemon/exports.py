# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Block exports: nodes on offer to NBD clients, and the NBD server that offers them.

An export lives until it is asked to end *and* its last client is gone. `safe` refuses while there
are clients, `hard` cuts them off; either way BLOCK_EXPORT_DELETED tells when it is really gone.

Source: QEMU qapi/block-export.json.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final

from nbdjobs.daemon import contexts
from nbdjobs.daemon.addresses import (
    FdSocketAddress,
    InetSocketAddress,
    SocketAddress,
    UnixSocketAddress,
    bind,
    bind_abstract,
    check_unix_path,
    passed_socket,
)
from nbdjobs.daemon.objects import Objects
from nbdjobs.daemon.run_state import RunControl
from nbdjobs.errors import CommandError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.activity import activate
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.device_errors import ErrorHandler, ErrorPolicy
from nbdjobs.nodes.error_policy import OnError
from nbdjobs.nodes.graph import Graph, is_well_formed_id
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.permissions import Permission
from nbdjobs.protocol.export import Export
from nbdjobs.protocol.server import DEFAULT_MAX_CONNECTIONS, HANDSHAKE_LIMIT_S, Server
from nbdjobs.qapi.types import Alternate, Uint32, event, flat_union

MAX_STRING: Final = 4096
"""Longest export name and description in bytes (NBD specification, "Values")."""

STOP_GRACE_S: Final = 3.0
"""Seconds for requests in flight when the server stops: well below the 10 s that container
managers wait between SIGTERM and SIGKILL."""


@event("BLOCK_EXPORT_DELETED")
@dataclass(frozen=True, slots=True, kw_only=True)
class BlockExportDeleted:
    """An export is gone, with all its clients."""

    id: str


class BlockExportRemoveMode(StrEnum):
    """What becomes of clients when an export is removed."""

    SAFE = "safe"
    HARD = "hard"


class BlockExportType(StrEnum):
    """How a node is exported."""

    NBD = "nbd"


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdServerOptions:
    """How to start the NBD server (the `--nbd-server` option)."""

    addr: SocketAddress
    handshake_max_seconds: Uint32 | None = None
    tls_creds: str | None = None
    tls_authz: str | None = None
    max_connections: Uint32 | None = None


@flat_union("type", lambda: {"nbd": BlockExportOptionsNbd})
@dataclass(frozen=True, slots=True, kw_only=True)
class BlockExportOptions:
    """What every export has."""

    type: str
    id: str
    fixed_iothread: bool | None = None
    iothread: str | None = None
    node_name: str
    writable: bool = False
    writethrough: bool = False
    allow_inactive: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDirtyBitmap:
    """A bitmap of a node."""

    node: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockExportOptionsNbd(BlockExportOptions):
    """What an NBD export has besides.

    Attributes:
        name: What clients ask for; the node name unless given.
        description: A sentence for humans.
        bitmaps: Dirty bitmaps to offer as metadata contexts.
        allocation_depth: Offer `qemu:allocation-depth`.
        rerror: What to do about reads that fail; they are reported unless given.
        werror: What to do about writes and flushes that fail; likewise.
    """

    name: str | None = None
    description: str | None = None
    bitmaps: list[Annotated[str | BlockDirtyBitmap, Alternate("BlockDirtyBitmapOrStr")]] | None = (
        None
    )
    allocation_depth: bool = False
    rerror: OnError | None = None
    werror: OnError | None = None


class BlockExport:
    """One export.

    Attributes:
        id: Unique among the exports.
        device: The door to the node.
        offer: The export as the NBD server knows it.
        is_shutting_down: Asked to end, and still there because of its clients.
    """

    def __init__(self, export_id: str, device: Device, offer: Export):
        self.id = export_id
        self.device = device
        self.offer = offer
        self.is_shutting_down = False


Listen = Callable[[Server, SocketAddress], Awaitable[None]]


class BlockExports:
    """All exports, and the NBD server.

    Args:
        graph: Where the nodes are.
        objects: What options refer to by id.
        run: Says whether clients are served, and stops them when a device is to stop on errors.
        emit: Takes events.
        listen: Lets a server listen at an address; a rehearsal only looks whether it could.
    """

    def __init__(
        self,
        graph: Graph,
        objects: Objects,
        run: RunControl,
        emit: Callable[[object], None],
        *,
        listen: Listen | None = None,
    ):
        self._graph = graph
        self._objects = objects
        self._run = run
        self._emit = emit
        self._listen = _listen if listen is None else listen
        self._exports: dict[str, BlockExport] = {}
        self._server: Server | None = None
        self._is_holding = False
        self._endings: set[asyncio.Task[None]] = set()

    # The server

    @property
    def addresses(self) -> list[str | tuple[str, int]]:
        """Where the NBD server listens; empty while there is none."""
        return self._server.addresses if self._server is not None else []

    @property
    def connection_count(self) -> int:
        """NBD clients now."""
        return self._server.connection_count if self._server is not None else 0

    def connection_count_of(self, export: BlockExport) -> int:
        """NBD clients of one export now; one that opens several connections counts as several."""
        return self._server.client_count(export.offer) if self._server is not None else 0

    def hold_clients(self) -> None:
        """Let NBD clients wait to be accepted until `release_clients`."""
        self._is_holding = True
        if self._server is not None:
            self._server.hold_clients()

    def release_clients(self) -> None:
        """Serve NBD clients from now on."""
        self._is_holding = False
        if self._server is not None:
            self._server.release_clients()

    async def start_server(self, options: NbdServerOptions) -> None:
        """Start the NBD server.

        Raises:
            CommandError: One is running, or the address cannot be used; nothing has changed.
        """
        if self._server is not None:
            raise CommandError("NBD server already running")
        if options.tls_creds is not None:
            raise CommandError(f"No TLS credentials with id '{options.tls_creds}'")
        limit = options.max_connections
        handshake = options.handshake_max_seconds
        server = Server(
            max_connections=DEFAULT_MAX_CONNECTIONS if limit is None else limit,
            handshake_limit_s=HANDSHAKE_LIMIT_S if handshake is None else float(handshake),
            on_unused=self._unused,
        )
        if self._is_holding:
            server.hold_clients()
        self._server = server  # from here on, another start is refused
        try:
            await self._listen(server, options.addr)
        except BaseException:
            self._server = None
            raise

    @property
    def is_server_running(self) -> bool:
        """Whether exports can be added."""
        return self._server is not None

    async def stop_server(self) -> None:
        """End all exports and stop listening; clients get answers to what is in flight.

        One that does not take its answers is cut off after `STOP_GRACE_S`. What waits because
        clients are stopped is refused: nobody may ever continue them.

        Raises:
            CommandError: There is no server.
        """
        server = self._running_server()
        self._server = None
        for export in list(self._exports.values()):
            self._shut_down(export, server)
            if not self._run.is_running:
                export.device.turn_away(errno.ESHUTDOWN)
        await server.close(grace_s=STOP_GRACE_S)
        if self._endings:
            await asyncio.wait(self._endings)

    def _running_server(self) -> Server:
        if self._server is None:
            raise CommandError("NBD server not running")
        return self._server

    # Exports

    def __iter__(self) -> Iterator[BlockExport]:
        """All exports, newest first, as QEMU lists them."""
        return reversed(list(self._exports.values()))

    def find(self, export_id: str) -> BlockExport | None:
        """The export of that id, if there is one."""
        return self._exports.get(export_id)

    async def add(self, options: BlockExportOptions) -> BlockExport:
        """Offer a node.

        Raises:
            CommandError: In QEMU's words; nothing has changed.
        """
        assert isinstance(options, BlockExportOptionsNbd)
        node = self._find_node(options)
        if not node.is_active and not options.allow_inactive:
            async with self._graph.node_changes:
                await activate(self._graph, [node])
            node = self._find_node(options)  # commands came meanwhile
        if options.iothread is not None:
            self._objects.check_iothread(options.iothread)
        if options.writable and node.is_read_only:
            raise CommandError("Cannot export read-only node as writable")
        server = self._running_server()
        name = self._check_strings(options)
        policy = ErrorPolicy.checked(options.rerror, options.werror)
        for bitmap in options.bitmaps or ():
            raise CommandError(self._why_no_bitmap(bitmap))
        export = self._open(options, name, node)
        if policy is not None:
            export.device.errors = ErrorHandler(
                policy, path=export.id, emit=self._emit, stop=self._run.stop_for_error
            )
        self._run.adopt(export.device)
        server.add_export(export.offer)
        self._exports[export.id] = export
        return export

    def _find_node(self, options: BlockExportOptionsNbd) -> Node:
        if not is_well_formed_id(options.id):
            raise CommandError("Invalid block export id")
        if options.id in self._exports:
            raise CommandError(f"Block export id '{options.id}' is already in use")
        node = self._graph.nodes.get(options.node_name)
        if node is None:
            raise CommandError(f"Cannot find device='' nor node-name='{options.node_name}'")
        return node

    def delete(self, export_id: str, mode: BlockExportRemoveMode) -> None:
        """Ask an export to end; it is gone when BLOCK_EXPORT_DELETED comes.

        Raises:
            CommandError: There is no such export, or it has clients and `mode` is safe.
        """
        export = self._exports.get(export_id)
        if export is None:
            raise CommandError(f"Export '{export_id}' is not found")
        if export.is_shutting_down:
            raise CommandError(f"Export '{export_id}' is already shutting down")
        server = self._running_server()
        if mode is BlockExportRemoveMode.SAFE and server.client_count(export.offer):
            raise CommandError(f"export '{export_id}' still in use")
        self._shut_down(export, server)
        server.disconnect_clients(export.offer)

    def _why_no_bitmap(self, bitmap: str | BlockDirtyBitmap) -> str:
        if isinstance(bitmap, str):
            return f"Bitmap '{bitmap}' is not found"
        if bitmap.node not in self._graph.nodes:
            return f"Node '{bitmap.node}' not found"
        return f"Dirty bitmap '{bitmap.name}' not found"

    def _check_strings(self, options: BlockExportOptionsNbd) -> str:
        name = options.node_name if options.name is None else options.name
        if len(name.encode()) > MAX_STRING:
            raise CommandError(f"export name '{name}' too long")
        if options.description is not None and len(options.description.encode()) > MAX_STRING:
            raise CommandError(f"description '{options.description}' too long")
        if any(export.offer.name == name for export in self._exports.values()):
            raise CommandError(f"NBD server already has export named '{name}'")
        return name

    def _open(self, options: BlockExportOptionsNbd, name: str, node: Node) -> BlockExport:
        needed = Permission.CONSISTENT_READ
        if options.writable:
            needed |= Permission.WRITE
        # NBD cannot tell clients of a new size, so nobody may change it below them.
        shared = permissions.ALL & ~Permission.RESIZE
        device = Device(
            self._graph,
            node,
            needed=needed,
            shared=shared,
            is_writethrough=options.writethrough,
            may_be_inactive=options.allow_inactive,
        )
        offered = [contexts.allocation(device)]
        if options.allocation_depth:
            offered.append(contexts.allocation_depth(device))
        limits = node.limits
        minimum = limits.request_alignment
        offer = Export(
            name=name,
            backend=device,
            description=options.description or "",
            is_writable=options.writable,
            is_rotational=node.is_rotational,
            # The gate widens unaligned requests, so clients need not care.
            minimum_block_size=1,
            preferred_block_size=max(4096, minimum, limits.opt_transfer & -limits.opt_transfer),
            contexts=offered,
        )
        return BlockExport(options.id, device, offer)

    # The end of an export

    def _shut_down(self, export: BlockExport, server: Server) -> None:
        if export.is_shutting_down:
            return
        export.is_shutting_down = True
        # Nobody waits for the rest, neither for its turn nor for a disk to work again.
        export.device.limit_by(None)
        export.device.errors = None
        server.remove_export(export.offer.name)
        if not server.client_count(export.offer):
            self._end(export)

    def _unused(self, offer: Export) -> None:
        """The NBD server says that an export's last client is gone."""
        for export in self._exports.values():
            if export.offer is offer and export.is_shutting_down:
                self._end(export)
                return

    def _end(self, export: BlockExport) -> None:
        task = asyncio.get_running_loop().create_task(self._release(export))
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def _release(self, export: BlockExport) -> None:
        await export.device.close()
        del self._exports[export.id]
        self._emit(BlockExportDeleted(id=export.id))


async def _listen(server: Server, address: SocketAddress) -> None:
    if isinstance(address, UnixSocketAddress):
        if address.abstract:
            server.listen(bind_abstract(address))
            return
        check_unix_path(address.path)
        try:
            server.listen_unix(address.path)
        except OSError as error:
            raise CommandError(error.strerror or str(error)) from error
        return
    if isinstance(address, FdSocketAddress):
        sock = passed_socket(address)
        try:
            server.listen(sock)
        except OSError as error:
            sock.close()
            raise CommandError(f"Failed to listen on socket: {error.strerror}") from error
        return
    assert isinstance(address, InetSocketAddress)
    for sock in await bind(address):
        server.listen(sock)
