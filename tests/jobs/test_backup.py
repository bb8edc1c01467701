# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The backup job, step by step; texts and events are those of qemu-storage-daemon 7.2."""

from __future__ import annotations

import asyncio
import errno
from typing import Any
from unittest.mock import Mock

import pytest

from nbdjobs.errors import CommandError, ErrorClass, NodeError
from nbdjobs.jobs.backup import (
    BackupJob,
    BackupOptions,
    BackupPerf,
    BitmapSyncMode,
    SyncMode,
    start_backup,
)
from nbdjobs.jobs.block_job import find_block_job
from nbdjobs.jobs.collection import Jobs
from nbdjobs.jobs.job import JobOptions
from nbdjobs.jobs.status import JobStatus
from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.copy_before_write import CopyBeforeWrite, OnCbwError
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.error_policy import OnError, choose_action
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.null import NullOptions
from nbdjobs.nodes.op_blockers import BlockOp
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.permissions import Permission
from tests.jobs.rig import CLUSTER, GUEST, Events, Rig, turns
from tests.nodes.faults import MemoryNode, Op

NEW = b"new content"
SLOW = JobOptions(speed=CLUSTER)
KEPT = JobOptions(auto_dismiss=False)
BUSY = "Node 't' is busy: block device is in use by block job: backup"
END = ["waiting", "pending", "concluded", "null"]
BEGIN = ["created", "running", "paused", "running"]


async def refused(rig: Rig, **options: Any) -> str:
    """Why a backup does not start; nothing may be left of it."""
    with pytest.raises(CommandError) as caught:
        await rig.backup(**options)
    return str(caught.value)


def test_a_backup_from_begin_to_end() -> None:
    async def main() -> None:
        rig = Rig()
        job = await rig.backup()
        assert job.total_progress == 4 * CLUSTER
        await rig.run_through(job)
        assert rig.target.content == rig.before
        assert rig.target.stable == rig.before
        assert rig.events.statuses() == BEGIN + END
        outcome = {
            "type": "backup", "device": "j", "len": 4 * CLUSTER, "offset": 4 * CLUSTER, "speed": 0,
        }  # fmt: skip
        assert rig.events[-3] == ("BLOCK_JOB_COMPLETED", outcome)
        rig.assert_as_before()

    asyncio.run(main())


def test_a_backup_with_consent_keeps_its_filter_until_then() -> None:
    async def main() -> None:
        rig = Rig()
        job = await rig.backup(
            filter_node_name="flt", job=JobOptions(auto_finalize=False, auto_dismiss=False)
        )
        await turns(100)
        assert rig.events[-1] == ("BLOCK_JOB_PENDING", {"type": "backup", "id": "j"})
        assert rig.filter.name == "flt"
        assert await refused(rig, job_id="j2") == BUSY
        job.finalize()
        await rig.run_through(job)
        assert job.status is JobStatus.CONCLUDED
        rig.assert_as_before()
        assert await refused(rig) == "Job ID 'j' already in use"
        job.dismiss()
        await rig.run_through(await rig.backup())
        rig.assert_as_before()

    asyncio.run(main())


# Refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"job_id": None}, "Invalid job ID ''"),
        ({"job_id": "1bad"}, "Invalid job ID '1bad'"),
        (
            {"sync": SyncMode.INCREMENTAL},
            "must provide a valid bitmap name for 'incremental' sync mode",
        ),
        ({"sync": SyncMode.BITMAP}, "must provide a valid bitmap name for 'bitmap' sync mode"),
        ({"bitmap": "b"}, "Bitmap 'b' could not be found"),
        (
            {"bitmap_mode": BitmapSyncMode.ALWAYS},
            "Cannot specify bitmap sync mode without a bitmap",
        ),
        ({"compress": True}, "Compression is not supported for this drive "),
        (
            {"filter_node_name": "s"},
            "Could not create node: Duplicate nodes with node-name='s'",
        ),
        ({"filter_node_name": "1s"}, "Could not create node: Invalid node-name: '1s'"),
        (
            {"perf": BackupPerf(max_workers=0)},
            "max-workers must be between 1 and 2147483647",
        ),
        (
            {"perf": BackupPerf(max_workers=2**31)},
            "max-workers must be between 1 and 2147483647",
        ),
        (
            {"perf": BackupPerf(max_chunk=5)},
            "Required max-chunk (5) is less than backup cluster size (65536)",
        ),
        (
            {"perf": BackupPerf(max_chunk=-5)},
            "max-chunk must be zero (which means no limit) or positive",
        ),
        (
            {"perf": BackupPerf(min_cluster_size=100_000)},
            "Could not create node: min-cluster-size needs to be a power of 2",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], text: str) -> None:
    async def main() -> None:
        rig = Rig()
        assert await refused(rig, **options) == text
        assert rig.events == []
        rig.assert_as_before()

    asyncio.run(main())


