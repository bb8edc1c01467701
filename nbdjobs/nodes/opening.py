# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Opening nodes from options: children first, then the node, then the edges between them.

An inline child takes over from its parent what its own options leave out, and goes when its
parent goes. Whatever fails, every node opened on the way is closed again.

Source: QEMU `block.c` (bdrv_inherited_options and bdrv_open_common) for what is inherited.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from nbdjobs.errors import CommandError
from nbdjobs.nodes.config import CacheMode, DetectZeroes, NodeConfig
from nbdjobs.nodes.driver import AnyDriver, ChildReference, DriverNode
from nbdjobs.nodes.drivers import DRIVERS
from nbdjobs.nodes.graph import Graph, Role
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.options import BlockdevOptions, CacheOptions, Discard


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a node gets where its own options say nothing; inline children get their parent's."""

    is_read_only: bool = False
    is_auto_read_only: bool = False
    is_share_forced: bool = False
    is_direct: bool = False
    is_no_flush: bool = False
    discard: Discard = Discard.IGNORE
    is_active: bool = True


TOP_LEVEL: Final = Defaults()

MAX_CHAIN: Final = 100
"""Images above each other; a longer chain is a mistake or an attack."""


async def open_node(
    graph: Graph, options: BlockdevOptions, drivers: Mapping[str, AnyDriver] = DRIVERS
) -> Node:
    """Open a node with its inline children and enter them in the graph.

    Cancelling closes what was opened so far.

    Args:
        graph: Where the node is to be.
        options: What to open.
        drivers: Who opens it; a rehearsal has others.

    Raises:
        CommandError: Something does not fit, in QEMU's words; the graph is as before.
    """
    if options.node_name is None:
        raise CommandError("'node-name' must be specified for the root node")
    node = await open_unowned(graph, options, drivers)
    node.is_owned_by_user = True
    return node


async def open_unowned(
    graph: Graph, options: BlockdevOptions, drivers: Mapping[str, AnyDriver] = DRIVERS
) -> Node:
    """Open a node like `open_node`, but for somebody who will use it: it goes with its last user.

    It need not have a name. Whoever finds no use for it hands it to `Graph.drop_if_unused`.
    """
    opening = _Opening(graph, drivers)
    try:
        return await opening.open(options, TOP_LEVEL)
    except BaseException:
        await opening.undo()
        raise


