# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""copy-before-write and snapshot-access as users put them above a disk that is being written."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.jobs.backup import BackupOptions, BackupPerf, SyncMode, start_backup
from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.copy_before_write import (
    BlockDirtyBitmap,
    CopyBeforeWrite,
    CopyBeforeWriteOptions,
    OnCbwError,
)
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import Discard
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.snapshot_access import SnapshotAccessOptions
from nbdjobs.nodes.status import DATA, HOLE, Status
from tests.jobs.rig import CLUSTER, Rig, turns
from tests.jobs.test_point_in_time import RestlessNode
from tests.nodes.faults import MemoryNode, Op

NEW = b"new" * 1000
READER = Permission.CONSISTENT_READ | Permission.WRITE  # QEMU lets it be exported writable


class Fleecing:
    """A disk whose guest goes through a copy-before-write node, and a reader of its snapshot."""

    def __init__(self, rig: Rig, node: CopyBeforeWrite, reader: Device):
        self.rig = rig
        self.filter = node
        self.reader = reader
        self.source = rig.source
        self.target = rig.target
        self.before = rig.before

    async def write(self, offset: int, data: bytes = NEW) -> None:
        await self.rig.write(offset, data)

    async def read(self, offset: int, length: int) -> bytes:
        buffer = memoryview(bytearray(b"\xaa" * length))
        await self.reader.pread(offset, buffer)
        return bytes(buffer)

    async def assert_old(self, offset: int, length: int) -> None:
        assert await self.read(offset, length) == self.before[offset : offset + length]

    async def assert_refused(self, offset: int, length: int) -> None:
        with pytest.raises(NodeError) as caught:
            await self.read(offset, length)
        assert caught.value.errno == errno.EACCES
        with pytest.raises(NodeError) as caught:
            await self.reader.block_status(offset, length)
        assert caught.value.errno == errno.EACCES
        with pytest.raises(NodeError) as caught:
            await self.reader.cache(offset, length)
        assert caught.value.errno == errno.EACCES


@asynccontextmanager
async def fleecing(rig: Rig | None = None, **options: Any) -> AsyncIterator[Fleecing]:
    rig = rig or Rig()
    cbw = CopyBeforeWriteOptions(
        driver="copy-before-write",
        node_name="cbw",
        file="s",
        target="t",
        discard=Discard.UNMAP,
        **options,
    )
    node = await open_node(rig.graph, cbw)
    assert isinstance(node, CopyBeforeWrite)
    node._clock = rig.clock
    async with rig.graph.drained(rig.source):
        rig.graph.replace(rig.source, node)
    snapshot = await open_node(
        rig.graph,
        SnapshotAccessOptions(
            driver="snapshot-access", node_name="snap", file="cbw", discard=Discard.UNMAP
        ),
    )
    reader = Device(rig.graph, snapshot, needed=READER)
    yield Fleecing(rig, node, reader)
    await reader.close()
    async with rig.graph.drained(node):
        rig.graph.replace(node, rig.source, keep=snapshot.parents)
    for each in (snapshot, node):
        each.is_owned_by_user = False
        await rig.graph.drop_if_unused(each)
    rig.assert_as_before()


def test_readers_see_the_disk_as_it_was() -> None:
    async def main() -> None:
        async with fleecing() as disk:
            await disk.assert_old(0, 4 * CLUSTER)
            assert not disk.target.requests
            await disk.write(CLUSTER + 100)
            await disk.rig.guest.pwrite_zeroes(2 * CLUSTER, CLUSTER)
            await disk.assert_old(0, 4 * CLUSTER)
            await disk.assert_old(CLUSTER - 1, 2 * CLUSTER + 2)
            assert disk.source.content != disk.before
            assert disk.reader.size == len(disk.before)
            assert disk.reader.node.filename == disk.source.filename

    asyncio.run(main())


def test_a_write_waits_for_those_who_read_its_range_in_the_source() -> None:
    async def main() -> None:
        async with fleecing() as disk:
            async with disk.source.hold(Op.READ, length=100) as gate:
                reading = asyncio.create_task(disk.read(0, 100))
                await gate.reached()
                gate.matches = lambda request: False  # type: ignore[method-assign]  # the copy goes
                write = asyncio.create_task(disk.write(50))
                elsewhere = asyncio.create_task(disk.write(CLUSTER))
                await turns()
                assert disk.source.content[50 : 50 + len(NEW)] == disk.before[50 : 50 + len(NEW)]
                assert disk.target.content[:CLUSTER] == disk.before[:CLUSTER]
                assert elsewhere.done()
                # Who comes now finds the old content on the target, and waits for nobody.
                await disk.assert_old(0, CLUSTER)
                assert not write.done()
            assert await reading == disk.before[:100]
            await write
            assert disk.source.content[50 : 50 + len(NEW)] == NEW

    asyncio.run(main())


