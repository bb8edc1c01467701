# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Reopening: nodes in use go on with other options, and children are exchanged.

    plan ──▶ hold back ──▶ flush, prepare ──▶ commit all, settle permissions ──▶ go on
                            (may wait)              (nothing waits)

One command changes several nodes at the same instant or none of them. What takes time or may fail
for reasons outside, such as opening a file, comes first and changes nothing. Then everything is
changed in one go, and if anything does not fit, all of it is taken back, before any request is
let in again: clients see the old or the new, never a part, and none of their requests fails.

What an option's absence means differs from opening: an option that was given must be given again,
unless its default is what is wanted now and the driver can go back to it.

Source: QEMU qapi/block-core.json (blockdev-reopen), the comments of `block.c` about reopening;
error texts of its storage daemon.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any, Final, Protocol

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.driver import DriverNode, Reopening
from nbdjobs.nodes.graph import (
    Edge,
    Graph,
    Role,
    check_activity,
    nodes_above,
    repoint,
    top_down,
)
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.opening import TOP_LEVEL, Defaults, complete, inherited
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.nodes.permissions import Permission
from nbdjobs.qapi.model import members_of
from nbdjobs.qapi.types import Null
from nbdjobs.qapi.visitor import to_qapi

_ALWAYS_MUTABLE: Final = frozenset(
    {
        "node-name",
        "discard",
        "cache.direct",
        "cache.no-flush",
        "read-only",
        "auto-read-only",
        "detect-zeroes",
        "active",
    }
)

_EXCHANGEABLE: Final = frozenset({"file", "backing"})
"""Children that may be exchanged, as in QEMU; others stay."""


async def reopen(graph: Graph, wanted: Iterable[BlockdevOptions]) -> None:
    """Let nodes go on with other options, all at the same instant.

    An inline child goes on too: with what its parent's options have for it, and what it inherits
    from the parent's new ones. Only one call at a time may be under way on a graph. Cancelling
    before that instant changes nothing.

    Args:
        graph: Where the nodes are.
        wanted: Their options from now on; a later entry for the same node completes an earlier.

    Raises:
        CommandError: Something does not fit, in QEMU's words; nothing has changed.
    """
    wanted = list(wanted)
    while True:
        plan = _Plan(graph, wanted)
        async with graph.drained(*plan.nodes):
            # The graph may have changed while requests in flight ended.
            if _Plan(graph, wanted).nodes == plan.nodes:
                await plan.carry_out()
                break
    for child in plan.exchanged:
        await graph.drop_if_unused(child)


async def set_read_only(graph: Graph, node: Node, *, is_read_only: bool) -> None:
    """Let a node go on as one that can be written, or not any more.

    Inline children that have this from their parent go along. Nothing happens to a node that is
    so already. The same holds as for `reopen`.

    Raises:
        CommandError: It cannot be, in QEMU's words; nothing has changed.
    """
    while node.is_read_only is not is_read_only:
        plan = _Plan(graph, ())
        plan.set_read_only(node, is_read_only=is_read_only)
        async with graph.drained(*plan.nodes):
            again = _Plan(graph, ())
            again.set_read_only(node, is_read_only=is_read_only)
            if again.nodes == plan.nodes:
                await plan.carry_out()


class _Change(Protocol):
    """A part of what changes at one instant."""

    def commit(self) -> None:
        """Take effect; `CommandError` if that does not fit."""

    def abort(self) -> None:
        """Be as before, even after a `commit` that failed."""