def test_a_bad_speed_is_found_when_the_job_exists_and_takes_it_away_again() -> None:
    async def main() -> None:
        rig = Rig()
        text = "Parameter 'speed' expects a non-negative value"
        assert await refused(rig, job=JobOptions(speed=-1)) == text
        assert rig.events.statuses() == ["created", "null"]
        assert len(rig.jobs) == 0
        rig.assert_as_before()

    asyncio.run(main())


def test_a_backup_needs_two_disks_of_the_same_size() -> None:
    async def main() -> None:
        rig = Rig(target=MemoryNode(512, name="t"))
        assert await refused(rig) == "Source and target image have different sizes"
        rig.target = rig.source
        assert await refused(rig) == "Source and target cannot be the same"

    asyncio.run(main())


def test_a_target_that_is_read_only_is_refused() -> None:
    async def main() -> None:
        rig = Rig(target=MemoryNode(4 * CLUSTER, name="t", config=NodeConfig(is_read_only=True)))
        assert await refused(rig) == "Could not create node: Block node is read-only"
        rig.assert_as_before()

    asyncio.run(main())


def test_nodes_in_use_by_a_backup_refuse_what_would_disturb_it() -> None:
    async def main() -> None:
        rig = Rig()
        job = await rig.backup(sync=SyncMode.NONE, filter_node_name="flt")
        spare = MemoryNode(4 * CLUSTER, name="u")
        rig.graph.add(spare)

        async def start(source: Node, target: Node) -> str:
            options = BackupOptions(sync=SyncMode.FULL, job_id="other")
            with pytest.raises(CommandError) as caught:
                await start_backup(rig.jobs, rig.graph, source, target, options)
            return str(caught.value)

        assert await refused(rig, job_id="j") == BUSY
        assert await start(rig.target, spare) == BUSY
        busy_filter = "Node 'flt' is busy: block device is in use by block job: backup"
        assert await start(rig.filter, spare) == busy_filter
        for node, text in ((rig.target, BUSY), (rig.filter, busy_filter)):
            with pytest.raises(CommandError) as caught:
                node.op_blockers.check(BlockOp.DRIVE_DEL)
            assert str(caught.value) == text
        assert (await start(spare, rig.source)).startswith(
            "Could not create node: Permission conflict on node 's': permissions 'write' are"
            " both required by node '#block"
        )
        await rig.graph.drop(spare)
        job.cancel()
        await rig.run_through(job)
        rig.assert_as_before()

    asyncio.run(main())


def test_two_backups_of_one_disk_have_each_its_own_point_in_time() -> None:
    async def main() -> None:
        rig = Rig()
        first = await rig.backup(job=SLOW)
        await rig.write(0, NEW)
        between = bytes(rig.source.content)
        spare = MemoryNode(4 * CLUSTER, name="u")
        spare.is_owned_by_user = True
        rig.graph.add(spare)
        options = BackupOptions(sync=SyncMode.FULL, job_id="j2", job=SLOW)
        second = await start_backup(rig.jobs, rig.graph, rig.source, spare, options)
        await rig.write(CLUSTER, NEW)
        await rig.run_through(first)
        await rig.run_through(second)
        assert rig.target.content == rig.before
        assert spare.content == between
        await rig.graph.drop(spare)
        rig.assert_as_before()

    asyncio.run(main())