def test_a_write_with_nothing_left_to_copy_waits_for_readers_too() -> None:
    async def main() -> None:
        async with fleecing() as disk:
            async with disk.source.hold(Op.READ, length=100) as gate:
                reading = asyncio.create_task(disk.read(0, 100))
                await gate.reached()
                gate.matches = lambda request: False  # type: ignore[method-assign]
                await disk.filter.block_copy.copy(0, CLUSTER)  # somebody else has copied it
                assert not disk.filter.block_copy.needs_copy(0, CLUSTER)
                writes = [
                    asyncio.create_task(disk.write(0)),
                    asyncio.ensure_future(disk.rig.guest.pwrite_zeroes(0, 50)),
                    asyncio.ensure_future(disk.rig.guest.pdiscard(0, 50)),
                ]
                await turns()
                assert disk.source.content == disk.before
            assert await reading == disk.before[:100]
            await asyncio.gather(*writes)

    asyncio.run(main())


def test_a_cancelled_reader_lets_writes_go_on() -> None:
    async def main() -> None:
        async with fleecing() as disk:
            async with disk.source.hold(Op.READ, length=100) as gate:
                reading = asyncio.create_task(disk.read(0, 100))
                await gate.reached()
                gate.matches = lambda request: False  # type: ignore[method-assign]
                write = asyncio.create_task(disk.write(0))
                await turns()
                assert not write.done()
                reading.cancel()
                await write
            assert disk.filter.snapshot.readers == 0

    asyncio.run(main())


def test_no_read_takes_the_short_cut_past_the_freezing() -> None:
    async def main() -> None:
        async with fleecing() as disk:
            buffer = memoryview(bytearray(512))
            assert not disk.reader.node.pread_now(0, buffer, False)
            assert disk.reader.node.stored_at(0, 512, False) is None

    asyncio.run(main())


def test_a_broken_snapshot_is_refused_and_reads_in_flight_are_still_right() -> None:
    async def main() -> None:
        async with fleecing(on_cbw_error=OnCbwError.BREAK_SNAPSHOT) as disk:
            async with disk.source.hold(Op.READ, length=100) as gate:
                reading = asyncio.create_task(disk.read(0, 100))
                await gate.reached()
                gate.matches = lambda request: False  # type: ignore[method-assign]
                disk.target.fail(Op.WRITE, errno.ENOSPC)
                write = asyncio.create_task(disk.write(0))
                await turns()
                assert not write.done()
                await disk.assert_refused(3 * CLUSTER, 512)
            assert await reading == disk.before[:100]
            await write
            assert disk.source.content[: len(NEW)] == NEW
            await disk.assert_refused(0, 512)

    asyncio.run(main())


def test_a_guest_that_waited_too_long_breaks_the_snapshot_or_fails() -> None:
    async def main(on_error: OnCbwError) -> None:
        rig = Rig()
        async with (
            fleecing(rig, on_cbw_error=on_error, cbw_timeout=7) as disk,
            rig.target.hold(Op.WRITE) as gate,
        ):
            write = asyncio.create_task(disk.write(0))
            await gate.reached()
            rig.clock.advance(7)
            if on_error is OnCbwError.BREAK_SNAPSHOT:
                await write
                await disk.assert_refused(0, 512)
            else:
                with pytest.raises(NodeError) as caught:
                    await write
                assert caught.value.errno == errno.ETIMEDOUT
                await disk.assert_old(0, 512)

    for on_error in OnCbwError:
        asyncio.run(main(on_error))


def test_what_is_discarded_is_not_saved_any_more() -> None:
    async def main() -> None:
        async with fleecing() as disk:
            await disk.write(0)
            await disk.reader.pdiscard(100, 3 * CLUSTER - 100)
            assert [(r.offset, r.length) for r in disk.target.requests_of(Op.DISCARD)] == [
                (CLUSTER, 2 * CLUSTER)  # whole clusters only
            ]
            await disk.assert_old(0, CLUSTER)
            await disk.assert_refused(CLUSTER, 1)
            await disk.assert_refused(CLUSTER - 1, 2)
            await disk.assert_refused(3 * CLUSTER - 1, 2)
            written = disk.target.counts[Op.WRITE]
            await disk.write(CLUSTER)
            assert disk.target.counts[Op.WRITE] == written
            await disk.assert_old(3 * CLUSTER, CLUSTER)
            await disk.reader.pdiscard(0, 4 * CLUSTER)
            await disk.assert_refused(0, 512)
            assert not disk.filter.block_copy.has_work

    asyncio.run(main())


