# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Images that a job may write, and that are as they were after it."""

from __future__ import annotations

import logging

from nbdjobs.errors import CommandError
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.reopening import set_read_only

logger = logging.getLogger(__name__)


async def be_read_only(graph: Graph, node: Node) -> None:
    """Let a node be read-only again at a job's end; one that others write by now stays as it is."""
    if graph.nodes.get(node.name) is not node:
        return  # nobody used it any more, and it was closed
    try:
        async with graph.node_changes:
            await set_read_only(graph, node, is_read_only=True)
    except CommandError as error:
        logger.warning("node %s stays writable: %s", node.name, error)