def test_block_jobs_are_found_by_id() -> None:
    async def main() -> None:
        rig = Rig()
        job = await rig.backup(job_id=None, device_name="drive0")
        assert find_block_job(rig.jobs, "drive0") is job
        with pytest.raises(CommandError, match="Block job 'nope' not found") as caught:
            find_block_job(rig.jobs, "nope")
        assert caught.value.error_class is ErrorClass.DEVICE_NOT_ACTIVE
        await rig.run_through(job)
        rig.assert_as_before()

    asyncio.run(main())


# Errors


@pytest.mark.parametrize(
    ("policy", "on_eio", "on_enospc"),
    [
        (OnError.REPORT, "report", "report"),
        (OnError.IGNORE, "ignore", "ignore"),
        (OnError.ENOSPC, "report", "stop"),
        (OnError.AUTO, "report", "stop"),
        (OnError.STOP, "stop", "stop"),
    ],
)
def test_what_each_policy_does(policy: OnError, on_eio: str, on_enospc: str) -> None:
    assert choose_action(policy, errno.EIO) == on_eio
    assert choose_action(policy, errno.ENOSPC) == on_enospc


@pytest.mark.parametrize("side", ["read", "write"])
def test_an_error_that_is_reported_ends_the_job(side: str) -> None:
    async def main() -> None:
        rig = Rig()
        if side == "read":
            rig.source.fail(Op.READ, errno.EIO)
        else:
            rig.target.fail(Op.WRITE, errno.ENOSPC)
        job = await rig.backup(job=KEPT)
        await rig.run_through(job)
        assert rig.events.statuses() == [*BEGIN, "aborting", "concluded"]
        text = "Input/output error" if side == "read" else "No space left on device"
        error = {"device": "j", "operation": side, "action": "report"}
        assert rig.events.named("BLOCK_JOB_ERROR") == [error]
        assert rig.events.named("BLOCK_JOB_COMPLETED") == [
            {
                "type": "backup", "device": "j", "len": 4 * CLUSTER, "offset": 0, "speed": 0,
                "error": text,
            }
        ]  # fmt: skip
        assert job.info().error == text
        rig.assert_as_before()

    asyncio.run(main())


@pytest.mark.parametrize("side", ["read", "write"])
def test_an_error_that_stops_the_job_waits_for_a_user_who_then_resumes(side: str) -> None:
    async def main() -> None:
        rig = Rig()
        if side == "read":
            rig.source.fail(Op.READ, errno.EIO)
        else:
            rig.target.fail(Op.WRITE, errno.ENOSPC)
        job = await rig.backup(on_source_error=OnError.STOP, on_target_error=OnError.ENOSPC)
        await turns(100)
        info = job.info()
        assert (info.status, info.is_paused) == (JobStatus.PAUSED, True)
        assert info.io_status == ("failed" if side == "read" else "nospace")
        error = {"device": "j", "operation": side, "action": "stop"}
        assert rig.events[-2] == ("BLOCK_JOB_ERROR", error)
        with pytest.raises(CommandError, match="Job is already paused"):
            job.pause()
        with pytest.raises(CommandError) as caught:
            job.cancel_block_job()
        assert str(caught.value) == "The block job for device 'j' is currently paused"
        job.resume()
        assert job.info().io_status == "ok"
        await rig.run_through(job)
        assert rig.target.content == rig.before
        rig.assert_as_before()

    asyncio.run(main())


def test_a_job_that_an_error_stopped_can_be_cancelled_by_force() -> None:
    async def main() -> None:
        rig = Rig()
        rig.target.fail(Op.WRITE, errno.EIO, times=None)
        job = await rig.backup(on_target_error=OnError.STOP)
        await turns(100)
        job.cancel_block_job(force=True)
        await turns(100)
        assert rig.events.statuses()[-4:] == ["running", "aborting", "concluded", "null"]
        assert len(rig.events.named("BLOCK_JOB_CANCELLED")) == 1
        assert rig.events.named("BLOCK_JOB_COMPLETED") == []
        rig.assert_as_before()

    asyncio.run(main())


