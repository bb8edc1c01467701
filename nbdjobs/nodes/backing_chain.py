# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Chains of images: what is below what, where content comes from, and how a chain is changed.

    device ──▶ filter ──▶ overlay ──backing──▶ filter ──▶ image ──backing──▶ image
                             └─ what the overlay has not itself is read from below

A step down goes through a filter to the node it shows, and from an image to its backing node.
Where a chain shows zeroes because an image ends, that end counts as allocated: whatever is below
must not show through when the image goes.

Source: QEMU `block.c` (bdrv_find_overlay, bdrv_find_backing_image, bdrv_drop_intermediate) and
`block/io.c` (bdrv_is_allocated_above) for the behaviour.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Final

from nbdjobs.errors import CommandError
from nbdjobs.nodes.driver import BackingFile, DriverNode
from nbdjobs.nodes.graph import Edge, Graph, Role, check_activity, repoint, top_down
from nbdjobs.nodes.node import JSON, Node
from nbdjobs.qapi.types import Null

BACKING: Final = "backing"


# What is below what


def next_below(node: Node) -> Node | None:
    """The node that a filter shows, or the backing node of an image."""
    return node.filtered if node.is_filter else backing_of(node)


def backing_of(node: Node) -> Node | None:
    """The node that an image is an overlay of, be it a filter; None for a filter."""
    edge = None if node.is_filter else node.edges.get(BACKING)
    return None if edge is None else edge.node


def chain_from(node: Node | None) -> Iterator[Node]:
    """The node and all below it, filters included."""
    while node is not None:
        yield node
        node = next_below(node)


def contains(top: Node, node: Node) -> bool:
    """Whether a node is `top` or below it."""
    return node in chain_from(top)


def skip_filters(node: Node) -> Node:
    """The node whose content filters show."""
    while node.is_filter and node.filtered is not None:
        node = node.filtered
    return node


def last_image(node: Node) -> Node:
    """The image at the end of the chain, without filters on it."""
    image = skip_filters(node)
    while (below := backing_of(image)) is not None:
        image = skip_filters(below)
    return image


def find_overlay(top: Node, base: Node | None) -> Node | None:
    """The image right above `base`, with nothing but filters in between.

    Args:
        top: Where to look from.
        base: A node below `top`, a filter on it counts as itself; None for the chain's end.

    Returns:
        The overlay, or None if there is none between `top` and `base`.
    """
    wanted = None if base is None else skip_filters(base)
    node: Node | None = skip_filters(top)
    while node is not None:
        below = backing_of(node)
        below = None if below is None else skip_filters(below)
        if below is wanted:
            return node
        node = below
    return None


def find_image(top: Node, name: str) -> Node | None:
    """The backing node below `top` that has a file name, as its user or an image has it."""
    below = backing_of(skip_filters(top))
    while below is not None:
        image = skip_filters(below)
        if name == image.filename or _is_same_path(name, image.filename):
            return below
        below = backing_of(image)
    return None


def _is_same_path(name: str, filename: str) -> bool:
    """Whether both name a path that is there, and it is the same."""
    if filename.startswith(JSON) or not filename:
        return False
    return os.path.realpath(name.removeprefix("file:")) == os.path.realpath(filename)


def name_for_header(node: Node) -> str:
    """How an overlay's header has to name a node, so that opening it shows the same.

    A file name says it if every image below names its own backing file; else all is written out.
    """
    image = skip_filters(node)
    if _names_all(image):
        return image.filename
    return JSON + json.dumps(_written_out(image))


def backing_file_of(node: Node) -> BackingFile:
    """What a new overlay of a node has to say of its backing file."""
    return BackingFile(name_for_header(node), skip_filters(node).driver)


def _names_all(image: Node) -> bool:
    return all(each.names_its_backing for each in chain_from(image))


def _written_out(image: Node) -> dict[str, object]:
    options = image.content_options
    below = backing_of(image)
    if image.supports_backing and not _names_all(image):
        options["backing"] = None if below is None else _written_out(skip_filters(below))
    return options


# Where content comes from


