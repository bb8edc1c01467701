# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes import copy_before_write
from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.copy_before_write import (
    CbwSettings,
    CopyBeforeWrite,
    OnCbwError,
)
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.status import HOLE
from tests.jobs.rig import CLUSTER, Rig, turns
from tests.nodes.faults import MemoryNode, Op

NEW = b"new content" * 100
BREAK_SNAPSHOT = CbwSettings(on_cbw_error=OnCbwError.BREAK_SNAPSHOT)
PATIENT = CbwSettings()


@asynccontextmanager
async def guarded(options: CbwSettings = PATIENT, rig: Rig | None = None) -> AsyncIterator[Rig]:
    """A disk whose writes are guarded, with nobody copying in the background."""
    rig = rig or Rig()
    node = CopyBeforeWrite("flt", NodeConfig(can_unmap=True), options, rig.clock)
    async with rig.graph.drained(rig.source):
        copy_before_write.insert(rig.graph, rig.source, rig.target, node)
        node.arm()
    yield rig
    await node.settled()
    async with rig.graph.drained(node):
        await copy_before_write.remove(rig.graph, node)
    rig.assert_as_before()


def is_safe(rig: Rig, *clusters: int) -> bool:
    return all(
        rig.target.content[n * CLUSTER : (n + 1) * CLUSTER]
        == rig.before[n * CLUSTER : (n + 1) * CLUSTER]
        for n in clusters
    )


def test_a_write_waits_until_the_old_cluster_is_on_the_target() -> None:
    async def main() -> None:
        async with guarded() as rig:
            async with rig.target.hold(Op.WRITE) as gate:
                write = asyncio.create_task(rig.write(512, NEW))
                await gate.reached()
                assert rig.source.content == rig.before
            await write
            assert is_safe(rig, 0)
            assert not is_safe(rig, 1)
            assert rig.source.content[512 : 512 + len(NEW)] == NEW

    asyncio.run(main())


def test_a_write_over_several_clusters_saves_them_all() -> None:
    async def main() -> None:
        async with guarded() as rig:
            await rig.write(CLUSTER - 1, bytes(CLUSTER + 2), fua=True)
            assert is_safe(rig, 0, 1, 2)
            assert not is_safe(rig, 3)
            assert rig.source.requests_of(Op.WRITE)[-1].is_fua
            assert not rig.target.requests_of(Op.FLUSH)

    asyncio.run(main())


def test_zeroes_and_discards_save_what_they_replace() -> None:
    async def main() -> None:
        async with guarded() as rig:
            await rig.guest.pwrite_zeroes(10, 20)
            await rig.guest.pdiscard(2 * CLUSTER + 10, 20)
            assert is_safe(rig, 0, 2)
            assert not is_safe(rig, 1)
            assert rig.source.content[10:30] == bytes(20)
            assert rig.source.content[2 * CLUSTER + 10 : 2 * CLUSTER + 30] == bytes(20)

    asyncio.run(main())


def test_a_discard_that_the_disk_ignores_saves_nothing() -> None:
    async def main() -> None:
        source = MemoryNode(4 * CLUSTER, name="s", config=NodeConfig(can_unmap=False))
        async with guarded(rig=Rig(source)) as rig:
            await rig.guest.pdiscard(0, CLUSTER)
            assert not rig.target.requests
            assert not source.requests_of(Op.DISCARD)

    asyncio.run(main())


def test_a_second_write_to_a_safe_cluster_goes_straight_through() -> None:
    async def main() -> None:
        async with guarded() as rig:
            await rig.write(0, NEW)
            asked = len(rig.target.requests)
            await rig.write(100, NEW)
            assert len(rig.target.requests) == asked

    asyncio.run(main())


