# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Commands that change nodes while they are in use.

Source: QEMU qapi/block-core.json.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.nodes.activity import activate, inactivate
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.nodes.reopening import reopen
from nbdjobs.qmp.registry import command


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockdevSetActive:
    """Arguments of blockdev-set-active; without a name, all nodes are meant."""

    node_name: str | None = None
    active: bool


@command("blockdev-set-active")
async def blockdev_set_active(daemon: Daemon, arguments: BlockdevSetActive) -> None:
    """Leave images to another process, or take them back."""
    graph, name = daemon.graph, arguments.node_name
    async with graph.node_changes:
        nodes = list(graph.nodes.values()) if name is None else [graph.find(name)]
        if arguments.active:
            await activate(graph, nodes)
        else:
            await inactivate(graph, nodes, called="all nodes" if name is None else "node")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockdevReopen:
    """Arguments of blockdev-reopen."""

    options: list[BlockdevOptions]


@command("blockdev-reopen")
async def blockdev_reopen(daemon: Daemon, arguments: BlockdevReopen) -> None:
    """Let nodes go on with other options, all at the same instant."""
    async with daemon.graph.node_changes:
        await reopen(daemon.graph, arguments.options)