async def allocated_above(
    top: Node | None, base: Node | None, offset: int, length: int
) -> tuple[bool, int]:
    """Whether the content of a range comes from `top` or an image between it and `base`.

    Args:
        top: First node looked at; None if there is none, and the answer is no.
        base: First node not looked at, or None to look at all of the chain.
        offset: First byte.
        length: Bytes, at least 1.

    Returns:
        The answer for the first run of the range, and that run's length.

    Raises:
        NodeError: An image could not be read.
    """
    stop = None if base is None else skip_filters(base)
    node = None if top is None else skip_filters(top)
    while node is not None and node is not stop:
        if offset >= node.size:
            # It reads as zeroes here, and what is below must not show through one day.
            return stop is not None, length
        length = min(length, node.size - offset)
        is_allocated, length = await node.allocation(offset, length)
        if is_allocated:
            return True, length
        below = backing_of(node)
        node = None if below is None else skip_filters(below)
    return False, length


async def allocation_depth(top: Node, offset: int, length: int) -> tuple[int, int]:
    """In which node of a chain the content of a range is.

    Args:
        top: The first node, which counts as 1; filters count, too, as in QEMU.
        offset: First byte.
        length: Bytes, at least 1.

    Returns:
        For the first run of the range, its length and the depth; 0 if no node has it.

    Raises:
        NodeError: An image could not be read.
    """
    for depth, node in enumerate(chain_from(top), 1):
        if offset >= node.size:
            return length, depth
        length = min(length, node.size - offset)
        is_allocated, length = await node.allocation(offset, length)
        if is_allocated:
            return length, depth
    return length, 0


# Changing a chain


def edges_between(top: Node, base: Node | None) -> list[Edge]:
    """The edges that lead from `top` down to `base`, or to the end of the chain."""
    found = []
    node: Node | None = top
    while node is not None and node is not base:
        below = next_below(node)
        found += [edge for edge in node.edges.values() if edge.node is below and _leads_down(edge)]
        node = below
    return found


def _leads_down(edge: Edge) -> bool:
    return edge.role in (Role.BACKING, Role.FILTERED)


def freeze(edges: list[Edge]) -> None:
    """Let nobody change these edges until `thaw`.

    Raises:
        CommandError: Somebody else relies on one of them already.
    """
    for edge in edges:
        edge.check_not_frozen()
    for edge in edges:
        edge.freezes += 1


def thaw(edges: list[Edge]) -> None:
    """Take back one `freeze`."""
    for edge in edges:
        edge.freezes -= 1


def set_backing(graph: Graph, overlay: Node, backing: Node | None) -> Node | None:
    """Let an image have another backing node, or none; inside a drained section of it.

    Returns:
        The backing node that it had, for `Graph.drop_if_unused`.

    Raises:
        CommandError: Permissions conflict, or it would close a cycle; nothing has changed.
    """
    edge = overlay.edges.get(BACKING)
    before = None if edge is None else edge.node
    if before is backing:
        return None
    if edge is not None:
        edge.check_not_frozen()
    if edge is None:
        assert backing is not None
        graph.attach(overlay, BACKING, backing, Role.BACKING)
    elif backing is None:
        graph.detach(edge)
    else:
        _check_no_cycle(overlay, backing)
        _repoint(graph, edge, backing)
    note_backing(overlay, backing)
    if before is not None and before.inline_parent is overlay:
        before.inline_parent = None
    return before


def _check_no_cycle(overlay: Node, backing: Node) -> None:
    if overlay in top_down([backing]):
        raise CommandError(
            f"Making '{backing.name}' a {BACKING} child of '{overlay.name}' would create a cycle"
        )
    check_activity(overlay, BACKING, backing)


def _repoint(graph: Graph, edge: Edge, node: Node) -> None:
    before = edge.node
    users = {each: list(each.parents) for each in (before, node)}

    def back() -> None:
        edge.node = before
        for each, parents in users.items():
            each.parents[:] = parents

    graph.change(lambda: repoint(edge, node), back, [before, node])


def note_backing(overlay: Node, backing: Node | None) -> None:
    """Let the options that a node counts as opened with name its backing node."""
    if not isinstance(overlay, DriverNode) or overlay.given is None:
        return
    if any(field.name == BACKING for field in fields(overlay.given)):
        now = Null.NULL if backing is None else backing.name
        overlay.given = replace(overlay.given, **{BACKING: now})


async def write_backing(overlay: Node, name: str | None, backing: Node | None) -> None:
    """Write into an image what its backing file is called.

    Args:
        overlay: The image.
        name: The name; None for one that fits `backing`.
        backing: What the backing node is or will be; None for none.

    Raises:
        NodeError: It cannot be written.
    """
    if backing is None:
        await overlay.change_backing_file(None, None)
        return
    driver = skip_filters(backing).driver
    await overlay.change_backing_file(name_for_header(backing) if name is None else name, driver)
