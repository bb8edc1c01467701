# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""x-blockdev-amend: while passwords change nobody else uses the file, and clients go on."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import pytest

from nbdjobs.nodes.luks import LuksNode
from tests.daemon.rig import Monitor, Rig, running
from tests.nodes.encrypted import volume_of_zeroes
from tests.nodes.faults import MemoryNode, Op

Scenario = Callable[[Rig, Monitor, MemoryNode], Awaitable[None]]

PASSWORD: Final = "open sesame"
ADD: Final = {"driver": "luks", "state": "active", "new-secret": "new", "iter-time": 0}
ERASE: Final = {"driver": "luks", "state": "inactive", "old-secret": "new"}
IN_USE: Final = "unshared by node 'n' (uses node 'disk' as 'file' child)"


def run(tmp_path: Path, scenario: Scenario, **options: object) -> None:
    async def go() -> None:
        async with running(tmp_path) as rig:
            disk = rig.add_disk("disk", volume_of_zeroes(65536, PASSWORD.encode()))
            monitor = await rig.monitor()
            for name, data in (("right", PASSWORD), ("new", "open wheat")):
                await monitor.get("object-add", qom_type="secret", id=name, data=data)
            await monitor.get(
                "blockdev-add",
                driver="luks",
                node_name="n",
                file="disk",
                key_secret="right",
                **options,
            )
            await scenario(rig, monitor, disk)

    asyncio.run(go())


async def amend(monitor: Monitor, options: dict[str, Any], job: str = "j") -> None:
    await monitor.get("x-blockdev-amend", job_id=job, node_name="n", options=options)


async def result(monitor: Monitor, job: str = "j") -> str | None:
    """What the job failed with, once it has ended; it is dismissed."""
    await monitor.event("JOB_STATUS_CHANGE", id=job, status="concluded")
    jobs = await monitor.get("query-jobs")
    await monitor.get("job-dismiss", id=job)
    error: str | None = next(each for each in jobs if each["id"] == job).get("error")
    return error


def active(rig: Rig) -> list[int]:
    node = rig.daemon.graph.nodes["n"]
    assert isinstance(node, LuksNode)
    slots = node.luks_header.slots
    return [number for number, slot in enumerate(slots) if slot.is_active]


def test_nobody_else_uses_the_file_meanwhile_and_users_of_the_volume_go_on(tmp_path: Path) -> None:
    async def scenario(rig: Rig, monitor: Monitor, disk: MemoryNode) -> None:
        await rig.start_nbd(monitor)
        await rig.export(monitor, "n", id="e", writable=True)
        async with disk.hold(Op.WRITE) as gate:
            await amend(monitor, ADD)
            await gate.reached()
            refused = await monitor.refusal(
                "blockdev-add", driver="luks", node_name="m", file="disk", key_secret="right"
            )
            assert "consistent read" in refused
            assert IN_USE in refused
        assert await result(monitor) is None
        assert active(rig) == [0, 1]
        assert any(edge.node is disk for edge in rig.daemon.graph.nodes["n"].edges.values())
        await monitor.get(
            "blockdev-add", driver="luks", node_name="m", file="disk", key_secret="new"
        )
        await monitor.get("blockdev-del", node_name="m")

    run(tmp_path, scenario)


def test_who_uses_the_file_already_keeps_passwords_as_they_are(tmp_path: Path) -> None:
    async def scenario(rig: Rig, monitor: Monitor, disk: MemoryNode) -> None:
        await monitor.get(
            "blockdev-add", driver="luks", node_name="m", file="disk", key_secret="right"
        )
        refused = await monitor.refusal("x-blockdev-amend", job_id="j", node_name="n", options=ADD)
        assert IN_USE in refused
        assert await monitor.get("query-jobs") == []
        await monitor.get("blockdev-del", node_name="m")
        await amend(monitor, ADD)
        assert await result(monitor) is None

    run(tmp_path, scenario)


def test_two_changes_come_one_after_the_other(tmp_path: Path) -> None:
    async def scenario(rig: Rig, monitor: Monitor, disk: MemoryNode) -> None:
        async with disk.hold(Op.WRITE) as gate:
            await amend(monitor, ADD, "first")
            await gate.reached()
            await amend(monitor, ADD, "second")
        assert await result(monitor, "first") is None
        assert await result(monitor, "second") is None
        assert active(rig) == [0, 1, 2]

    run(tmp_path, scenario)


def test_a_change_that_fails_leaves_the_file_to_others(tmp_path: Path) -> None:
    async def scenario(rig: Rig, monitor: Monitor, disk: MemoryNode) -> None:
        disk.fail(Op.WRITE, errno.EIO)
        await amend(monitor, ADD)
        error = await result(monitor)
        assert error == "Unable to write LUKS header: Input/output error"
        assert active(rig) == [0]
        await amend(monitor, ERASE)
        error = await result(monitor)
        assert error == "No keyslots match given (old) password for erase operation"
        await monitor.get(
            "blockdev-add", driver="luks", node_name="m", file="disk", key_secret="right"
        )

    run(tmp_path, scenario)


def test_a_job_that_is_cancelled_leaves_the_file_to_others(tmp_path: Path) -> None:
    async def scenario(rig: Rig, monitor: Monitor, disk: MemoryNode) -> None:
        async with disk.hold(Op.WRITE) as gate:
            await amend(monitor, ADD)
            await gate.reached()
            await monitor.get("job-cancel", id="j")
            await monitor.event("JOB_STATUS_CHANGE", id="j", status="concluded")
        assert active(rig) == [0]
        await monitor.get("job-dismiss", id="j")
        await amend(monitor, ADD)
        assert await result(monitor) is None
        assert active(rig) == [0, 1]

    run(tmp_path, scenario)


def test_what_counts_is_whether_the_file_can_be_written(tmp_path: Path) -> None:
    async def scenario(rig: Rig, monitor: Monitor, disk: MemoryNode) -> None:
        before = bytes(disk.content)
        await amend(monitor, ADD)
        assert await result(monitor) is None
        assert disk.content != before

    run(tmp_path, scenario, read_only=True)


def test_what_was_handed_to_another_process_is_left_alone(tmp_path: Path) -> None:
    async def scenario(rig: Rig, monitor: Monitor, disk: MemoryNode) -> None:
        await monitor.get("blockdev-set-active", node_name="n", active=False)
        refused = await monitor.refusal("x-blockdev-amend", job_id="j", node_name="n", options=ADD)
        assert refused == "Permission 'write' unavailable on inactive node"
        await monitor.get("blockdev-set-active", node_name="n", active=True)
        await amend(monitor, ADD)
        assert await result(monitor) is None

    run(tmp_path, scenario)


def test_job_ids_are_checked_first(tmp_path: Path) -> None:
    async def scenario(rig: Rig, monitor: Monitor, disk: MemoryNode) -> None:
        refused = await monitor.refusal("x-blockdev-amend", job_id="3x", node_name="n", options=ADD)
        assert refused == "Invalid job ID '3x'"
        await amend(monitor, ADD)
        assert await result(monitor) is None

    run(tmp_path, scenario)


@pytest.mark.parametrize("options", [ADD, ERASE])
def test_passwords_are_looked_up_when_the_job_runs(
    tmp_path: Path, options: dict[str, object]
) -> None:
    async def scenario(rig: Rig, monitor: Monitor, disk: MemoryNode) -> None:
        await monitor.get("object-del", id="new")
        await amend(monitor, options)
        assert await result(monitor) == "No secret with id 'new'"

    run(tmp_path, scenario)
