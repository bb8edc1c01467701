# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Opening nodes from options: children first, then the node, then the edges between them.

An inline child takes over from its parent what its own options leave out, and goes when its
parent goes. Whatever fails, every node opened on the way is closed again.

Source: QEMU `block.c` (bdrv_inherited_options and bdrv_open_common) for what is inherited.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nbdjobs.errors import CommandError
from nbdjobs.nodes.config import CacheMode, DetectZeroes, NodeConfig
from nbdjobs.nodes.drivers import DRIVERS
from nbdjobs.nodes.graph import Graph
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


async def open_node(graph: Graph, options: BlockdevOptions) -> Node:
    """Open a node with its inline children and enter them in the graph.

    Cancelling closes what was opened so far.

    Raises:
        CommandError: Something does not fit, in QEMU's words; the graph is as before.
    """
    if options.node_name is None:
        raise CommandError("'node-name' must be specified for the root node")
    opening = _Opening(graph)
    try:
        node = await opening.open(options, TOP_LEVEL)
    except BaseException:
        await opening.undo()
        raise
    node.is_owned_by_user = True
    return node


class _Opening:
    """The nodes opened for one command, children before their parents."""

    def __init__(self, graph: Graph):
        self._graph = graph
        self._opened: list[Node] = []
        self._names: set[str] = set()

    async def undo(self) -> None:
        """Close everything opened so far, parents first."""
        for node in reversed(self._opened):
            await self._graph.drop_if_unused(node)

    async def open(self, options: BlockdevOptions, defaults: Defaults) -> Node:
        config = complete(options, defaults)
        name = self._claim_name(options.node_name)
        driver = DRIVERS[options.driver]
        references = driver.children_of(options)
        children = {
            child.name: await self._open_child(child.reference, config) for child in references
        }
        node = await driver.open(name, config, options, children)
        node.given = options
        try:  # another command may have been faster
            for used in children.values():
                self._graph.check_present(used)
            node.bind(self._graph)
            self._graph.add(node)
        except CommandError:
            await node.close()
            raise
        self._opened.append(node)
        for child in references:
            if isinstance(child.reference, BlockdevOptions):
                children[child.name].inline_parent = node
            self._graph.attach(node, child.name, children[child.name], child.role)
        node.attached()
        return node

    def _claim_name(self, wanted: str | None) -> str:
        name = self._graph.new_name(wanted)
        if name in self._names:
            raise CommandError(f"Duplicate nodes with node-name='{name}'")
        self._names.add(name)
        return name

    async def _open_child(self, reference: str | BlockdevOptions, parent: NodeConfig) -> Node:
        if isinstance(reference, BlockdevOptions):
            return await self.open(reference, inherited(parent))
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