def test_the_last_cluster_ends_with_the_disk() -> None:
    async def main() -> None:
        async with fleecing(Rig(2 * CLUSTER + 1024)) as disk:
            await disk.assert_old(0, 2 * CLUSTER + 1024)
            await disk.reader.pdiscard(2 * CLUSTER, 1024)
            assert [(r.offset, r.length) for r in disk.target.requests_of(Op.DISCARD)] == [
                (2 * CLUSTER, 1024)
            ]
            await disk.assert_refused(2 * CLUSTER, 512)
            await disk.reader.pdiscard(CLUSTER, CLUSTER - 1)  # less than a cluster
            await disk.assert_old(CLUSTER, CLUSTER)

    asyncio.run(main())


def test_block_status_is_that_of_the_old_content() -> None:
    async def main() -> None:
        source = MemoryNode(bytes(CLUSTER) + b"x" * CLUSTER + bytes(CLUSTER), name="s")
        async with fleecing(Rig(source)) as disk:
            await disk.write(0, b"y" * CLUSTER)
            await disk.rig.guest.pwrite_zeroes(CLUSTER, CLUSTER)
            runs = []
            offset = 0
            while offset < 3 * CLUSTER:
                length, status = await disk.reader.block_status(offset, 3 * CLUSTER - offset)
                runs.append((offset, status))
                offset += length
            assert runs == [(0, HOLE), (CLUSTER, DATA), (2 * CLUSTER, HOLE)]

    asyncio.run(main())


def test_a_snapshot_cannot_be_written() -> None:
    async def main() -> None:
        async with fleecing() as disk:
            for request in (
                disk.reader.pwrite(0, memoryview(NEW)),
                disk.reader.pwrite_zeroes(0, CLUSTER),
            ):
                with pytest.raises(NodeError) as caught:
                    await request
                assert caught.value.errno == errno.ENOTSUP
            await disk.reader.flush()
            await disk.assert_old(0, 4 * CLUSTER)

    asyncio.run(main())


def test_a_smaller_disk_loses_nothing_of_its_snapshot() -> None:
    async def main() -> None:
        async with fleecing() as disk:
            sizes: list[int] = []

            async def truncate(size: int) -> None:
                sizes.append(size)
                assert disk.target.content[CLUSTER:] == disk.before[CLUSTER:]

            disk.source._truncate = truncate  # type: ignore[method-assign]
            await disk.filter.truncate(CLUSTER + 512)
            assert sizes == [CLUSTER + 512]
            assert disk.reader.size == 4 * CLUSTER
            await disk.filter.truncate(8 * CLUSTER)
            assert disk.reader.size == 4 * CLUSTER
            await disk.assert_old(0, 4 * CLUSTER)
            assert disk.filter.block_copy.needs_copy(0, 1)
            disk.target.fail(Op.WRITE, errno.ENOSPC)
            with pytest.raises(CommandError, match="Cannot save what the smaller disk loses: No"):
                await disk.filter.truncate(0)
            assert len(sizes) == 2

    asyncio.run(main())


def test_a_larger_disk_is_saved_as_far_as_it_was() -> None:
    async def main() -> None:
        async with fleecing(Rig(2 * CLUSTER + 1024)) as disk:

            async def truncate(size: int) -> None:
                disk.source.content.extend(bytes(size - disk.source.size))

            disk.source._truncate = truncate  # type: ignore[method-assign]
            await disk.filter.truncate(5 * CLUSTER)
            for offset in (4 * CLUSTER, 2 * CLUSTER, CLUSTER - 10):
                await disk.write(offset, b"w" * CLUSTER)
            assert disk.source.content[4 * CLUSTER :] == b"w" * CLUSTER
            await disk.assert_old(0, 2 * CLUSTER + 1024)
            assert not disk.filter.block_copy.has_work

    asyncio.run(main())


