# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Permissions in the graph. Error texts, and which users they name, are qemu-storage-daemon's."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.errors import CommandError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.config import Limits
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.graph import Edge, Graph, Role, Root, cumulative_permissions
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.permissions import ALL, NONE, Permission
from tests.nodes.faults import MemoryNode
from tests.nodes.graphs import (
    NO_WRITE,
    READ,
    RESIZE,
    WRITE,
    Layer,
    PassiveRoot,
    Storage,
    make_graph,
    use,
    use_by_root,
)

BLOCKS_OF_4K = Limits(request_alignment=4096)


def refusal_of(graph: Graph, parent: Node | Root, node: Node, needed: Permission) -> str:
    with pytest.raises(CommandError) as refusal:
        graph.attach(parent, "root", node, Role.ROOT, needed=needed)
    return refusal.value.description


def test_the_newest_users_are_reported_first() -> None:
    disk = Storage("s")
    old, new = Layer("c1", allows=NO_WRITE), Layer("c2", allows=NO_WRITE)
    user = Layer("r1")
    graph = make_graph(disk, old, new, user)
    for layer in (old, new, user):
        use(graph, layer, disk)
    assert refusal_of(graph, PassiveRoot(), user, READ | WRITE | RESIZE) == (
        "Permission conflict on node 's': permissions 'write, resize' are both required by"
        " node 'r1' (uses node 's' as 'file' child) and unshared by"
        " node 'c2' (uses node 's' as 'file' child)."
    )


def test_the_newest_of_several_writers_is_reported() -> None:
    disk = Storage("s")
    graph = make_graph(disk)
    writer = Layer("r2")
    graph.add(writer)
    use(graph, writer, disk)
    Device(graph, writer, needed=READ | WRITE)
    Device(graph, disk, needed=READ | WRITE, name="drive0")
    Device(graph, disk, needed=READ | WRITE)
    reader = Layer("r1", allows=NO_WRITE)
    graph.add(reader)
    with pytest.raises(CommandError) as refusal:
        use(graph, reader, disk)
    assert refusal.value.description == (
        "Permission conflict on node 's': permissions 'write' are both required by"
        " an unnamed block device (uses node 's' as 'root' child) and unshared by"
        " node 'r1' (uses node 's' as 'file' child)."
    )
    assert not reader.edges


def test_a_filter_put_in_turns_the_order_of_users_round() -> None:
    """As in QEMU, which moves them one by one, the newest first."""
    disk, added, reader = Storage("s"), Layer("f"), Layer("c2", allows=NO_WRITE)
    users = [Layer("r1"), Layer("r2")]
    graph = make_graph(disk, added, reader, *users)
    for user in users:
        use(graph, user, disk)
        Device(graph, user, needed=READ | WRITE)
    use(graph, added, disk)
    graph.replace(disk, added)
    with pytest.raises(CommandError) as refusal:
        use(graph, reader, added)
    assert refusal.value.description == (
        "Permission conflict on node 'f': permissions 'write' are both required by"
        " node 'r1' (uses node 'f' as 'file' child) and unshared by"
        " node 'c2' (uses node 'f' as 'file' child)."
    )


def test_a_named_device_is_called_by_its_name() -> None:
    graph = make_graph(disk := Storage("s"))
    Device(graph, disk, name="drive0", shared=READ)
    assert refusal_of(graph, PassiveRoot("backup job 'j'"), disk, WRITE) == (
        "Permission conflict on node 's': permissions 'write' are both required by"
        " backup job 'j' (uses node 's' as 'root' child) and unshared by"
        " block device 'drive0' (uses node 's' as 'root' child)."
    )


def test_a_read_only_node_takes_no_writer_wherever_it_is_in_the_graph() -> None:
    disk, layer = Storage("disk", is_read_only=True), Layer("layer")
    graph = make_graph(disk, layer)
    use(graph, layer, disk)
    assert refusal_of(graph, PassiveRoot(), layer, WRITE) == "Block node is read-only"
    use_by_root(graph, layer, READ | RESIZE)


