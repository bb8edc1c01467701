# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Commands about nodes and devices: add, delete, look at."""

from __future__ import annotations

from dataclasses import dataclass

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.qapi.types import Uint64
from nbdjobs.qmp.commands.block_info import (
    BlockDeviceInfo,
    BlockInfo,
    BlockStats,
    describe_device,
    describe_device_stats,
    describe_node,
    describe_node_stats,
)
from nbdjobs.qmp.registry import command


@command("blockdev-add")
async def blockdev_add(daemon: Daemon, arguments: BlockdevOptions) -> None:
    """Open a node."""
    await daemon.blockdev_add(arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockdevDel:
    """Arguments of blockdev-del."""

    node_name: str


@command("blockdev-del")
async def blockdev_del(daemon: Daemon, arguments: BlockdevDel) -> None:
    """Close a node."""
    await daemon.blockdev_del(arguments.node_name)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockResize:
    """Arguments of block_resize; the size is in bytes."""

    device: str | None = None
    node_name: str | None = None
    size: int


@command("block_resize")
async def block_resize(daemon: Daemon, arguments: BlockResize) -> None:
    """Change the size of a node that nobody relies on."""
    await daemon.resize(arguments.device, arguments.node_name, arguments.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSetWriteThreshold:
    """Arguments of block-set-write-threshold; bytes from the start of the node, 0 for none."""

    node_name: str
    write_threshold: Uint64


@command("block-set-write-threshold")
def block_set_write_threshold(daemon: Daemon, arguments: BlockSetWriteThreshold) -> None:
    """Tell of the first write beyond a place, by an event."""
    daemon.set_write_threshold(arguments.node_name, arguments.write_threshold)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryNamedBlockNodes:
    """Arguments of query-named-block-nodes."""

    flat: bool | None = None


@command("query-named-block-nodes")
def query_named_block_nodes(
    daemon: Daemon, arguments: QueryNamedBlockNodes
) -> list[BlockDeviceInfo]:
    """All nodes, newest first."""
    nodes = reversed(list(daemon.graph.nodes.values()))
    return [describe_node(node, flat=bool(arguments.flat)) for node in nodes]


@command("query-block")
def query_block(daemon: Daemon) -> list[BlockInfo]:
    """All named devices, and those of exports; oldest first."""
    graph = daemon.graph
    named = [describe_device(graph, device) for device in daemon.devices.values()]
    exported = [describe_device(graph, each.device, each.id) for each in daemon.exports]
    return named + exported[::-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryBlockstats:
    """Arguments of query-blockstats."""

    query_nodes: bool | None = None


@command("query-blockstats")
def query_blockstats(daemon: Daemon, arguments: QueryBlockstats) -> list[BlockStats]:
    """Statistics of all named devices and of all exports, or of all nodes."""
    if arguments.query_nodes:
        return [describe_node_stats(node) for node in daemon.graph.nodes.values()]
    named = [describe_device_stats(device) for device in daemon.devices.values()]
    exported = [describe_device_stats(each.device, each.id) for each in daemon.exports]
    return named + exported[::-1]
