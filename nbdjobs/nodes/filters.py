# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Putting a filter between a node and its users, and taking it out again."""

from __future__ import annotations

from nbdjobs.errors import CommandError
from nbdjobs.nodes.graph import Graph, Role
from nbdjobs.nodes.node import Node


def insert(graph: Graph, below: Node, node: Node, *, child: str = "file") -> None:
    """Move all users of a node to a filter on it; inside a drained section of `below`.

    Args:
        graph: Where both are to be.
        below: The node to filter.
        node: The filter, which is in no graph yet.
        child: What the filter calls the node.

    Raises:
        CommandError: Permissions conflict; nothing has changed.
    """
    graph.attach(node, child, below, Role.FILTERED)
    try:
        graph.replace(below, node)
        graph.add(node)
    except CommandError:
        graph.detach(node.edges[child])
        raise


def take_back(graph: Graph, node: Node, *, child: str = "file") -> None:
    """Undo `insert`, in the same drained section."""
    graph.replace(node, node.edges[child].node)
    del graph.nodes[node.name]
    graph.detach(node.edges[child])


async def remove(graph: Graph, node: Node, *, child: str = "file") -> None:
    """Give the filter's users back to the node below it, and close the filter.

    Inside a drained section of the filter.
    """
    graph.replace(node, node.edges[child].node)
    await graph.drop(node)
