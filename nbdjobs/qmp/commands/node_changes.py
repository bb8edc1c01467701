# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Commands that change nodes while they are in use.

Source: QEMU qapi/block-core.json.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.nodes.reopening import reopen
from nbdjobs.qmp.registry import command


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockdevReopen:
    """Arguments of blockdev-reopen."""

    options: list[BlockdevOptions]


@command("blockdev-reopen")
async def blockdev_reopen(daemon: Daemon, arguments: BlockdevReopen) -> None:
    """Let nodes go on with other options, all at the same instant."""
    async with daemon.graph.node_changes:
        await reopen(daemon.graph, arguments.options)
