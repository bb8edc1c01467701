# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The block graph: who uses which node, and the only ways to change that.

    export ──root──▶ filter ──file──▶ raw ──file──▶ file
    job    ──main node──▶ filter           roots are what requests come from: devices and jobs

A change happens inside a drained section: the roots above the nodes concerned hold new requests
back, those in flight end, then the graph changes, then the roots go on. Clients see the change
as atomic, and no request ever sees half of it.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Final

from nbdjobs.errors import CommandError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.secrets import Secrets
from nbdjobs.nodes.throttle_group import ThrottleGroup

MAX_NAME: Final = 31
_WELL_FORMED: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*", re.ASCII)


class Role(Enum):
    """What a child is to its parent."""

    FILTERED = "filtered"
    """Its content is the parent's content."""

    DATA = "data"
    """It stores what the parent makes of its content."""

    BACKING = "backing"
    """It is read where the parent has nothing."""

    TARGET = "target"
    """The parent copies to it."""

    ROOT = "root"
    """The parent is outside the graph: a device or a job."""


class Root(ABC):
    """A user of nodes from which requests come: it can stop sending them for a while."""

    works_by_itself: ClassVar[bool] = False
    """Whether no guest is behind it, who would suffer while it is held."""

    may_be_inactive = False
    """Whether it can do without writing for a while (see `activity`)."""

    def __init__(self) -> None:
        self.edges: dict[str, Edge] = {}

    @abstractmethod
    def describe(self) -> str:
        """What error messages call it."""

    @abstractmethod
    def hold(self) -> None:
        """Send no new request until as many `release` as `hold` have come."""

    @abstractmethod
    def release(self) -> None:
        """Take back one `hold`."""

    @abstractmethod
    async def idle(self) -> None:
        """Wait until no request that this root sent is in flight; called while held."""


Parent = Node | Root


@dataclass(slots=True, eq=False)
class Edge:
    """One use of a node.

    Attributes:
        parent: Who uses it.
        name: What the parent calls the child: "file", "target", "root", ...
        node: The node used.
        role: What the child is to the parent.
        needed: Permissions that the parent needs.
        shared: Permissions that it lets the child's other users have.
        aside: Both as they will be once the node is active again; None while it is.
        freezes: How many jobs rely on it to stay where it is.
    """

    parent: Parent
    name: str
    node: Node
    role: Role
    needed: Permission = permissions.NONE
    shared: Permission = permissions.ALL
    aside: tuple[Permission, Permission] | None = None
    freezes: int = 0

    @property
    def may_be_put_aside(self) -> bool:
        """Whether a root can do without its permissions for a while."""
        if isinstance(self.parent, Node):
            return False
        return self.parent.may_be_inactive or not self.needed & permissions.CHANGES

    def put_aside(self) -> None:
        """Need nothing and share everything until `resume`."""
        if self.aside is None:
            self.aside = self.needed, self.shared
            self.needed, self.shared = permissions.NONE, permissions.ALL

    def resume(self) -> None:
        """Need and share again what was put aside, if anything was."""
        if self.aside is not None:
            (self.needed, self.shared), self.aside = self.aside, None

    def check_not_frozen(self) -> None:
        """Raise `CommandError` if somebody relies on the edge to stay where it is."""
        if self.freezes and isinstance(self.parent, Node):
            raise CommandError(
                f"Cannot change frozen '{self.name}' link from '{self.parent.name}' to"
                f" '{self.node.name}'"
            )

    @property
    def is_primary(self) -> bool:
        """Whether the parent's own content is in this child."""
        return self.role in (Role.FILTERED, Role.DATA)

    def describe(self) -> str:
        """This use in the words of permission errors."""
        return f"{self.parent.describe()} (uses node '{self.node.name}' as '{self.name}' child)"