def test_the_last_incomplete_block_may_not_be_written_without_growing() -> None:
    disk = MemoryNode(1024, name="b", limits=BLOCKS_OF_4K)
    graph = make_graph(disk)
    use_by_root(graph, disk, READ)
    assert refusal_of(graph, PassiveRoot(), disk, WRITE) == (
        "Cannot get 'write' permission without 'resize':"
        " Image size is not a multiple of request alignment"
    )
    grower = use_by_root(graph, disk, WRITE | RESIZE)
    use_by_root(graph, disk, WRITE)
    graph.detach(grower)  # giving up may leave what could not be asked for: it never fails
    assert len(disk.parents) == 2


def test_giving_up_what_others_could_not_do_without_leaves_all_as_it_was_below() -> None:
    class Odd(Storage):
        @property
        def size(self) -> int:
            return 1024

    disk, layer = Odd("disk"), Layer("layer")
    graph = make_graph(disk, layer)
    disk.set_limits(BLOCKS_OF_4K)
    below = use(graph, layer, disk)
    grower = use_by_root(graph, layer, WRITE | RESIZE)
    use_by_root(graph, layer, WRITE)
    graph.detach(grower)
    assert below.needed == disk.applied[0] == WRITE | RESIZE


def test_exports_do_not_let_the_size_change() -> None:
    graph = make_graph(disk := Storage("disk"))
    device = Device(graph, disk)
    assert permissions.qapi_names(device.edge.needed) == ["consistent-read"]
    assert permissions.qapi_names(device.edge.shared) == [
        "write-unchanged",
        "write",
        "consistent-read",
    ]


def test_set_permissions_refused_leaves_the_old_ones() -> None:
    disk = Storage("disk", refused=RESIZE)
    graph = make_graph(disk)
    edge = use_by_root(graph, disk, READ)
    with pytest.raises(CommandError, match="cannot give that"):
        graph.set_permissions(edge, READ | RESIZE, READ)
    assert (edge.needed, edge.shared) == (READ, ALL)
    assert disk.applied == (READ, ALL)
    graph.set_permissions(edge, READ | WRITE, READ)
    assert disk.applied == (READ | WRITE, READ)


def test_a_node_that_fails_otherwise_leaves_nothing_changed_either() -> None:
    class Unlockable(Storage):
        def check_permissions(self, needed: Permission, shared: Permission) -> None:
            if needed & WRITE:
                raise OSError("no locks left")

    graph = make_graph(disk := Unlockable("disk"))
    reader = use_by_root(graph, disk)
    root = PassiveRoot()
    with pytest.raises(OSError, match="no locks left"):
        graph.attach(root, "root", disk, Role.ROOT, needed=WRITE)
    assert disk.parents == [reader]
    assert not root.edges
    assert disk.applied == (READ, ALL)


# Permissions against a model


