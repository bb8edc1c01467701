# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""blockdev-create: the life of its job, and what it leaves when it fails or is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.daemon.rig import MIB, Monitor, Rig, running
from tests.nodes.faults import Op

Scenario = Callable[[Rig, Monitor], Awaitable[None]]


def run(tmp_path: Path, scenario: Scenario) -> None:
    async def go() -> None:
        async with running(tmp_path) as rig:
            await scenario(rig, await rig.monitor())

    asyncio.run(go())


def test_a_job_goes_through_its_states_and_waits_to_be_dismissed(tmp_path: Path) -> None:
    path = tmp_path / "new.img"

    async def scenario(rig: Rig, monitor: Monitor) -> None:
        options = {"driver": "file", "filename": str(path), "size": MIB, "preallocation": "full"}
        await monitor.get("blockdev-create", job_id="j", options=options)
        for status in ("created", "running", "waiting", "pending", "concluded"):
            await monitor.event("JOB_STATUS_CHANGE", id="j", status=status)
        assert await monitor.get("query-block-jobs") == []
        assert await monitor.get("query-jobs") == [
            {
                "id": "j",
                "type": "create",
                "status": "concluded",
                "current-progress": 1,
                "total-progress": 1,
            }
        ]
        await monitor.get("job-dismiss", id="j")
        assert await monitor.get("query-jobs") == []

    run(tmp_path, scenario)
    assert path.read_bytes() == bytes(MIB)
    assert path.stat().st_blocks * 512 >= MIB


def test_a_job_that_is_cancelled_ends_at_once_and_leaves_no_image(tmp_path: Path) -> None:
    async def scenario(rig: Rig, monitor: Monitor) -> None:
        disk = rig.add_disk("disk", b"\1" * MIB)
        options = {"driver": "qcow2", "file": "disk", "size": MIB}
        async with disk.hold(Op.FLUSH) as gate:
            await monitor.get("blockdev-create", job_id="j", options=options)
            await gate.reached()
            conflict = await monitor.refusal("block_resize", node_name="disk", size=MIB)
            assert "unshared by an unnamed block device" in conflict
            await monitor.get("job-cancel", id="j")
            await monitor.event("JOB_STATUS_CHANGE", id="j", status="concluded")
        (job,) = await monitor.get("query-jobs")
        assert job["error"] == "Operation canceled"
        await monitor.get("job-dismiss", id="j")
        assert disk.content[:4] == bytes(4)

    run(tmp_path, scenario)


def test_a_storage_error_is_the_jobs_error(tmp_path: Path) -> None:
    async def scenario(rig: Rig, monitor: Monitor) -> None:
        disk = rig.add_disk("disk", MIB)
        disk.fail(Op.WRITE)
        options = {"driver": "qcow2", "file": "disk", "size": MIB}
        await monitor.get("blockdev-create", job_id="j", options=options)
        await monitor.event("JOB_STATUS_CHANGE", id="j", status="concluded")
        (job,) = await monitor.get("query-jobs")
        assert job["error"] == "Input/output error"
        await monitor.get("job-dismiss", id="j")

    run(tmp_path, scenario)


def test_a_file_without_room_is_gone_again(tmp_path: Path) -> None:
    path = tmp_path / "new.img"

    async def scenario(rig: Rig, monitor: Monitor) -> None:
        options = {"driver": "file", "filename": str(path), "size": 1 << 62}
        await monitor.get("blockdev-create", job_id="j", options=options)
        await monitor.event("JOB_STATUS_CHANGE", id="j", status="concluded")
        await monitor.get("job-dismiss", id="j")

    run(tmp_path, scenario)
    assert not path.exists()


def test_the_end_of_the_daemon_ends_the_job(tmp_path: Path) -> None:
    async def scenario(rig: Rig, monitor: Monitor) -> None:
        disk = rig.add_disk("disk", MIB)
        options = {"driver": "qcow2", "file": "disk", "size": MIB}
        async with disk.hold(Op.FLUSH) as gate:
            await monitor.get("blockdev-create", job_id="j", options=options)
            await gate.reached()
            await rig.daemon.jobs.shutdown()
        assert not list(rig.daemon.jobs)

    run(tmp_path, scenario)