def test_a_job_may_copy_the_snapshot_itself() -> None:
    async def main() -> None:
        rig = Rig()
        copy = MemoryNode(4 * CLUSTER, name="copy")
        async with fleecing(rig) as disk:
            rig.graph.add(copy)
            async with copy.hold(Op.WRITE) as gate:
                job = await start_backup(
                    rig.jobs,
                    rig.graph,
                    disk.reader.node,
                    copy,
                    BackupOptions(sync=SyncMode.FULL, job_id="j"),
                )
                await gate.reached()
                await disk.write(0)
                await disk.write(3 * CLUSTER)
            await rig.run_through(job)
            assert copy.content == disk.before
            assert "copy" not in rig.graph.nodes
            assert disk.reader.node.driver == "snapshot-access"

    asyncio.run(main())


@pytest.mark.parametrize("fails", [False, True])
def test_a_job_gives_up_what_it_has_copied_and_no_more(fails: bool) -> None:
    size = 2 * CLUSTER + 1024
    perf = BackupPerf(max_workers=1, max_chunk=CLUSTER)
    options = BackupOptions(sync=SyncMode.FULL, job_id="j", discard_source=True, perf=perf)

    async def main() -> None:
        rig = Rig(size)
        copy = MemoryNode(size, name="copy")
        async with fleecing(rig) as disk:
            rig.graph.add(copy)
            with pytest.raises(CommandError) as caught:
                await start_backup(rig.jobs, rig.graph, rig.source, copy, options)
            assert str(caught.value) == (
                "discard-source needs a node of driver 'snapshot-access' as the source"
            )
            if fails:
                copy.fail(Op.WRITE, errno.ENOSPC, offset=CLUSTER)
            await disk.write(CLUSTER)
            job = await start_backup(rig.jobs, rig.graph, disk.reader.node, copy, options)
            await rig.run_through(job)
            await disk.assert_refused(0, CLUSTER)
            if fails:
                await disk.assert_old(CLUSTER, size - CLUSTER)
            else:
                await disk.assert_refused(2 * CLUSTER, 1024)
                assert copy.content == disk.before
                assert not disk.filter.block_copy.has_work
            given_up = sum(request.length for request in disk.target.requests_of(Op.DISCARD))
            assert given_up == (CLUSTER if fails else size)

    asyncio.run(main())


def test_any_other_node_has_no_snapshot() -> None:
    async def main() -> None:
        rig = Rig()
        options = SnapshotAccessOptions(driver="snapshot-access", node_name="snap", file="s")
        reader = Device(rig.graph, await open_node(rig.graph, options), needed=READER)
        for request in (
            reader.pread(0, memoryview(bytearray(512))),
            reader.block_status(0, 512),
            reader.cache(0, 512),
        ):
            with pytest.raises(NodeError) as caught:
                await request
            assert caught.value.errno == errno.ENOTSUP
        await reader.pdiscard(0, 512)
        assert reader.size == rig.source.size
        await reader.close()

    asyncio.run(main())


def test_a_backup_is_readable_while_it_runs_and_readers_cannot_spoil_it() -> None:
    async def main() -> None:
        rig = Rig()
        async with rig.target.hold(Op.WRITE) as gate:
            job = await rig.backup(filter_node_name="cbw")
            await gate.reached()
            options = SnapshotAccessOptions(
                driver="snapshot-access", node_name="snap", file="cbw", discard=Discard.UNMAP
            )
            snapshot = await open_node(rig.graph, options)
            reader = Device(rig.graph, snapshot, needed=READER)
            disk = Fleecing(rig, rig.filter, reader)
            write = asyncio.create_task(disk.write(2 * CLUSTER))
            await disk.assert_old(0, 4 * CLUSTER)
            await reader.pdiscard(0, 4 * CLUSTER)
            await disk.assert_old(0, 4 * CLUSTER)
        await write
        await rig.run_through(job)
        assert rig.target.content == rig.before
        with pytest.raises(NodeError) as caught:
            await disk.read(0, 512)
        assert caught.value.errno == errno.ENOTSUP
        await reader.close()
        snapshot.is_owned_by_user = False
        await rig.graph.drop_if_unused(snapshot)
        rig.assert_as_before()

    asyncio.run(main())


def test_deleting_the_filter_waits_for_its_copies() -> None:
    async def main() -> None:
        rig = Rig()
        async with rig.target.hold(Op.WRITE) as gate, fleecing(rig, cbw_timeout=1) as disk:
            write = asyncio.create_task(disk.write(0))
            await gate.reached()
            rig.clock.advance(1)
            with pytest.raises(NodeError):
                await write
            await disk.reader.close()
            closing = asyncio.create_task(disk.filter.close())
            await turns()
            assert not closing.done()
            gate.release()
            await closing

    asyncio.run(main())