class _Opening:
    """The nodes opened for one command, children before their parents."""

    def __init__(self, graph: Graph, drivers: Mapping[str, AnyDriver]):
        self._graph = graph
        self._drivers = drivers
        self._opened: list[Node] = []
        self._names: set[str] = set()
        self._chain: list[str] = []

    async def undo(self) -> None:
        """Close everything opened so far, parents first."""
        for node in reversed(self._opened):
            await self._graph.drop_if_unused(node)

    async def open(self, options: BlockdevOptions, defaults: Defaults) -> Node:
        config = complete(options, defaults)
        name = self._claim_name(options.node_name)
        driver = self._drivers[options.driver]
        references = driver.children_of(options)
        children = {child.name: await self._open_child(child, config) for child in references}
        node = await driver.open(name, config, options, children)
        node.given = options
        try:
            node.bind(self._graph)
            self._attach(node, references, children)
            await self._load(node, config)
            self._graph.add(node)
        except BaseException:
            await self._abandon(node)
            raise
        self._opened.append(node)
        return node

    def _attach(
        self, node: Node, references: Iterable[ChildReference], children: Mapping[str, Node]
    ) -> None:
        # Another command may have been faster.
        for child in references:
            self._graph.check_present(children[child.name])
        for child in references:
            if isinstance(child.reference, BlockdevOptions):
                children[child.name].inline_parent = node
            self._graph.attach(node, child.name, children[child.name], child.role)

    async def _load(self, node: DriverNode[Any], config: NodeConfig) -> None:
        """Open what the node finds named in its storage, and get it going."""
        references = await node.load()
        with self._in_chain(node):
            children = {child.name: await self._open_child(child, config) for child in references}
        self._attach(node, references, children)
        await node.start()

    @contextmanager
    def _in_chain(self, node: Node) -> Iterator[None]:
        """While inside, backing files that would lead back to the node are refused."""
        name = os.path.realpath(node.filename) if node.has_plain_filename else ""
        if name and name in self._chain:
            raise CommandError(f"'{node.filename}' is in its own chain of backing files")
        if len(self._chain) >= MAX_CHAIN:
            raise CommandError(f"A chain of backing files has more than {MAX_CHAIN} images")
        self._chain.append(name)
        try:
            yield
        finally:
            self._chain.pop()

    async def _abandon(self, node: Node) -> None:
        """Close a node that did not come so far as to be in the graph."""
        async with AsyncExitStack() as then:
            for edge in reversed(node.edges.values()):
                then.callback(self._graph.detach, edge)
            await node.close()

    def _claim_name(self, wanted: str | None) -> str:
        name = self._graph.new_name(wanted)
        if name in self._names:
            raise CommandError(f"Duplicate nodes with node-name='{name}'")
        self._names.add(name)
        return name

    async def _open_child(self, child: ChildReference, parent: NodeConfig) -> Node:
        if child.role is not Role.BACKING:
            return await self._find_or_open(child.reference, inherited(parent))
        try:
            # Whatever its users do, what is below an image is only read.
            defaults = replace(inherited(parent), is_read_only=True, is_auto_read_only=False)
            return await self._find_or_open(child.reference, defaults)
        except CommandError as error:
            raise CommandError(f"Could not open backing file: {error}") from error

    async def _find_or_open(self, reference: str | BlockdevOptions, defaults: Defaults) -> Node:
        if isinstance(reference, BlockdevOptions):
            return await self.open(reference, defaults)
        node = self._graph.nodes.get(reference)
        if node is None:
            raise CommandError(f"Cannot find device='{reference}' nor node-name='{reference}'")
        return node


def inherited(parent: NodeConfig) -> Defaults:
    """What an inline child takes over.

    Discards are let through below: whether they come that far is decided above.
    """
    return Defaults(
        is_read_only=parent.is_read_only,
        is_auto_read_only=parent.is_auto_read_only,
        is_share_forced=parent.is_share_forced,
        is_direct=parent.cache.is_direct,
        is_no_flush=parent.cache.is_no_flush,
        discard=Discard.UNMAP,
        is_active=parent.is_active,
    )


def complete(options: BlockdevOptions, defaults: Defaults) -> NodeConfig:
    """Merge what is given and what is inherited.

    Raises:
        CommandError: It does not fit together, in QEMU's words.
    """
    cache = options.cache or CacheOptions()
    config = NodeConfig(
        is_read_only=_given(options.read_only, defaults.is_read_only),
        is_auto_read_only=_given(options.auto_read_only, defaults.is_auto_read_only),
        can_unmap=(options.discard or defaults.discard) is Discard.UNMAP,
        detect_zeroes=options.detect_zeroes or DetectZeroes.OFF,
        cache=CacheMode(
            is_direct=_given(cache.direct, defaults.is_direct),
            is_no_flush=_given(cache.no_flush, defaults.is_no_flush),
        ),
        is_share_forced=_given(options.force_share, defaults.is_share_forced),
        is_active=_given(options.active, defaults.is_active),
    )
    if config.is_share_forced and not config.is_read_only:
        raise CommandError("force-share=on can only be used with read-only images")
    if config.detect_zeroes is DetectZeroes.UNMAP and not config.can_unmap:
        raise CommandError(
            "setting detect-zeroes to unmap is not allowed without setting discard operation"
            " to unmap"
        )
    return config


def _given(value: bool | None, default: bool) -> bool:
    return default if value is None else value