class Graph:
    """All nodes by name, and the edges between them.

    Attributes:
        nodes: The nodes.
        throttle_groups: Limits that nodes share, by the names that their options have for them.
        secrets: Passwords and keys, likewise.
        on_event: Told of what users have to know of a node, as dataclasses under `@event`.
        node_changes: Held by commands that change nodes as they are, one after the other.
    """

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.throttle_groups: dict[str, ThrottleGroup] = {}
        self.secrets = Secrets()
        self.on_event: Callable[[object], None] = lambda event: None
        self.node_changes = asyncio.Lock()
        self._drains: set[_Drain] = set()
        self._numbers = itertools.count()

    # Nodes

    def find(self, name: str) -> Node:
        """The node of that name; `CommandError` in QEMU's words if there is none."""
        node = self.nodes.get(name)
        if node is None:
            raise CommandError(f"Failed to find node with node-name='{name}'")
        return node

    def check_present(self, node: Node) -> None:
        """Raise `CommandError` if a node was deleted, by a command that came meanwhile."""
        if self.nodes.get(node.name) is not node:
            raise CommandError(f"Cannot find device='' nor node-name='{node.name}'")

    def new_name(self, name: str | None) -> str:
        """Check a name for a new node, or make one up ("#block...") when None.

        Raises:
            CommandError: The name is ill-formed, too long or taken.
        """
        if name is None:
            while (made_up := f"#block{next(self._numbers):03}") in self.nodes:
                pass
            return made_up
        if not is_well_formed_id(name):
            raise CommandError(f"Invalid node-name: '{name}'")
        if name in self.nodes:
            raise CommandError(f"Duplicate nodes with node-name='{name}'")
        if len(name) > MAX_NAME:
            raise CommandError("Node name too long")
        return name

    def add(self, node: Node) -> None:
        """Enter an opened node.

        Raises:
            CommandError: Another node took the name while this one was being opened.
        """
        if node.name in self.nodes:
            raise CommandError(f"Duplicate nodes with node-name='{node.name}'")
        self.nodes[node.name] = node

    async def drop(self, node: Node) -> None:
        """Close a node that has no users, and then the children that only it used.

        The name is free at once. Failing or being cancelled half-way leaves nothing behind: what
        follows is still closed, and then the error goes on.
        """
        assert not node.parents
        del self.nodes[node.name]
        async with AsyncExitStack() as then:
            for edge in reversed(node.edges.values()):
                then.push_async_callback(self._let_go, edge)
            # The children stay until now: closing may write what the node still held back.
            await node.close()

    async def _let_go(self, edge: Edge) -> None:
        self.detach(edge)
        await self.drop_if_unused(edge.node)

    async def drop_if_unused(self, node: Node) -> None:
        """`drop` a node that nobody uses and that the user did not add by name."""
        is_known = self.nodes.get(node.name) is node
        if is_known and not node.parents and not node.is_owned_by_user:
            await self.drop(node)

    # Edges

    def attach(
        self,
        parent: Parent,
        name: str,
        node: Node,
        role: Role,
        *,
        needed: Permission = permissions.NONE,
        shared: Permission = permissions.ALL,
    ) -> Edge:
        """Let `parent` use `node`.

        Raises:
            CommandError: Another user's permissions conflict, the node cannot give them, or it
                itself uses the parent; nothing has changed.
        """
        assert name not in parent.edges
        if isinstance(parent, Node) and parent in top_down([node]):
            raise CommandError(
                f"Making '{node.name}' a {name} child of '{parent.name}' would create a cycle"
            )
        check_activity(parent, name, node)
        edge = Edge(parent, name, node, role, needed, shared)
        if not node.is_active and edge.may_be_put_aside:
            edge.put_aside()

        def link() -> None:
            parent.edges[name] = edge
            node.parents.append(edge)

        def unlink() -> None:
            del parent.edges[name]
            node.parents.remove(edge)

        self.change(link, unlink, [parent, node])
        return edge

    def detach(self, edge: Edge) -> None:
        """End one use of a node. It never fails: at worst a node keeps more than it needs."""
        del edge.parent.edges[edge.name]
        edge.node.parents.remove(edge)
        with suppress(CommandError):
            self._refresh_permissions([edge.node])

    def set_permissions(self, edge: Edge, needed: Permission, shared: Permission) -> None:
        """Change what a root needs and shares; `CommandError` leaves the old ones in force."""
        before = (edge.needed, edge.shared)

        def change() -> None:
            edge.needed, edge.shared = needed, shared

        def restore() -> None:
            edge.needed, edge.shared = before

        self.change(change, restore, [edge.node])

    def replace(self, old: Node, new: Node, *, keep: Iterable[Edge] = ()) -> None:
        """Move the users of `old` to `new`; inside a drained section.

        Those in `keep` stay, and so do uses by `new` itself and by what is below it, as moving
        them would close a cycle.

        Raises:
            CommandError: Permissions conflict; nothing has changed.
        """
        kept, below = set(keep), set(top_down([new]))
        before = list(old.parents), list(new.parents)
        moved = [edge for edge in old.parents if edge not in kept and edge.parent not in below]

        def move() -> None:
            # The order in which QEMU leaves them; it decides which conflict is reported.
            for edge in reversed(moved):
                repoint(edge, new)

        def move_back() -> None:
            for edge in moved:
                edge.node = old
            old.parents[:], new.parents[:] = before

        self.change(move, move_back, [old, new])

    # Draining

    @asynccontextmanager
    async def drained(self, *nodes: Node) -> AsyncIterator[None]:
        """While inside, no request is in flight on these nodes and none arrives.

        Cancelling the wait lets the requests go on as if nothing had been asked.
        """
        drain = _Drain(nodes)
        self._drains.add(drain)
        try:
            await drain.settle()
            yield
        finally:
            self._drains.discard(drain)
            drain.end()

    # Permissions

    def change(
        self, change: Callable[[], None], restore: Callable[[], None], parts: Iterable[Parent]
    ) -> None:
        """Do a change to the graph or to nodes, and settle permissions from `parts` downwards.

        Whatever `change` or the permissions refuse, `restore` is called and nothing has changed.

        Raises:
            CommandError: It is refused.
        """
        nodes = [part for part in parts if isinstance(part, Node)]
        try:
            change()
            self._refresh_permissions(nodes)
        except Exception:
            restore()
            self._refresh_permissions(nodes)
            raise
        for drain in self._drains:
            drain.catch_up()

    def _refresh_permissions(self, nodes: Iterable[Node]) -> None:
        """Work out anew, from these nodes downwards, what each needs and shares.

        All conflicts are found before anything is applied, so that a refusal costs nothing.
        """
        below = list(top_down(nodes))
        before = [
            (edge, edge.needed, edge.shared) for node in below for edge in node.edges.values()
        ]
        try:
            for node in below:
                needed, shared = self._settle(node)
                node.check_permissions(needed, shared)
        except Exception:
            for edge, old_needed, old_shared in before:
                edge.needed, edge.shared = old_needed, old_shared
            raise
        for node in below:
            node.apply_permissions(*cumulative_permissions(node))

    @staticmethod
    def _settle(node: Node) -> tuple[Permission, Permission]:
        _check_conflicts(node)
        needed, shared = cumulative_permissions(node)
        for edge in node.edges.values():
            edge.needed, edge.shared = node.child_permissions(edge, needed, shared)
            if not node.is_active:
                edge.needed &= ~permissions.CHANGES
            if edge.node.config.is_share_forced or not node.is_active:
                edge.shared = permissions.ALL
        return needed, shared