def test_an_error_that_is_ignored_is_tried_again_later_and_not_in_a_hot_loop() -> None:
    async def main() -> None:
        rig = Rig()
        fault = rig.target.fail(Op.WRITE, times=None, offset=CLUSTER, length=1)
        job = await rig.backup(on_target_error=OnError.IGNORE, perf=BackupPerf(max_chunk=CLUSTER))
        await turns(200)
        tries = fault.failed
        assert tries == len(rig.events.named("BLOCK_JOB_ERROR")) == 2
        await turns(200)
        assert fault.failed == tries
        assert job.current_progress == 3 * CLUSTER
        rig.clock.advance(0.1)
        await turns()
        assert fault.failed == tries + 1
        fault.stop()
        await rig.run_through(job)
        assert rig.target.content == rig.before
        rig.assert_as_before()

    asyncio.run(main())


@pytest.mark.parametrize("policy", [OnError.REPORT, OnError.IGNORE])
def test_a_backup_that_cannot_be_flushed_has_failed(policy: OnError) -> None:
    async def main() -> None:
        rig = Rig()
        rig.target.fail(Op.FLUSH)
        job = await rig.backup(on_target_error=policy)
        await rig.run_through(job)
        [outcome] = rig.events.named("BLOCK_JOB_COMPLETED")
        assert outcome["error"] == "Input/output error"
        rig.assert_as_before()

    asyncio.run(main())


def test_a_flush_that_stopped_the_job_is_tried_again() -> None:
    async def main() -> None:
        rig = Rig()
        rig.target.fail(Op.FLUSH)
        job = await rig.backup(on_target_error=OnError.STOP)
        await turns(100)
        assert job.status is JobStatus.PAUSED
        job.resume()
        await rig.run_through(job)
        assert rig.target.stable == rig.before
        rig.assert_as_before()

    asyncio.run(main())


@pytest.mark.parametrize("sync", [SyncMode.FULL, SyncMode.NONE])
def test_a_broken_snapshot_fails_the_job_and_spares_the_guest(sync: SyncMode) -> None:
    async def main() -> None:
        rig = Rig()
        job = await rig.backup(sync=sync, on_cbw_error=OnCbwError.BREAK_SNAPSHOT, job=SLOW)
        rig.target.fail(Op.WRITE, errno.ENOSPC, offset=3 * CLUSTER)
        await rig.write(3 * CLUSTER, NEW)
        assert rig.source.content[3 * CLUSTER : 3 * CLUSTER + len(NEW)] == NEW
        await turns(100)
        [outcome] = rig.events.named("BLOCK_JOB_COMPLETED")
        assert outcome["error"] == "No space left on device"
        assert rig.events.named("BLOCK_JOB_ERROR") == []
        assert job.status is JobStatus.NULL
        rig.assert_as_before()

    asyncio.run(main())


def test_a_guest_whose_write_was_refused_does_not_harm_the_backup() -> None:
    async def main() -> None:
        rig = Rig()
        job = await rig.backup(job=SLOW)
        rig.target.fail(Op.WRITE, errno.ENOSPC, offset=3 * CLUSTER)
        with pytest.raises(NodeError):
            await rig.write(3 * CLUSTER, NEW)
        await rig.run_through(job)
        assert rig.source.content == rig.before
        assert rig.target.content == rig.before
        rig.assert_as_before()

    asyncio.run(main())


# Slow and stuck disks