def open_filter(rig: Rig, **options: Any) -> Any:
    return open_node(
        rig.graph,
        CopyBeforeWriteOptions(
            driver="copy-before-write", node_name="cbw", file="s", target="t", **options
        ),
    )


def test_what_cannot_work_is_refused_and_leaves_nothing() -> None:
    async def main() -> None:
        rig = Rig(target=MemoryNode(4 * CLUSTER - 512, name="t"))
        with pytest.raises(CommandError) as caught:
            await open_filter(rig)
        assert str(caught.value) == "Target 't' (261632 bytes) is smaller than 's' (262144 bytes)"
        rig.assert_as_before()
        rig = Rig(target=MemoryNode(4 * CLUSTER, name="t", config=NodeConfig(is_read_only=True)))
        with pytest.raises(CommandError, match="Block node is read-only"):
            await open_filter(rig)
        rig.assert_as_before()
        refusals: dict[str, dict[str, Any]] = {
            "Dirty bitmap 'b' not found": {"bitmap": BlockDirtyBitmap(node="s", name="b")},
            "Node 'x' not found": {"bitmap": BlockDirtyBitmap(node="x", name="b")},
            "min-cluster-size needs to be a power of 2": {"min_cluster_size": 96 * 1024},
            f"min-cluster-size too large: {1 << 63} > {(1 << 63) - 1}": {
                "min_cluster_size": 1 << 63
            },
        }
        for text, options in refusals.items():
            rig = Rig()
            with pytest.raises(CommandError) as caught:
                await open_filter(rig, **options)
            assert str(caught.value) == text
            rig.assert_as_before()

    asyncio.run(main())


def test_a_larger_target_and_the_largest_cluster_will_do() -> None:
    async def main() -> None:
        rig = Rig(target=MemoryNode(8 * CLUSTER, name="t"))
        async with fleecing(rig, min_cluster_size=1 << 62) as disk:
            await disk.write(0)
            assert disk.target.content[: 4 * CLUSTER] == disk.before
            await disk.assert_old(0, 4 * CLUSTER)

    asyncio.run(main())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    on_cbw_error=st.sampled_from(OnCbwError),
    fails=st.booleans(),
    discards=st.booleans(),
)
def test_readers_see_the_point_in_time_under_any_schedule(
    seed: int, on_cbw_error: OnCbwError, fails: bool, discards: bool
) -> None:
    size = 5 * CLUSTER + 3 * 512
    chance = random.Random(seed)
    given_up: set[int] = set()

    async def write(disk: Fleecing) -> None:
        for _ in range(12):
            offset = chance.randrange(size)
            length = chance.randint(1, min(2 * CLUSTER, size - offset))
            try:
                if chance.random() < 0.3:
                    await disk.rig.guest.pwrite_zeroes(offset, length)
                else:
                    await disk.write(offset, chance.randbytes(length))
            except NodeError:
                assert fails
                assert on_cbw_error is OnCbwError.BREAK_GUEST_WRITE

    async def read(disk: Fleecing) -> None:
        for _ in range(20):
            offset = chance.randrange(size)
            length = chance.randint(1, min(2 * CLUSTER, size - offset))
            touched = set(range(offset // CLUSTER, (offset + length - 1) // CLUSTER + 1))
            try:
                content = await disk.read(offset, length)
            except NodeError:
                assert given_up & touched or disk.filter.snapshot_error is not None
            else:
                assert content == disk.before[offset : offset + length]
            with suppress(NodeError):
                run = await disk.reader.block_status(offset, length)
                is_zero = not any(disk.before[offset : offset + run.length])
                assert is_zero or Status.ZERO not in run.status
            if discards and chance.random() < 0.1:
                cluster = chance.randrange(5)
                given_up.add(cluster)
                await disk.reader.pdiscard(cluster * CLUSTER, CLUSTER)

    async def main() -> None:
        content = bytearray(random.Random(seed).randbytes(size))
        content[CLUSTER : 2 * CLUSTER + 9000] = bytes(CLUSTER + 9000)
        source = RestlessNode(bytes(content), "s", chance)
        target = RestlessNode(bytes(size), "t", chance)
        async with fleecing(Rig(source, target), on_cbw_error=on_cbw_error) as disk:
            if fails:
                target.fail(Op.WRITE, errno.ENOSPC, nth=chance.randint(1, 5))
            await asyncio.gather(*(write(disk) for _ in range(3)), *(read(disk) for _ in range(3)))

    asyncio.run(main())
