# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The graph: names, edges, dropping, drained sections. Error texts are qemu-storage-daemon's."""

from __future__ import annotations

import asyncio

import pytest

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.graph import Role
from nbdjobs.nodes.permissions import ALL
from tests.nodes.faults import MemoryNode, Op
from tests.nodes.graphs import (
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

# Names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("1e2", "Invalid node-name: '1e2'"),
        ("", "Invalid node-name: ''"),
        ("#block1", "Invalid node-name: '#block1'"),
        ("größe", "Invalid node-name: 'größe'"),
        ("disk\n", "Invalid node-name: 'disk\n'"),
        ("disk", "Duplicate nodes with node-name='disk'"),
        ("a" * 32, "Node name too long"),
    ],
)
def test_a_bad_name_is_refused(name: str, message: str) -> None:
    graph = make_graph(Storage("disk"))
    with pytest.raises(CommandError) as refusal:
        graph.new_name(name)
    assert refusal.value.description == message


def test_names_up_to_31_characters_are_taken_and_made_up_ones_never_repeat() -> None:
    graph = make_graph()
    assert graph.new_name("a" * 31) == "a" * 31
    made_up = {graph.new_name(None) for _ in range(1100)}
    assert len(made_up) == 1100
    assert all(name.startswith("#block") for name in made_up)


def test_find_names_the_node_it_misses() -> None:
    node = Storage("disk")
    graph = make_graph(node)
    assert graph.find("disk") is node
    with pytest.raises(CommandError, match=r"^Failed to find node with node-name='nope'$"):
        graph.find("nope")


def test_a_name_taken_while_a_node_was_being_opened_is_refused() -> None:
    graph = make_graph(first := Storage("disk"))
    with pytest.raises(CommandError, match="Duplicate nodes with node-name='disk'"):
        graph.add(Storage("disk"))
    assert graph.find("disk") is first


# Edges


def test_an_edge_is_known_to_both_its_ends_until_it_is_detached() -> None:
    disk, layer = Storage("disk"), Layer("layer")
    graph = make_graph(disk, layer)
    edge = use(graph, layer, disk)
    assert layer.edges == {"file": edge}
    assert disk.parents == [edge]
    graph.detach(edge)
    assert not layer.edges
    assert not disk.parents


def test_a_node_may_not_come_to_use_itself() -> None:
    bottom, middle, top = Layer("bottom"), Layer("middle"), Layer("top")
    graph = make_graph(bottom, middle, top)
    use(graph, middle, bottom)
    use(graph, top, middle)
    with pytest.raises(CommandError) as refusal:
        use(graph, bottom, top)
    assert str(refusal.value) == "Making 'top' a file child of 'bottom' would create a cycle"
    assert not bottom.edges
    assert not top.parents


def test_replace_moves_users_but_not_those_kept_nor_those_below_the_new_node() -> None:
    disk, overlay, mirror = Storage("disk"), Layer("overlay"), Layer("mirror")
    target = Layer("target")
    graph = make_graph(disk, overlay, mirror, target)
    ours = use_by_root(graph, disk)
    kept = use_by_root(graph, disk)
    over = use(graph, overlay, disk)
    filtered = use(graph, mirror, disk)
    to_target = use(graph, mirror, target, "target")
    below = use(graph, target, disk)
    graph.replace(disk, mirror, keep=[kept])
    assert [ours.node, over.node] == [mirror, mirror]
    assert [kept.node, filtered.node, below.node] == [disk, disk, disk]
    assert to_target.node is target
    assert disk.parents == [kept, filtered, below]


def test_replace_back_and_forth_leaves_what_was() -> None:
    disk, layer = Storage("disk"), Layer("layer", allows=ALL & ~RESIZE)
    graph = make_graph(disk, layer)
    users = [use_by_root(graph, disk), use_by_root(graph, disk, READ | WRITE)]
    below = use(graph, layer, disk)
    graph.replace(disk, layer)
    assert disk.parents == [below]
    assert (below.needed, below.shared) == (READ | WRITE, ALL & ~RESIZE)
    graph.replace(layer, disk)
    graph.detach(below)
    assert not layer.parents
    assert disk.parents == users
    assert disk.applied == (READ | WRITE, ALL)


