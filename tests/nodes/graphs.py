# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Small graphs for tests: roots that send nothing by themselves, storage, and layers over it."""

from __future__ import annotations

import asyncio

from nbdjobs.errors import CommandError
from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.graph import Edge, Graph, Role, Root
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.permissions import ALL, NONE, Permission
from tests.nodes.faults import MemoryNode

READ = Permission.CONSISTENT_READ
WRITE = Permission.WRITE
RESIZE = Permission.RESIZE
NO_WRITE = READ | Permission.WRITE_UNCHANGED


class PassiveRoot(Root):
    """A root that sends nothing by itself; the test says when it is idle."""

    def __init__(self, name: str = "job 'j'"):
        super().__init__()
        self.name = name
        self.holds = 0
        self.is_idle = asyncio.Event()
        self.is_idle.set()

    def describe(self) -> str:
        return self.name

    def hold(self) -> None:
        self.holds += 1

    def release(self) -> None:
        self.holds -= 1

    async def idle(self) -> None:
        await self.is_idle.wait()


class Storage(MemoryNode):
    """Remembers which permissions count, and can refuse some.

    Attributes:
        refused: What it does not give.
        applied: What users need and share, as last told.
        acquired: What it holds, as a file would hold locks: more than needed until told so.
    """

    def __init__(self, name: str, *, refused: Permission = NONE, is_read_only: bool = False):
        super().__init__(64 * 512, name=name, config=NodeConfig(is_read_only=is_read_only))
        self.refused = refused
        self.applied = (NONE, ALL)
        self.acquired = NONE

    def check_permissions(self, needed: Permission, shared: Permission) -> None:
        self.acquired |= needed
        super().check_permissions(needed, shared)
        if needed & self.refused:
            raise CommandError(f"Node '{self.name}' cannot give that")

    def apply_permissions(self, needed: Permission, shared: Permission) -> None:
        self.applied = (needed, shared)
        self.acquired = needed


class Layer(Storage):
    """Passes on what its users need and share, and adds to it."""

    def __init__(self, name: str, *, adds: Permission = NONE, allows: Permission = ALL):
        super().__init__(name)
        self.adds = adds
        self.allows = allows

    def child_permissions(
        self, edge: Edge, needed: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        return needed | self.adds, shared & self.allows


def make_graph(*nodes: Node) -> Graph:
    graph = Graph()
    for node in nodes:
        graph.add(node)
    return graph


def use(graph: Graph, parent: Node, child: Node, name: str = "file") -> Edge:
    return graph.attach(parent, name, child, Role.FILTERED)


def use_by_root(
    graph: Graph, node: Node, needed: Permission = READ, shared: Permission = ALL
) -> Edge:
    return graph.attach(PassiveRoot(), "root", node, Role.ROOT, needed=needed, shared=shared)