class _Drain:
    """The roots held back on behalf of one drained section."""

    def __init__(self, nodes: Iterable[Node]):
        self._nodes = set(nodes)
        self._held: dict[Root, None] = {}
        self._settled: set[Root] = set()
        self._draining = ExitStack()
        self._holds_guests = False
        self.catch_up()

    def catch_up(self) -> None:
        """Hold every root that reaches the nodes now and did not before; guests when it is time.

        One that does not reach them any more stays held as well: to the end is not long.
        """
        for root in roots_above(self._nodes):
            if root not in self._held and (self._holds_guests or root.works_by_itself):
                self._held[root] = None
                root.hold()
                self._draining.enter_context(draining_below(root))

    async def settle(self) -> None:
        """Wait until none of the roots has a request in flight, nor a node one of its own.

        Jobs come first: they may be stuck at another disk, and until they are idle, guests go on.
        """
        await self._settle_held()
        self._holds_guests = True
        self.catch_up()
        await self._settle_held()
        for node in nodes_above(self._nodes):
            await node.settled()

    async def _settle_held(self) -> None:
        # More of them may come while one is awaited.
        while waiting := [root for root in self._held if root not in self._settled]:
            for root in waiting:
                await root.idle()
            self._settled.update(waiting)

    def end(self) -> None:
        """Let all of them go on."""
        self._draining.close()
        for root in self._held:
            root.release()