def test_everything_else_is_the_file_below() -> None:
    async def main() -> None:
        async with guarded() as rig:
            rig.source.content[CLUSTER : 2 * CLUSTER] = bytes(CLUSTER)
            buffer = memoryview(bytearray(1000))
            await rig.guest.pread(7, buffer)
            assert buffer == rig.source.content[7:1007]
            await rig.guest.flush()
            assert rig.source.counts[Op.FLUSH] == 1
            assert await rig.guest.block_status(CLUSTER, CLUSTER) == (CLUSTER, HOLE)
            node = rig.filter
            assert node.is_known_data(0, 1) is rig.source.is_known_data(0, 1)
            assert node.size == rig.source.size
            assert node.filename == rig.source.filename
            assert node.allocated_size == rig.source.allocated_size
            assert node.cluster_size == rig.source.cluster_size
            assert node.filtered is rig.source
            assert not rig.target.requests

    asyncio.run(main())


@pytest.mark.parametrize("side", ["source", "target"])
def test_break_guest_write_fails_the_write_and_changes_nothing(side: str) -> None:
    async def main() -> None:
        async with guarded() as rig:
            if side == "source":
                rig.source.fail(Op.READ, errno.EIO)
            else:
                rig.target.fail(Op.WRITE, errno.ENOSPC)
            with pytest.raises(NodeError) as caught:
                await rig.write(0, NEW)
            assert caught.value.errno == (errno.EIO if side == "source" else errno.ENOSPC)
            assert rig.source.content == rig.before
            assert rig.filter.snapshot_error is None
            await rig.write(0, NEW)  # the fault is over
            assert is_safe(rig, 0)

    asyncio.run(main())


def test_break_snapshot_lets_the_write_go_on_and_tells() -> None:
    async def main() -> None:
        async with guarded(BREAK_SNAPSHOT) as rig:
            told: list[NodeError | None] = []
            rig.filter.on_broken = lambda: told.append(rig.filter.snapshot_error)
            rig.target.fail(Op.WRITE, errno.ENOSPC, times=None)
            await rig.write(0, NEW)
            await rig.write(CLUSTER, NEW)
            assert rig.source.content[: len(NEW)] == NEW
            assert rig.source.content[CLUSTER : CLUSTER + len(NEW)] == NEW
            assert [error.errno for error in told if error] == [errno.ENOSPC]
            assert rig.target.counts[Op.WRITE] == 1  # nothing is saved in vain

    asyncio.run(main())


def test_a_write_that_waited_too_long_fails_while_its_copy_goes_on() -> None:
    async def main() -> None:
        async with guarded(CbwSettings(cbw_timeout=45)) as rig:
            async with rig.target.hold(Op.WRITE) as gate:
                write = asyncio.create_task(rig.write(0, NEW))
                await gate.reached()
                rig.clock.advance(44)
                await turns()
                assert not write.done()
                rig.clock.advance(1)
                with pytest.raises(NodeError) as caught:
                    await write
                assert caught.value.errno == errno.ETIMEDOUT
                assert rig.source.content == rig.before
                again = asyncio.create_task(rig.write(0, NEW))
                await turns()
            await again
            assert is_safe(rig, 0)
            assert rig.target.counts[Op.WRITE] == 1
            assert rig.source.content[: len(NEW)] == NEW

    asyncio.run(main())


def test_a_late_copy_cannot_mend_a_snapshot_that_a_timeout_broke() -> None:
    options = CbwSettings(on_cbw_error=OnCbwError.BREAK_SNAPSHOT, cbw_timeout=1)

    async def main() -> None:
        async with guarded(options) as rig:
            async with rig.source.hold(Op.READ) as gate:
                write = asyncio.create_task(rig.write(0, NEW))
                other = asyncio.create_task(rig.write(CLUSTER, NEW))
                await gate.reached(2)
                rig.clock.advance(1)
                await asyncio.gather(write, other)
                assert rig.source.content[: len(NEW)] == NEW
            await rig.filter.settled()
            assert not is_safe(rig, 0)  # the copy did read too late
            error = rig.filter.snapshot_error
            assert error is not None
            assert error.errno == errno.ETIMEDOUT

    asyncio.run(main())