def test_cancelling_with_a_stuck_target_frees_guests_at_once_and_ends_when_it_comes_back() -> None:
    async def main() -> None:
        rig = Rig()
        async with rig.target.hold(Op.WRITE) as gate:
            job = await rig.backup(perf=BackupPerf(max_chunk=CLUSTER))
            await gate.reached(4)
            guest = asyncio.create_task(rig.write(0, NEW))
            await turns()
            assert not guest.done()
            job.cancel()
            await guest
            await rig.write(CLUSTER, NEW)
            await turns()
            assert job.status is JobStatus.RUNNING
            assert rig.filter is rig.guest.node
        await turns(100)
        assert len(rig.events.named("BLOCK_JOB_CANCELLED")) == 1
        assert rig.source.content[CLUSTER : CLUSTER + len(NEW)] == NEW
        rig.assert_as_before()

    asyncio.run(main())


def test_a_copy_stuck_for_a_guest_stalls_nobody_once_the_backup_is_cancelled() -> None:
    async def main() -> None:
        rig = Rig()
        async with rig.target.hold(Op.WRITE) as gate:
            job = await rig.backup(sync=SyncMode.NONE)
            guest = asyncio.create_task(rig.write(0, NEW))
            await gate.reached()
            job.cancel()
            await guest
            await turns(100)
            assert job.status is JobStatus.ABORTING
            await rig.write(0, NEW)  # no drained section keeps it waiting
        await turns(100)
        rig.assert_as_before()

    asyncio.run(main())


def test_of_two_backups_to_one_target_that_start_together_one_is_refused() -> None:
    async def main() -> None:
        rig = Rig()
        async with rig.source.hold(Op.WRITE) as gate:
            guest = asyncio.create_task(rig.write(0, NEW))
            await gate.reached()
            starting = [asyncio.create_task(rig.backup(job_id=name)) for name in ("j", "k")]
            await turns()
            assert not any(task.done() for task in starting)
        await guest
        first, second = await asyncio.gather(*starting, return_exceptions=True)
        assert isinstance(first, BackupJob)
        assert isinstance(second, CommandError)
        assert str(second) == BUSY
        await rig.run_through(first)
        rig.assert_as_before()

    asyncio.run(main())


async def check_guest_goes_on(rig: Rig) -> None:
    """Read and write where no copy is needed, or none that is stuck."""
    content = bytearray(512)
    reading = asyncio.create_task(rig.guest.pread(CLUSTER, memoryview(content)))
    await turns()
    assert reading.done()
    assert content == rig.before[CLUSTER : CLUSTER + 512]


def test_guests_go_on_while_a_backup_waits_for_another_whose_target_is_stuck() -> None:
    """Otherwise whoever starts a new backup because the old one is stuck would stop the guest."""

    async def main() -> None:
        rig = Rig()
        third = MemoryNode(4 * CLUSTER, name="u")
        rig.graph.add(third)
        options = BackupOptions(sync=SyncMode.FULL, job_id="k")
        async with rig.target.hold(Op.WRITE) as gate:
            stuck = await rig.backup()
            await gate.reached()
            starting = asyncio.create_task(
                start_backup(rig.jobs, rig.graph, rig.source, third, options)
            )
            await turns()
            await check_guest_goes_on(rig)
            stuck.cancel()
            await rig.write(0, NEW)
            assert not starting.done()
        job = await starting
        before = bytes(rig.source.content)
        await rig.run_through(job)
        assert third.content == before
        rig.assert_as_before()

    asyncio.run(main())


def test_guests_go_on_when_a_backup_ends_beside_another_whose_target_is_stuck() -> None:
    async def main() -> None:
        rig = Rig()
        third = MemoryNode(4 * CLUSTER, name="u")
        rig.graph.add(third)
        stuck = await rig.backup(job=SLOW)
        options = BackupOptions(sync=SyncMode.FULL, job_id="k")
        async with rig.target.hold(Op.WRITE) as gate:
            ending = await start_backup(rig.jobs, rig.graph, rig.source, third, options)
            rig.clock.advance(2)
            await gate.reached()
            while ending.status is JobStatus.RUNNING:
                await turns()
            assert third.content == rig.before
            await check_guest_goes_on(rig)
            stuck.cancel()
            await rig.write(0, NEW)
        await rig.jobs.ended(ending)
        await rig.jobs.ended(stuck)
        rig.assert_as_before()

    asyncio.run(main())