class _Plan:
    """What one command is about.

    Attributes:
        nodes: All nodes that change, or get other users.
        exchanged: Children that their parents go on without.
    """

    def __init__(self, graph: Graph, wanted: Iterable[BlockdevOptions]):
        self._graph = graph
        self._targets: dict[DriverNode[Any], tuple[NodeConfig, BlockdevOptions]] = {}
        self._children: dict[tuple[Node, str], _ChildChange] = {}
        for options in wanted:
            if options.node_name is None:
                raise CommandError("node-name not specified")
            self._add(graph.find(options.node_name), options, TOP_LEVEL)

    @property
    def nodes(self) -> list[Node]:
        children = (child for change in self._children.values() for child in change.ends)
        return list(dict.fromkeys([*self._targets, *children]))

    @property
    def exchanged(self) -> list[Node]:
        return [change.old for change in self._children.values() if change.old is not None]

    # What to do

    def _add(self, node: Node, options: BlockdevOptions, defaults: Defaults) -> None:
        _check_reopenable(node)
        assert isinstance(node, DriverNode)
        if node in self._targets:
            options = _joined(options, self._targets[node][1])
        config = complete(options, defaults)
        _check_unchanged(node, options)
        self._targets[node] = config, options
        references = {child.name: child for child in node.children_of(options)}
        for child in references.values():
            self._add_child(node, child.name, child.reference, child.role, config)
        for name in node.edges.keys() & _EXCHANGEABLE - references.keys():
            self._children[node, name] = _ChildChange(self._graph, node, name, None, Role.DATA)

    def set_read_only(self, node: Node, *, is_read_only: bool) -> None:
        """Change only this, of a node and of inline children that have it from their parent."""
        _check_reopenable(node)
        assert isinstance(node, DriverNode)
        config = replace(node.config, is_read_only=is_read_only, is_auto_read_only=False)
        self._targets[node] = config, _given_now(node)
        for edge in node.edges.values():
            child = edge.node
            if edge.is_primary and child.inline_parent is node and _inherits(child):
                self.set_read_only(child, is_read_only=is_read_only)

    def _add_child(
        self,
        node: Node,
        name: str,
        reference: str | BlockdevOptions,
        role: Role,
        config: NodeConfig,
    ) -> None:
        edge = node.edges.get(name)
        current = _own_child(edge.node) if edge is not None else None
        is_inline = current is not None and current.inline_parent is node
        if isinstance(reference, BlockdevOptions):
            if current is None or not is_inline:
                raise _cannot_change(f"{name}.driver")
            self._add(current, reference, inherited(config))
            new = current
        else:
            new = self._find_child(node, name, reference, current)
            if new is current and is_inline:
                self._add(new, _given(new), inherited(config))
        if edge is not None and new is current:
            new = edge.node  # with the filters that jobs have put there
        if edge is None or edge.node is not new or edge.role is not role:
            self._children[node, name] = _ChildChange(self._graph, node, name, new, role)

    def _find_child(self, node: Node, name: str, reference: str, current: Node | None) -> Node:
        edge = node.edges.get(name)
        if current is not None and edge is not None and reference in (current.name, edge.node.name):
            return current
        if name not in _EXCHANGEABLE:
            raise _cannot_change(name)
        new = self._graph.nodes.get(reference)
        if new is None:
            raise CommandError(f"Cannot find device='' nor node-name='{reference}'")
        return new

    # Doing it

    async def carry_out(self) -> None:
        """Change everything; inside a drained section of `nodes`."""
        for node in self._targets:
            try:
                await node.flush()
            except NodeError as error:
                raise CommandError(f"Error flushing drive: {os.strerror(error.errno)}") from error
        async with AsyncExitStack() as finally_:
            prepared: dict[Node, Reopening[Any]] = {}
            for node, (config, options) in self._targets.items():
                prepared[node] = await node.prepare_reopen(self._graph, config, options)
                finally_.push_async_callback(prepared[node].finish)
            for each in self.nodes:  # commands came meanwhile
                self._graph.check_present(each)
            self._change_at_once(prepared)

    def _change_at_once(self, prepared: dict[Node, Reopening[Any]]) -> None:
        above = nodes_above(self.nodes)
        sizes = {node: node.size for node in above}
        done: list[_Change] = []

        def changes() -> Iterator[_Change]:
            yield from self._children.values()
            # From below, since what fits a node may depend on its child's new size.
            for node in reversed(list(top_down(prepared))):
                if node in prepared:
                    yield prepared[node]

        def commit() -> None:
            for change in changes():
                done.append(change)
                change.commit()
            for node, size in sizes.items():
                _check_size(node, size)

        def abort() -> None:
            for change in reversed(done):
                change.abort()

        self._graph.change(commit, abort, self.nodes)


class _ChildChange:
    """Another node in the place of a child; None for no child from now on."""

    def __init__(self, graph: Graph, parent: Node, name: str, new: Node | None, role: Role):
        self._parent = parent
        self._name = name
        self._new = new
        self._role = role
        edge = parent.edges.get(name)
        self.old = edge.node if edge is not None and edge.node is not new else None
        self._before: list[tuple[Edge, Node, Role]] = []
        self._users: dict[Node, list[Edge]] = {}
        self._was_inline = False

    @property
    def ends(self) -> list[Node]:
        """The children before and after."""
        return [node for node in (self.old, self._new) if node is not None]

    def commit(self) -> None:
        edge = self._parent.edges.get(self._name)
        if edge is not None and edge.node is not self._new:
            edge.check_not_frozen()
        self._before = [] if edge is None else [(edge, edge.node, edge.role)]
        self._users = {node: list(node.parents) for node in self.ends}
        if self.old is not None:
            self._was_inline = self.old.inline_parent is self._parent
            self.old.inline_parent = None if self._was_inline else self.old.inline_parent
        if self._new is None:
            self._remove(edge)
        else:
            self._lead_to(self._new, edge)

    def _remove(self, edge: Edge | None) -> None:
        if edge is not None:
            del self._parent.edges[self._name]
            edge.node.parents.remove(edge)

    def _lead_to(self, new: Node, edge: Edge | None) -> None:
        if self._parent in set(top_down([new])):
            raise CommandError(
                f"Making '{new.name}' a {self._name} child of '{self._parent.name}' would create"
                " a cycle"
            )
        check_activity(self._parent, self._name, new)
        if edge is None:
            edge = Edge(self._parent, self._name, new, self._role)
            self._parent.edges[self._name] = edge
            new.parents.append(edge)
        elif edge.node is not new:
            repoint(edge, new)
        edge.role = self._role

    def abort(self) -> None:
        for node, users in self._users.items():
            node.parents[:] = users
        self._parent.edges.pop(self._name, None)
        for edge, node, role in self._before:
            edge.node, edge.role = node, role
            self._parent.edges[self._name] = edge
        if self.old is not None and self._was_inline:
            self.old.inline_parent = self._parent


