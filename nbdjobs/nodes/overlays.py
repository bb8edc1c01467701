# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Snapshots by overlays: clients write a new image from one instant on, and the old one stays.

    clients ──▶ node          clients ──▶ overlay ──backing──▶ node        (read-only from now on)

Source: QEMU `blockdev.c` (external_snapshot_prepare) for behaviour and texts.
"""

from __future__ import annotations

import logging
from typing import Final

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.backing_chain import (
    BACKING,
    backing_file_of,
    backing_of,
    note_backing,
)
from nbdjobs.nodes.graph import Graph, Role, cumulative_permissions
from nbdjobs.nodes.images import ImagePlace, create_image, open_overlay
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.op_blockers import BlockOp
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.reopening import set_read_only

logger = logging.getLogger(__name__)

DEFAULT_FORMAT: Final = "qcow2"


async def take_snapshot(graph: Graph, node: Node, overlay: Node) -> None:
    """Let the users of a node go on with an overlay of it; that instant is the snapshot.

    Raises:
        CommandError: It cannot be, in QEMU's words; nothing has changed.
    """
    async with graph.node_changes:
        check_source(node)
        check_overlay(overlay)
        async with graph.drained(node, overlay):
            for each in (node, overlay):
                graph.check_present(each)
            check_source(node)
            check_overlay(overlay)
            await _flush(node)
            _put_above(graph, node, overlay)
        try:
            await set_read_only(graph, node, is_read_only=True)
        except CommandError as error:
            logger.warning("node %s stays writable below its overlay: %s", node.name, error)


def check_source(node: Node) -> None:
    """Refuse a node whose users cannot be moved."""
    for edge in node.parents:
        if edge.role is Role.BACKING and isinstance(edge.parent, Node):
            raise CommandError(
                f"Node '{node.name}' is busy: node is used as backing hd of '{edge.parent.name}'"
            )
    node.op_blockers.check(BlockOp.SNAPSHOT)


def check_overlay(overlay: Node) -> None:
    """Refuse what cannot be an overlay, or is something else already."""
    needed, _ = cumulative_permissions(overlay)
    if needed & Permission.CONSISTENT_READ:
        raise CommandError("The overlay is already in use")
    if overlay.is_filter:
        raise CommandError("Filters cannot be used as overlays")
    overlay.op_blockers.check(BlockOp.SNAPSHOT)
    if backing_of(overlay) is not None:
        raise CommandError("The overlay already has a backing image")
    if not overlay.supports_backing:
        raise CommandError("The overlay does not support backing images")


async def _flush(node: Node) -> None:
    if node.is_read_only:
        return
    try:
        await node.flush()
    except NodeError as error:
        raise CommandError("An IO error has occurred") from error


def _put_above(graph: Graph, node: Node, overlay: Node) -> None:
    edge = graph.attach(overlay, BACKING, node, Role.BACKING)
    try:
        graph.replace(node, overlay)
    except CommandError:
        graph.detach(edge)
        raise
    note_backing(overlay, node)


async def snapshot_to_file(
    graph: Graph,
    node: Node,
    filename: str,
    *,
    image_format: str = DEFAULT_FORMAT,
    name: str | None = None,
    is_new: bool = True,
) -> None:
    """`take_snapshot` to an image that is named by its file, and goes with its last user.

    A file that was made for it is removed again if the snapshot cannot be taken.

    Args:
        graph: The nodes.
        node: The node to take a snapshot of.
        filename: Where the overlay is.
        image_format: Its format.
        name: Its node's name; None lets the graph choose one.
        is_new: Whether it is made, and what an existing file holds is lost.

    Raises:
        CommandError: It cannot be, in QEMU's words.
    """
    check_source(node)
    place = await ImagePlace.find(graph, filename)
    if is_new:
        await create_image(place, image_format, node.size, backing_file_of(node))
    try:
        overlay = await open_overlay(place, image_format, name, node.config.cache)
        try:
            await take_snapshot(graph, node, overlay)
        finally:
            await graph.drop_if_unused(overlay)  # also if the node has no users that go on with it
    except BaseException:
        await place.remove()
        raise