def test_a_target_that_is_deleted_while_requests_are_awaited_is_not_used() -> None:
    async def main() -> None:
        rig = Rig()
        async with rig.source.hold(Op.WRITE) as gate:
            guest = asyncio.create_task(rig.write(0, NEW))
            await gate.reached()
            starting = asyncio.create_task(rig.backup())
            await turns()
            await rig.graph.drop(rig.target)
            rig.graph.add(MemoryNode(4 * CLUSTER, name="t"))
        await guest
        with pytest.raises(CommandError, match="Cannot find device='' nor node-name='t'"):
            await starting
        assert rig.guest.node is rig.source
        assert rig.target.parents == []
        assert list(rig.jobs) == []

    asyncio.run(main())


class Defective(MemoryNode):
    """A driver with a defect: reads end, after a moment, in an error that nobody planned."""

    async def _pread(self, offset: int, buffer: memoryview) -> None:
        await asyncio.sleep(0)
        raise RuntimeError("can't start new thread")


def test_an_error_that_nobody_planned_ends_the_job(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        rig = Rig(Defective(b"\x11" * 4 * CLUSTER, name="s"))
        await rig.run_through(await rig.backup(on_source_error=OnError.IGNORE))
        (outcome,) = rig.events.named("BLOCK_JOB_COMPLETED")
        assert outcome["error"] == "internal error"
        rig.assert_as_before()

    asyncio.run(main())
    assert "can't start new thread" in caplog.text


def test_a_start_that_fails_unexpectedly_leaves_no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        rig = Rig()
        with monkeypatch.context() as patch:
            patch.setattr(CopyBeforeWrite, "arm", Mock(side_effect=MemoryError))
            with pytest.raises(MemoryError):
                await rig.backup()
        await rig.write(0, NEW)
        rig.assert_as_before()
        await rig.run_through(await rig.backup())

    asyncio.run(main())


def test_the_largest_disk_there_can_be() -> None:
    """The bitmap stays small, so the clusters are large."""

    async def main() -> None:
        graph, events = Graph(), Events()
        size = 2**63 - 2**30
        for name in ("source", "target"):
            await open_node(graph, NullOptions(driver="null-co", node_name=name, size=size))
        guest = Device(graph, graph.find("source"), needed=GUEST)
        jobs = Jobs(events.record)
        options = BackupOptions(sync=SyncMode.NONE, job_id="j")
        job = await start_backup(jobs, graph, graph.find("source"), graph.find("target"), options)
        assert job.total_progress == size
        await guest.pwrite_zeroes(size - 512, 512)
        assert 0 < job.current_progress <= size // 2**29
        job.cancel()
        await jobs.ended(job)
        await guest.close()
        for name in ("source", "target"):
            await graph.drop(graph.find(name))

    asyncio.run(main())


def test_a_stuck_flush_keeps_the_job_from_completing() -> None:
    async def main() -> None:
        rig = Rig()
        async with rig.target.hold(Op.FLUSH) as gate:
            job = await rig.backup()
            await gate.reached()
            assert job.current_progress == job.total_progress
            assert rig.events.named("BLOCK_JOB_COMPLETED") == []
            job.cancel()
            await turns()
            assert job.status is JobStatus.RUNNING
        await turns(100)
        assert len(rig.events.named("BLOCK_JOB_CANCELLED")) == 1
        rig.assert_as_before()

    asyncio.run(main())


def test_no_more_workers_than_allowed() -> None:
    async def main() -> None:
        rig = Rig(8 * CLUSTER)
        async with rig.target.hold(Op.WRITE) as gate:
            job = await rig.backup(perf=BackupPerf(max_workers=3, max_chunk=CLUSTER))
            await turns(100)
            assert len(gate.held) == 3
        await rig.run_through(job)
        assert rig.target.content == rig.before
        rig.assert_as_before()

    asyncio.run(main())


def test_a_drained_section_waits_for_copies_and_holds_new_ones() -> None:
    async def main() -> None:
        rig = Rig()
        gate = rig.target.hold(Op.WRITE)
        job = await rig.backup(perf=BackupPerf(max_workers=1, max_chunk=CLUSTER))
        await gate.reached()
        entered = asyncio.Event()
        leave = asyncio.Event()

        async def drain() -> None:
            async with rig.graph.drained(rig.target):
                entered.set()
                await leave.wait()

        drained = asyncio.create_task(drain())
        await turns()
        assert not entered.is_set()
        gate.release()
        await entered.wait()
        assert job.status is JobStatus.PAUSED
        assert job.info().is_paused
        assert not job.is_user_paused
        asked = len(rig.target.requests)
        await turns()
        assert len(rig.target.requests) == asked
        leave.set()
        await drained
        await rig.run_through(job)
        assert rig.target.content == rig.before
        rig.assert_as_before()

    asyncio.run(main())


# Pace


def test_the_speed_holds_the_job_and_may_change() -> None:
    async def main() -> None:
        rig = Rig(16 * CLUSTER)
        job = await rig.backup(job=JobOptions(speed=CLUSTER))
        await turns(100)
        assert job.current_progress == CLUSTER
        rig.clock.advance(0.99)
        await turns()
        assert job.current_progress == CLUSTER
        rig.clock.advance(0.01)
        await turns()
        assert job.current_progress == 2 * CLUSTER
        job.set_speed(40 * CLUSTER)
        await turns(100)
        assert job.current_progress == 6 * CLUSTER
        rig.clock.advance(0.12)
        await turns(100)
        assert job.current_progress == 6 * CLUSTER
        rig.clock.advance(0.005)
        await turns(100)
        assert job.current_progress == 10 * CLUSTER
        job.set_speed(0)
        await turns(100)
        assert rig.target.content == rig.before
        rig.assert_as_before()

    asyncio.run(main())


def test_guests_do_not_wait_for_the_jobs_pace() -> None:
    async def main() -> None:
        rig = Rig()
        job = await rig.backup(job=JobOptions(speed=1))
        await turns(100)
        for cluster in range(4):
            await rig.write(cluster * CLUSTER, NEW)
        assert job.current_progress == 4 * CLUSTER
        await rig.run_through(job)
        assert rig.target.content == rig.before
        rig.assert_as_before()

    asyncio.run(main())


@pytest.mark.parametrize("state", ["pace", "pause"])
def test_a_job_that_waits_reacts_to_cancel_at_once(state: str) -> None:
    async def main() -> None:
        rig = Rig()
        job = await rig.backup(job=JobOptions(speed=1))
        await turns(100)
        if state == "pause":
            job.pause()
            await turns()
            assert job.status is JobStatus.PAUSED
        job.cancel(force=True)
        await turns(100)
        assert str(job.status) == "null"
        rig.assert_as_before()

    asyncio.run(main())


def test_a_paused_job_copies_nothing_but_still_guards_the_guest() -> None:
    async def main() -> None:
        rig = Rig()
        job = await rig.backup(job=JobOptions(speed=CLUSTER))
        await turns(100)
        job.pause()
        await turns()
        rig.clock.advance(100)
        await turns(100)
        assert job.current_progress == CLUSTER
        await rig.write(3 * CLUSTER, NEW)
        assert job.current_progress == 2 * CLUSTER
        job.resume()
        await rig.run_through(job)
        assert rig.target.content == rig.before
        rig.assert_as_before()

    asyncio.run(main())


# sync=none


def test_sync_none_saves_only_what_guests_change_and_runs_until_cancelled() -> None:
    async def main() -> None:
        rig = Rig()
        old_target = bytes(rig.target.content)
        job = await rig.backup(sync=SyncMode.NONE)
        await rig.write(CLUSTER, NEW)
        await turns(100)
        assert rig.target.content[CLUSTER : 2 * CLUSTER] == rig.before[CLUSTER : 2 * CLUSTER]
        assert rig.target.content[2 * CLUSTER :] == old_target[2 * CLUSTER :]
        assert (job.current_progress, job.total_progress) == (CLUSTER, 4 * CLUSTER)
        job.pause()
        await turns()
        job.resume()
        await turns()
        assert job.status is JobStatus.RUNNING
        job.cancel_block_job()
        await turns(100)
        assert rig.events.statuses()[-3:] == ["aborting", "concluded", "null"]
        outcome = {
            "type": "backup", "device": "j", "len": 4 * CLUSTER, "offset": CLUSTER, "speed": 0,
        }  # fmt: skip
        assert rig.events.named("BLOCK_JOB_CANCELLED") == [outcome]
        rig.assert_as_before()

    asyncio.run(main())


# Cancelling anywhere


class Hesitant(MemoryNode):
    """Every request gives way once, so that each is a suspension of its caller."""

    async def _arrive(self, request: Any) -> None:
        await asyncio.sleep(0)
        await super()._arrive(request)


async def cancelled_at(turn: int) -> bool:
    """Cancel a backup at that turn of the loop; whether it was still there to be cancelled."""
    source = Hesitant(bytes(range(256)) * 4 * 256, name="s")
    rig = Rig(source, Hesitant(4 * CLUSTER, name="t"))
    starting = asyncio.create_task(rig.backup(perf=BackupPerf(max_workers=2, max_chunk=CLUSTER)))
    guest = asyncio.create_task(rig.write(3 * CLUSTER, NEW))
    await turns(turn)
    starting.cancel()
    jobs = list(rig.jobs)
    for job in jobs:
        if job.status in (JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.PENDING):
            job.cancel(force=True)
    await asyncio.gather(starting, return_exceptions=True)
    await guest
    await turns(200)
    assert rig.source.content[: 3 * CLUSTER] == rig.before[: 3 * CLUSTER]
    assert rig.source.content[3 * CLUSTER : 3 * CLUSTER + len(NEW)] == NEW
    rig.assert_as_before()
    return bool(jobs) or starting.cancelled()


def test_a_backup_can_be_cancelled_at_each_of_its_suspensions() -> None:
    async def main() -> None:
        turn = 0
        while await cancelled_at(turn):
            turn += 1
        assert turn > 10

    asyncio.run(main())


async def guest_cancelled_at(turn: int) -> bool:
    """Cancel a guest's write at that turn; whether it was still there to be cancelled."""
    rig = Rig(Hesitant(bytes(range(256)) * 4 * 256, name="s"))
    job = await rig.backup(perf=BackupPerf(max_chunk=CLUSTER))
    write = asyncio.create_task(rig.write(3 * CLUSTER, NEW))
    await turns(turn)
    was_there = write.cancel()
    await asyncio.gather(write, return_exceptions=True)
    await rig.run_through(job)
    assert rig.target.content == rig.before
    rig.assert_as_before()
    return was_there


def test_a_guests_write_can_be_cancelled_at_each_of_its_suspensions() -> None:
    async def main() -> None:
        turn = 0
        while await guest_cancelled_at(turn):
            turn += 1
        assert turn > 3

    asyncio.run(main())


def test_the_end_gives_a_source_back_that_nobody_else_wants() -> None:
    """An export that goes while the job runs leaves the job as the last user of a node."""

    async def main() -> None:
        rig = Rig()
        rig.source.is_owned_by_user = False
        job = await rig.backup(job=SLOW)
        await rig.guest.close()
        assert not rig.source.was_closed
        await rig.run_through(job)
        assert rig.target.content == rig.before
        assert rig.source.was_closed
        assert set(rig.graph.nodes) == {"t"}

    asyncio.run(main())


def test_a_job_is_named_in_errors_about_its_permissions() -> None:
    async def main() -> None:
        rig = Rig()
        job: BackupJob = await rig.backup(sync=SyncMode.NONE)
        assert job.describe() == "block job 'j'"
        reader = Device(rig.graph, rig.filter, needed=Permission.CONSISTENT_READ)
        await reader.close()
        job.cancel()
        await rig.run_through(job)
        rig.assert_as_before()

    asyncio.run(main())