def _check_reopenable(node: Node) -> None:
    if not isinstance(node, DriverNode) or node.mutable_options is None or node.given is None:
        raise CommandError(
            f"Block format '{node.driver}' used by node '{node.name}' does not support"
            " reopening files"
        )


def _inherits(node: Node) -> bool:
    """Whether a child's own options leave open if it can be written."""
    return isinstance(node, DriverNode) and _given(node).read_only is None


def _given_now(node: Node) -> BlockdevOptions:
    """The options that a node was given, with the backing node that it has by now."""
    given = _given(node)
    if all(field.name != "backing" for field in fields(given)):
        return given
    edge = node.edges.get("backing")
    now: dict[str, Any] = {"backing": Null.NULL if edge is None else edge.node.name}
    return replace(given, **now)


def _own_child(node: Node) -> Node:
    """The child that options speak of: a job's filter shows it, and goes with the job."""
    while (below := node.filtered) is not None:
        if isinstance(node, DriverNode) and node.given is not None:
            break
        node = below
    return node


def _given(node: Node) -> BlockdevOptions:
    assert isinstance(node, DriverNode), "made from options"
    given = node.given
    assert isinstance(given, BlockdevOptions)
    return given


# What may change


def _check_unchanged(node: DriverNode[Any], options: BlockdevOptions) -> None:
    """Refuse options that differ and must not; children are looked at elsewhere."""
    given = _given(node)
    before, after = _flat(given), _flat(options)
    fixed = [name for name in {**before, **after} if not _may_change(node, name)]
    for name in fixed:
        if name in before and name not in after:
            raise CommandError(f"Option '{name}' cannot be reset to its default value")
    if after.get("active", node.is_active) != node.is_active:
        raise _cannot_change("active")
    if after.get("node-name", node.name) != node.name:
        raise _cannot_change("node-name")
    for name in fixed:
        if name in after and before.get(name) != after[name]:
            raise _cannot_change(name)


def _may_change(node: DriverNode[Any], name: str) -> bool:
    """Whether an option is of those that may differ, or is a child or part of one."""
    assert node.mutable_options is not None
    if name in _ALWAYS_MUTABLE:
        return True
    part = name.partition(".")[0]
    return part in node.mutable_options or part in node.edges or part in _EXCHANGEABLE


def _cannot_change(name: str) -> CommandError:
    return CommandError(f"Cannot change the option '{name}'")


def _flat(options: BlockdevOptions) -> dict[str, object]:
    """The options that say something, by dotted names as on a command line."""
    return dict(_walk("", options))


def _walk(prefix: str, value: object) -> Iterator[tuple[str, object]]:
    if is_dataclass(value) and not isinstance(value, type):
        names = {member.attribute: member.name for member in members_of(type(value))}
        for field in fields(value):
            held = getattr(value, field.name)
            if held is not None and (field.default is MISSING or held != field.default):
                yield from _walk(
                    f"{prefix}.{names[field.name]}" if prefix else names[field.name], held
                )
    elif isinstance(value, list | tuple) and value:
        for number, element in enumerate(value):
            yield from _walk(f"{prefix}.{number}", element)
    else:
        yield prefix, to_qapi(value)


def _joined(options: BlockdevOptions, earlier: BlockdevOptions) -> BlockdevOptions:
    """The same, completed with what an earlier entry for the same node says."""
    if type(options) is not type(earlier):
        return options
    missing = {
        field.name: getattr(earlier, field.name)
        for field in fields(options)
        if getattr(options, field.name) == field.default
    }
    return replace(options, **missing)


def _check_size(node: Node, before: int) -> None:
    """Refuse a new size that a user of the node could not take notice of.

    Devices check every request against the size as it is; whoever else does not share the right
    to resize goes on with the size that it knows, perhaps into what is not its own.
    """
    if node.size == before:
        return
    for edge in node.parents:
        shared = edge.shared
        if isinstance(edge.parent, Device):
            continue
        if isinstance(edge.parent, Node):
            _, shared = edge.parent.child_permissions(edge, permissions.NONE, permissions.ALL)
        if Permission.RESIZE not in shared:
            raise CommandError(
                f"Permission conflict on node '{node.name}': its size would change, and permissions"
                f" 'resize' are unshared by {edge.describe()}."
            )