# Dropping


def test_drop_closes_what_only_the_dropped_node_used() -> None:
    async def scenario() -> None:
        top, left, right, bottom = (Layer(name) for name in ("top", "left", "right", "bottom"))
        shared, owned = Storage("shared"), Storage("owned")
        owned.is_owned_by_user = True
        graph = make_graph(top, left, right, bottom, shared, owned)
        use(graph, top, left, "left")
        use(graph, top, right, "right")
        for parent in (left, right):
            use(graph, parent, bottom)
        use(graph, bottom, shared, "shared")
        use(graph, bottom, owned, "owned")
        other = use_by_root(graph, shared)
        await graph.drop(top)
        assert set(graph.nodes) == {"shared", "owned"}
        assert all(node.was_closed for node in (top, left, right, bottom))
        assert not shared.was_closed
        assert shared.parents == [other]
        assert not owned.was_closed
        assert not owned.parents

    asyncio.run(scenario())


def test_a_node_still_has_its_children_while_it_closes() -> None:
    class WritesAtTheEnd(Layer):
        async def close(self) -> None:
            await self.edges["file"].node.pwrite(0, memoryview(b"x" * 512))

    async def scenario() -> None:
        top, disk = WritesAtTheEnd("top"), Storage("disk")
        graph = make_graph(top, disk)
        use(graph, top, disk)
        await graph.drop(top)
        assert disk.content[:512] == b"x" * 512
        assert disk.was_closed

    asyncio.run(scenario())


class StuckAtClose(Layer):
    def __init__(self, name: str):
        super().__init__(name)
        self.closing = asyncio.Event()
        self.may_close = asyncio.Event()

    async def close(self) -> None:
        self.closing.set()
        await self.may_close.wait()


def test_cancelling_a_drop_still_closes_the_children() -> None:
    async def scenario() -> None:
        top, left, right = StuckAtClose("top"), Storage("left"), Storage("right")
        graph = make_graph(top, left, right)
        use(graph, top, left, "left")
        use(graph, top, right, "right")
        drop = asyncio.create_task(graph.drop(top))
        await top.closing.wait()
        drop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drop
        assert left.was_closed
        assert right.was_closed
        assert not graph.nodes

    asyncio.run(scenario())


def test_one_child_that_fails_to_close_does_not_keep_the_others_open() -> None:
    class FailsToClose(Storage):
        async def close(self) -> None:
            raise NodeError(5, "no way")

    async def scenario() -> None:
        top, left, right = Layer("top"), FailsToClose("left"), Storage("right")
        graph = make_graph(top, left, right)
        use(graph, top, left, "left")
        use(graph, top, right, "right")
        with pytest.raises(NodeError, match="no way"):
            await graph.drop(top)
        assert right.was_closed
        assert not graph.nodes

    asyncio.run(scenario())


def test_a_name_is_free_while_its_node_closes_and_its_new_bearer_is_left_alone() -> None:
    async def scenario() -> None:
        closing = StuckAtClose("disk")
        graph = make_graph(closing)
        drop = asyncio.create_task(graph.drop(closing))
        await closing.closing.wait()
        graph.add(new := Storage(graph.new_name("disk")))
        await graph.drop_if_unused(closing)
        closing.may_close.set()
        await drop
        assert graph.find("disk") is new
        assert not new.was_closed

    asyncio.run(scenario())


# Drained sections


def write(device: Device, byte: bytes = b"x") -> asyncio.Task[None]:
    return asyncio.create_task(device.pwrite(0, memoryview(byte * 512)))