class World:
    """A graph under random changes, and what a straightforward reading says of each."""

    def __init__(self, chance: random.Random):
        self.chance = chance
        storages = [
            Storage(f"s{n}", refused=self._some(0.1), is_read_only=chance.random() < 0.15)
            for n in range(2)
        ]
        layers = [
            Layer(f"l{n}", adds=self._some(0.15), allows=ALL & ~self._some(0.1)) for n in range(4)
        ]
        self.nodes: list[Storage] = [*storages, *layers]
        self.graph = make_graph(*self.nodes)
        self.edges: list[Edge] = []

    def _some(self, probability: float) -> Permission:
        chosen = NONE
        for permission in Permission:
            if self.chance.random() < probability:
                chosen |= permission
        return chosen

    def snapshot(self) -> object:
        """All that a refused change must leave as it was, orders included."""
        return [
            (node, list(node.edges.values()), list(node.parents), node.applied)
            for node in self.nodes
        ], [(edge, edge.node, edge.needed, edge.shared) for edge in self.edges]

    def step(self) -> None:
        match self.chance.choice(["root", "root", "node", "node", "detach", "replace", "set"]):
            case "root":
                self._attach(PassiveRoot(), "root", self._some(0.3), ALL & ~self._some(0.1))
            case "node":
                parent = self.chance.choice(self.nodes)
                if isinstance(parent, Layer) and len(parent.edges) < 2:
                    name = next(name for name in ("a", "b") if name not in parent.edges)
                    self._attach(parent, name, NONE, ALL)
            case "detach" if self.edges:
                edge = self.edges.pop(self.chance.randrange(len(self.edges)))
                self.graph.detach(edge)
            case "replace":
                old, new = self.chance.sample(self.nodes, 2)
                keep = [edge for edge in old.parents if self.chance.random() < 0.2]
                self._try(lambda: self.graph.replace(old, new, keep=keep))
            case "set":
                roots = [edge for edge in self.edges if isinstance(edge.parent, Root)]
                if roots:
                    edge = self.chance.choice(roots)
                    needed, shared = self._some(0.3), ALL & ~self._some(0.1)
                    self._try(lambda: self.graph.set_permissions(edge, needed, shared))

    def _attach(
        self, parent: Node | Root, name: str, needed: Permission, shared: Permission
    ) -> None:
        node = self.chance.choice(self.nodes)

        def attach() -> None:
            edge = self.graph.attach(
                parent, name, node, Role.FILTERED, needed=needed, shared=shared
            )
            self.edges.append(edge)

        self._try(attach)

    def _try(self, change: Callable[[], object]) -> None:
        before = self.snapshot()
        try:
            change()
        except CommandError:
            assert self.snapshot() == before

    def users_of(self, node: Node) -> list[Edge]:
        return [edge for edge in self.edges if edge.node is node]

    def expected(self, edge: Edge) -> tuple[Permission, Permission]:
        """What an edge needs and shares, by recursion from the roots."""
        if isinstance(edge.parent, Root):
            return edge.needed, edge.shared
        layer = edge.parent
        assert isinstance(layer, Layer)
        needed, shared = self.expected_in_all(layer)
        return needed | layer.adds, shared & layer.allows

    def expected_in_all(self, node: Node) -> tuple[Permission, Permission]:
        needed, shared = NONE, ALL
        for edge in self.users_of(node):
            edge_needed, edge_shared = self.expected(edge)
            needed |= edge_needed
            shared &= edge_shared
        return needed, shared

    def check(self) -> None:
        for node in self.nodes:
            users = self.users_of(node)
            assert sorted(map(id, node.parents)) == sorted(map(id, users))
            for edge in users:
                assert edge.parent.edges[edge.name] is edge
                assert (edge.needed, edge.shared) == self.expected(edge)
                for other in users:
                    assert other is edge or not edge.needed & ~other.shared
            needed, shared = self.expected_in_all(node)
            assert node.applied == cumulative_permissions(node) == (needed, shared)
            assert node.acquired == needed
            assert not needed & node.refused
            assert not (node.is_read_only and needed & permissions.WRITES)


@given(st.integers(0, 2**32))
def test_random_changes_end_in_consistent_permissions_or_change_nothing(seed: int) -> None:
    world = World(random.Random(seed))
    for _ in range(40):
        world.step()
        world.check()


def test_random_changes_are_refused_sometimes_and_only_when_they_must_be() -> None:
    """A change whose outcome would be consistent is never refused."""
    accepted = refused = 0
    for seed in range(300):
        chance = random.Random(seed)
        disk = Storage("disk")
        graph = make_graph(disk)
        users: list[tuple[Permission, Permission]] = []
        for _ in range(6):
            needed, shared = Permission(chance.randrange(16)), Permission(chance.randrange(16))
            fits = all(not needed & ~s and not n & ~shared for n, s in users)
            try:
                use_by_root(graph, disk, needed, shared)
                users.append((needed, shared))
                accepted += 1
                assert fits
            except CommandError:
                refused += 1
                assert not fits
    assert accepted > 100
    assert refused > 100
