# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Handing a disk over: inactive nodes leave their images to another process.

    active ──▶ flushed, no writers, locks given back ──▶ inactive
    inactive ──▶ locks taken again, looked at anew ──▶ active

An inactive node is read at most: whatever would change it is refused, and it shares all that it
can, so that another process may open the image for writing. Nodes above an inactive one are
inactive too, as they could not keep their promises otherwise. Users outside the graph stay: what
they need of the node is put aside until it is active again.

Source: QEMU qapi/block-core.json (blockdev-set-active) and the comments of `block.c` and
`block/block-backend.c` about inactive nodes, since 10.0.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.graph import Graph, Root, top_down
from nbdjobs.nodes.node import Node


async def activate(graph: Graph, nodes: Iterable[Node]) -> None:
    """Make nodes and all below them active, where they are not.

    Raises:
        CommandError: Another process uses an image; nothing has changed.
    """
    sleeping = [node for node in top_down(nodes) if not node.is_active]
    if not sleeping:
        return
    async with graph.drained(*sleeping):
        for node in sleeping:
            graph.check_present(node)
        _change(graph, sleeping, is_active=True)
        try:
            for node in reversed(sleeping):
                await node.look_anew()
        except BaseException:
            _change(graph, sleeping, is_active=False)
            raise


async def inactivate(graph: Graph, nodes: Iterable[Node], *, called: str = "node") -> None:
    """Make nodes inactive, and those below them that no active node uses then.

    Args:
        graph: Where they are.
        nodes: What to leave to another process.
        called: What error messages call them.

    Raises:
        CommandError: A user needs the node to be active, or its data cannot be flushed; nothing
            has changed.
    """
    nodes = list(nodes)
    try:
        while awake := _to_inactivate(nodes):
            async with graph.drained(*awake):
                for node in awake:
                    graph.check_present(node)
                    await node.hand_over()
                # Others may have come while this waited.
                if _to_inactivate(nodes) == awake:
                    _change(graph, awake, is_active=False)
                    return
    except NodeError as error:
        reason = os.strerror(error.errno)
        raise CommandError(f"Failed to inactivate {called}: {reason}") from error


def _to_inactivate(nodes: list[Node]) -> list[Node]:
    """All that would become inactive, users first."""
    chosen: list[Node] = []
    for node in top_down(nodes):
        above = [edge.parent for edge in node.parents if isinstance(edge.parent, Node)]
        if not node.is_active:
            continue
        if all(parent in chosen or not parent.is_active for parent in above):
            chosen.append(node)
        elif node in nodes:
            raise CommandError("Node has active parent node")
    for node in chosen:
        for edge in node.parents:
            if isinstance(edge.parent, Root) and not edge.may_be_put_aside:
                raise NodeError(errno.EPERM)
    return chosen


def _change(graph: Graph, nodes: list[Node], *, is_active: bool) -> None:
    def change() -> None:
        _set(nodes, is_active=is_active)

    def restore() -> None:
        _set(nodes, is_active=not is_active)

    graph.change(change, restore, nodes)


def _set(nodes: list[Node], *, is_active: bool) -> None:
    for node in nodes:
        node.set_active(is_active)
        for edge in node.parents:
            if not isinstance(edge.parent, Root):
                continue
            if is_active:
                edge.resume()
            else:
                edge.put_aside()