@contextmanager
def draining_below(root: Root) -> Iterator[None]:
    """While inside, no node keeps a request of `root`, which is held back, waiting needlessly."""
    below = list(top_down(edge.node for edge in root.edges.values()))
    for node in below:
        node.begin_drain()
    try:
        yield
    finally:
        for node in below:
            node.end_drain()


def is_well_formed_id(name: str) -> bool:
    """Whether QEMU would take the name for an object: a letter, then letters, digits, "-._"."""
    return _WELL_FORMED.fullmatch(name) is not None


def nodes_above(nodes: Iterable[Node]) -> list[Node]:
    """The nodes themselves and all nodes from which requests can reach them, each once."""
    seen: dict[Node, None] = {}
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in seen:
            seen[node] = None
            pending += [edge.parent for edge in node.parents if isinstance(edge.parent, Node)]
    return list(seen)


def roots_above(nodes: Iterable[Node]) -> list[Root]:
    """Every root from which requests can reach one of the nodes, each once."""
    edges = (edge for node in nodes_above(nodes) for edge in node.parents)
    return list(dict.fromkeys(edge.parent for edge in edges if isinstance(edge.parent, Root)))


def cumulative_permissions(node: Node) -> tuple[Permission, Permission]:
    """What the users of a node need together, and what all of them share."""
    needed, shared = permissions.NONE, permissions.ALL
    for edge in node.parents:
        needed |= edge.needed
        shared &= edge.shared
    return needed, shared


def _check_conflicts(node: Node) -> None:
    # The newest users first, like QEMU, so that it is the same conflict that gets reported.
    for other, user in itertools.permutations(reversed(node.parents), 2):
        conflict = user.needed & ~other.shared
        if conflict:
            raise CommandError(
                f"Permission conflict on node '{node.name}': permissions"
                f" '{permissions.describe(conflict)}' are both required by {user.describe()}"
                f" and unshared by {other.describe()}."
            )


def top_down(nodes: Iterable[Node]) -> Iterator[Node]:
    """The nodes and all below them, every node after its users among them."""
    order: list[Node] = []
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node in seen:
            return
        seen.add(node)
        for edge in reversed(node.edges.values()):
            visit(edge.node)
        order.append(node)

    for node in nodes:
        visit(node)
    return reversed(order)


def check_activity(parent: Parent, name: str, node: Node) -> None:
    """Refuse that an active node gets a child that it could not rely on, with `CommandError`."""
    if isinstance(parent, Node) and parent.is_active and not node.is_active:
        raise CommandError(
            f"Inactive '{node.name}' can't be a {name} child of active '{parent.name}'"
        )


def repoint(edge: Edge, node: Node) -> None:
    """Let an edge lead to another node; for use within `Graph.change`."""
    edge.node.parents.remove(edge)
    edge.node = node
    node.parents.append(edge)