def test_a_cancelled_request_leaves_its_copy_in_flight() -> None:
    async def main() -> None:
        async with guarded() as rig:
            async with rig.target.hold(Op.WRITE) as gate:
                write = asyncio.create_task(rig.write(0, NEW))
                await gate.reached()
                write.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await write
                assert rig.guest.in_flight == 0
                assert rig.target.in_flight == 1
            await rig.filter.settled()
            assert is_safe(rig, 0)
            assert rig.source.content == rig.before

    asyncio.run(main())


def test_a_drained_section_waits_for_a_copy_whose_guest_has_gone() -> None:
    async def main() -> None:
        async with guarded() as rig:
            async with rig.target.hold(Op.WRITE) as gate:
                write = asyncio.create_task(rig.write(0, NEW))
                await gate.reached()
                write.cancel()

                async def drain() -> None:
                    async with rig.graph.drained(rig.target):
                        assert rig.target.in_flight == 0

                drained = asyncio.create_task(drain())
                await turns()
                assert not drained.done()
            await drained

    asyncio.run(main())


def test_abandoning_frees_everyone_who_waits() -> None:
    async def main() -> None:
        async with guarded() as rig:
            async with rig.target.hold(Op.WRITE) as gate:
                writes = [asyncio.create_task(rig.write(n, NEW)) for n in (0, 100, CLUSTER)]
                await gate.reached(2)
                rig.filter.abandon()
                await asyncio.gather(*writes)
                await rig.write(2 * CLUSTER, NEW)
                assert rig.target.counts[Op.WRITE] == 2
            assert rig.source.content[2 * CLUSTER : 2 * CLUSTER + len(NEW)] == NEW

    asyncio.run(main())


def test_the_filter_keeps_others_from_writing_below_it() -> None:
    async def main() -> None:
        async with guarded() as rig:
            with pytest.raises(CommandError) as caught:
                Device(rig.graph, rig.source, needed=Permission.WRITE)
            assert str(caught.value) == (
                "Permission conflict on node 's': permissions 'write' are both required by an"
                " unnamed block device (uses node 's' as 'root' child) and unshared by node 'flt'"
                " (uses node 's' as 'file' child)."
            )
            # As x-debug-query-block-graph of QEMU 7.2 shows a filter with a writing user.
            shown = {name: (edge.needed, edge.shared) for name, edge in rig.filter.edges.items()}
            read, write = Permission.CONSISTENT_READ, Permission.WRITE
            unchanged = Permission.WRITE_UNCHANGED
            assert shown == {
                "file": (read | write, read | unchanged),
                "target": (write, read | write | unchanged),
            }
            other = Device(rig.graph, rig.target, needed=Permission.WRITE)
            await other.close()

    asyncio.run(main())


def test_a_refused_filter_leaves_nothing_behind() -> None:
    async def main() -> None:
        rig = Rig(target=MemoryNode(4 * CLUSTER, name="t", config=NodeConfig(is_read_only=True)))
        node = CopyBeforeWrite("flt", NodeConfig(), PATIENT)
        async with rig.graph.drained(rig.source):
            with pytest.raises(CommandError, match="Block node is read-only"):
                copy_before_write.insert(rig.graph, rig.source, rig.target, node)
        rig.assert_as_before()

    asyncio.run(main())


def test_the_least_cluster_size_is_a_power_of_two() -> None:
    with pytest.raises(CommandError, match="min-cluster-size needs to be a power of 2"):
        CbwSettings(min_cluster_size=96 * 1024)


def test_an_inline_copy_makes_no_task() -> None:
    async def main() -> None:
        async with guarded() as rig:
            write = rig.write(0, NEW)
            with pytest.raises(StopIteration):
                write.send(None)
            assert is_safe(rig, 0)
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
