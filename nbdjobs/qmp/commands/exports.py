# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Commands about the NBD server and its exports."""

from __future__ import annotations

from dataclasses import dataclass

from nbdjobs.daemon.addresses import SocketAddressLegacy, flattened
from nbdjobs.daemon.daemon import Daemon
from nbdjobs.daemon.exports import (
    BlockExportOptions,
    BlockExportOptionsNbd,
    BlockExportRemoveMode,
    BlockExportType,
    NbdServerOptions,
)
from nbdjobs.qapi.types import Uint32
from nbdjobs.qmp.registry import command


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdServerStart:
    """Arguments of nbd-server-start."""

    addr: SocketAddressLegacy
    handshake_max_seconds: Uint32 | None = None
    tls_creds: str | None = None
    tls_authz: str | None = None
    max_connections: Uint32 | None = None


@command("nbd-server-start")
async def nbd_server_start(daemon: Daemon, arguments: NbdServerStart) -> None:
    """Start the NBD server."""
    await daemon.exports.start_server(
        NbdServerOptions(
            addr=flattened(arguments.addr),
            handshake_max_seconds=arguments.handshake_max_seconds,
            tls_creds=arguments.tls_creds,
            tls_authz=arguments.tls_authz,
            max_connections=arguments.max_connections,
        )
    )


@command("nbd-server-stop")
async def nbd_server_stop(daemon: Daemon) -> None:
    """End all exports and the NBD server."""
    await daemon.exports.stop_server()


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdServerAdd:
    """Arguments of nbd-server-add."""

    name: str | None = None
    description: str | None = None
    device: str
    writable: bool | None = None
    bitmap: str | None = None


@command("nbd-server-add", features=("deprecated",))
async def nbd_server_add(daemon: Daemon, arguments: NbdServerAdd) -> None:
    """Offer a device or node; unlike block-export-add, as read-only if it must be."""
    name = arguments.device if arguments.name is None else arguments.name
    node = daemon.find_device_or_node(arguments.device)
    await daemon.exports.add(
        BlockExportOptionsNbd(
            type=BlockExportType.NBD,
            id=name,
            node_name=node.name,
            writable=bool(arguments.writable) and not node.is_read_only,
            name=name,
            description=arguments.description,
            bitmaps=None if arguments.bitmap is None else [arguments.bitmap],
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdServerRemove:
    """Arguments of nbd-server-remove."""

    name: str
    mode: BlockExportRemoveMode | None = None


@command("nbd-server-remove", features=("deprecated",))
def nbd_server_remove(daemon: Daemon, arguments: NbdServerRemove) -> None:
    """End an export."""
    daemon.exports.delete(arguments.name, arguments.mode or BlockExportRemoveMode.SAFE)


@command("block-export-add")
async def block_export_add(daemon: Daemon, arguments: BlockExportOptions) -> None:
    """Offer a node."""
    await daemon.exports.add(arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockExportDel:
    """Arguments of block-export-del."""

    id: str
    mode: BlockExportRemoveMode | None = None


@command("block-export-del")
def block_export_del(daemon: Daemon, arguments: BlockExportDel) -> None:
    """End an export."""
    daemon.exports.delete(arguments.id, arguments.mode or BlockExportRemoveMode.SAFE)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockExportInfo:
    """An export as query-block-exports shows it.

    Attributes:
        x_connections: NBD connections to it; an extra of nbdjobs.
    """

    id: str
    type: BlockExportType
    node_name: str
    shutting_down: bool
    x_connections: int


@command("query-block-exports")
def query_block_exports(daemon: Daemon) -> list[BlockExportInfo]:
    """All exports, and the nodes they show now."""
    return [
        BlockExportInfo(
            id=export.id,
            type=BlockExportType.NBD,
            node_name=export.device.node.name,
            shutting_down=export.is_shutting_down,
            x_connections=daemon.exports.connection_count_of(export),
        )
        for export in daemon.exports
    ]