async def let_all_run() -> None:
    """Give every task that can run the chance to do so."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_drained_section_begins_when_requests_in_flight_have_ended() -> None:
    async def scenario() -> None:
        disk, layer = MemoryNode(4096, name="disk"), Layer("layer")
        graph = make_graph(disk, layer)
        use(graph, layer, disk)
        devices = [
            Device(graph, disk, needed=WRITE),
            Device(graph, disk, needed=WRITE),
            Device(graph, layer, needed=WRITE),
        ]
        gate = disk.hold(Op.WRITE)
        first = write(devices[0])
        await gate.reached()

        async def drain() -> None:
            async with graph.drained(disk):
                assert first.done()
                assert disk.in_flight == 0
                late.extend(write(device) for device in devices)
                await let_all_run()
                assert disk.counts[Op.WRITE] == 1
                assert not any(task.done() for task in late)

        late: list[asyncio.Task[None]] = []
        section = asyncio.create_task(drain())
        await let_all_run()
        assert not section.done()
        gate.release()
        await section
        await asyncio.gather(first, *late)

    asyncio.run(scenario())


def test_a_drained_section_leaves_other_disks_alone() -> None:
    async def scenario() -> None:
        disk, other = MemoryNode(4096, name="disk"), MemoryNode(4096, name="other")
        graph = make_graph(disk, other)
        device = Device(graph, other, needed=WRITE)
        async with graph.drained(disk):
            await device.pwrite(0, memoryview(b"y" * 512))

    asyncio.run(scenario())


def test_cancelling_the_wait_for_a_drained_section_lets_requests_go_on() -> None:
    async def scenario() -> None:
        disk = MemoryNode(4096)
        graph = make_graph(disk)
        device = Device(graph, disk, needed=WRITE)
        gate = disk.hold(Op.WRITE)
        stuck = write(device)
        await gate.reached()

        async def drain() -> None:
            async with graph.drained(disk):
                pytest.fail("a request is still in flight")

        section = asyncio.create_task(drain())
        await let_all_run()
        held = write(device)
        await let_all_run()
        section.cancel()
        with pytest.raises(asyncio.CancelledError):
            await section
        await gate.reached(2)
        gate.release()
        await asyncio.gather(stuck, held)
        assert not graph._drains

    asyncio.run(scenario())


def test_an_error_inside_ends_the_drained_section() -> None:
    async def scenario() -> None:
        disk = MemoryNode(4096)
        graph = make_graph(disk)
        device = Device(graph, disk, needed=WRITE)
        with pytest.raises(CommandError, match="no"):
            async with graph.drained(disk):
                raise CommandError("no")
        await device.pwrite(0, memoryview(b"y" * 512))

    asyncio.run(scenario())


def test_drained_sections_may_overlap_and_nest() -> None:
    async def scenario() -> None:
        disk = MemoryNode(4096)
        graph = make_graph(disk)
        device = Device(graph, disk, needed=WRITE)
        async with graph.drained(disk):
            async with graph.drained(disk):
                held = write(device)
            await let_all_run()
            assert not held.done()
        await held

    asyncio.run(scenario())


def test_a_root_attached_while_a_drained_section_lasts_is_held_to_its_end() -> None:
    async def scenario() -> None:
        disk, layer, other = Storage("disk"), Layer("layer"), Storage("other")
        graph = make_graph(disk, layer, other)
        use(graph, layer, disk)
        async with graph.drained(disk):
            above, beside = PassiveRoot(), PassiveRoot()
            graph.attach(above, "root", layer, Role.ROOT)
            graph.attach(beside, "root", other, Role.ROOT)
            assert (above.holds, beside.holds) == (1, 0)
        assert above.holds == 0

    asyncio.run(scenario())


def test_a_root_that_comes_to_reach_the_drained_node_through_others_is_held() -> None:
    async def scenario() -> None:
        disk, layer, old = Storage("disk"), Layer("layer"), Storage("old")
        graph = make_graph(disk, layer, old)
        by_edge, by_replace = PassiveRoot(), PassiveRoot()
        graph.attach(by_edge, "root", layer, Role.ROOT)
        graph.attach(by_replace, "root", old, Role.ROOT)
        async with graph.drained(disk):
            use(graph, layer, disk)
            graph.replace(old, disk)
            assert (by_edge.holds, by_replace.holds) == (1, 1)
        assert (by_edge.holds, by_replace.holds) == (0, 0)

    asyncio.run(scenario())


def test_a_root_that_loses_one_of_its_edges_is_held_to_the_end() -> None:
    async def scenario() -> None:
        source, target = Storage("source"), Storage("target")
        graph = make_graph(source, target)
        job = PassiveRoot()
        graph.attach(job, "main node", source, Role.ROOT)
        to_target = graph.attach(job, "target", target, Role.ROOT)
        async with graph.drained(source, target):
            graph.detach(to_target)
            assert job.holds == 1
        assert job.holds == 0

    asyncio.run(scenario())


def test_a_refused_attach_holds_nobody() -> None:
    async def scenario() -> None:
        disk = Storage("disk", is_read_only=True)
        graph = make_graph(disk)
        root = PassiveRoot()
        async with graph.drained(disk):
            with pytest.raises(CommandError):
                graph.attach(root, "root", disk, Role.ROOT, needed=WRITE)
            assert root.holds == 0

    asyncio.run(scenario())


def test_a_root_that_comes_during_the_wait_is_waited_for_too() -> None:
    async def scenario() -> None:
        disk = Storage("disk")
        graph = make_graph(disk)
        first, late = PassiveRoot(), PassiveRoot()
        graph.attach(first, "root", disk, Role.ROOT)
        first.is_idle.clear()
        late.is_idle.clear()
        began = asyncio.Event()

        async def drain() -> None:
            async with graph.drained(disk):
                began.set()

        section = asyncio.create_task(drain())
        await let_all_run()
        graph.attach(late, "root", disk, Role.ROOT)
        first.is_idle.set()
        await let_all_run()
        assert not began.is_set()
        late.is_idle.set()
        await section
        assert (first.holds, late.holds) == (0, 0)

    asyncio.run(scenario())


def test_two_jobs_may_drain_each_other_at_once() -> None:
    """Each holds the other while it waits; being held is not being busy."""

    async def scenario() -> None:
        disk = Storage("disk")
        graph = make_graph(disk)
        jobs = [PassiveRoot(), PassiveRoot()]
        for job in jobs:
            graph.attach(job, "root", disk, Role.ROOT)
        inside = asyncio.Barrier(2)

        async def drain() -> None:
            async with graph.drained(disk):
                await inside.wait()

        await asyncio.gather(drain(), drain())
        assert [job.holds for job in jobs] == [0, 0]

    asyncio.run(scenario())


def test_a_filter_put_in_while_writers_write_is_seen_by_each_write_as_a_whole() -> None:
    """Every write goes either only to the disk or through the filter; none is lost."""

    class Counting(Layer):
        async def _pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
            await asyncio.sleep(0)
            self.counts[Op.WRITE] += 1
            await self.edges["file"].node.pwrite(offset, data, fua=fua)

    async def scenario() -> None:
        disk, layer = MemoryNode(64 * 512, name="disk"), Counting("layer")
        graph = make_graph(disk, layer)
        device = Device(graph, disk, needed=WRITE)

        async def writer(block: int) -> None:
            for _ in range(20):
                await device.pwrite(block * 512, memoryview(bytes([block + 1]) * 512))
                await asyncio.sleep(0)

        writers = [asyncio.create_task(writer(block)) for block in range(8)]
        for _ in range(5):
            await asyncio.sleep(0)
            async with graph.drained(disk):
                assert disk.in_flight == 0
                below = use(graph, layer, disk)
                graph.replace(disk, layer)
            await asyncio.sleep(0)
            async with graph.drained(layer):
                assert disk.in_flight == 0
                graph.replace(layer, disk)
                graph.detach(below)
        await asyncio.gather(*writers)
        assert disk.counts[Op.WRITE] == 160
        assert 0 < layer.counts[Op.WRITE] < 160
        assert disk.content[: 8 * 512 : 512] == bytes(range(1, 9))

    asyncio.run(scenario())


def test_a_node_may_be_dropped_while_it_is_drained() -> None:
    async def scenario() -> None:
        disk, layer = Storage("disk"), Layer("layer")
        graph = make_graph(disk, layer)
        use(graph, layer, disk)
        device = Device(graph, layer)
        async with graph.drained(disk):
            await device.close()
            assert not graph.nodes
        assert disk.was_closed

    asyncio.run(scenario())
