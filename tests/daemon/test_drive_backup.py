# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""drive-backup: the target is made, opened, and gone again with the job or with its failure."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nbdjobs.nodes.graph import Role
from tests.daemon.rig import MIB, Monitor, Rig, running
from tests.jobs.rig import random_content
from tests.nodes.faults import Op

Scenario = Callable[[Rig, Monitor], Awaitable[None]]

CONTENT = random_content(MIB)


def run(tmp_path: Path, scenario: Scenario) -> None:
    async def go() -> None:
        async with running(tmp_path) as rig:
            rig.add_disk("disk", CONTENT)
            await scenario(rig, await rig.monitor())

    asyncio.run(go())


def backup(target: Path, **options: object) -> dict[str, object]:
    common = {"device": "disk", "job_id": "j", "sync": "full", "format": "raw"}
    return {**common, "target": str(target), **options}


def test_the_new_image_holds_the_disk_as_it_was(tmp_path: Path) -> None:
    image = tmp_path / "backup.img"

    async def scenario(rig: Rig, monitor: Monitor) -> None:
        await rig.start_nbd(monitor)
        await rig.export(monitor, "disk")
        client = await rig.client("disk")
        await monitor.get("drive-backup", **backup(image, speed=1, auto_finalize=False))
        assert len(rig.daemon.graph.nodes) == 4  # with filter, raw and file
        await client.write(0, b"new" * 50_000)
        await monitor.get("block-job-set-speed", device="j", speed=0)
        await monitor.event("BLOCK_JOB_PENDING")
        await monitor.get("job-finalize", id="j")
        await monitor.event("JOB_STATUS_CHANGE", id="j", status="null")
        assert set(rig.daemon.graph.nodes) == {"disk"}

    run(tmp_path, scenario)
    assert image.read_bytes() == CONTENT


@pytest.mark.parametrize("is_compressed", [False, True])
def test_the_new_image_may_be_qcow2(tmp_path: Path, is_compressed: bool) -> None:
    image = tmp_path / "backup.qcow2"
    again = tmp_path / "again.img"

    async def scenario(rig: Rig, monitor: Monitor) -> None:
        options = {"format": "qcow2", "compress": is_compressed}
        await monitor.get("drive-backup", **backup(image, **options))
        await monitor.event("JOB_STATUS_CHANGE", id="j", status="null")
        await monitor.get(
            "blockdev-add",
            driver="qcow2",
            node_name="copy",
            read_only=True,
            file={"driver": "file", "filename": str(image)},
        )
        await monitor.get("drive-backup", **backup(again, device="copy"))
        await monitor.event("JOB_STATUS_CHANGE", id="j", status="null")

    run(tmp_path, scenario)
    assert again.read_bytes() == CONTENT


def test_a_backup_that_cannot_start_leaves_no_file(tmp_path: Path) -> None:
    image = tmp_path / "backup.img"

    async def scenario(rig: Rig, monitor: Monitor) -> None:
        refusals: dict[str, dict[str, object]] = {
            "Compression is not supported for this drive ": {"compress": True},
            "Required max-chunk (1) is less than backup cluster size (65536)": {
                "x_perf": {"max-chunk": 1}
            },
            "Could not create node: Duplicate nodes with node-name='disk'": {
                "filter_node_name": "disk"
            },
            "Parameter 'speed' expects a non-negative value": {"speed": -1},
        }
        for text, options in refusals.items():
            assert await monitor.refusal("drive-backup", **backup(image, **options)) == text
            assert set(rig.daemon.graph.nodes) == {"disk"}

    run(tmp_path, scenario)
    assert not image.exists()


def test_an_old_file_is_not_emptied_for_a_backup_that_cannot_start(tmp_path: Path) -> None:
    image = tmp_path / "backup.img"
    image.write_bytes(b"the backup of yesterday")

    async def scenario(rig: Rig, monitor: Monitor) -> None:
        refusals: dict[str, dict[str, object]] = {
            "Invalid job ID '1'": {"job_id": "1"},
            "max-workers must be between 1 and 2147483647": {"x_perf": {"max-workers": 0}},
            "must provide a valid bitmap name for 'bitmap' sync mode": {"sync": "bitmap"},
            "Backing file not supported for file format 'raw'": {"sync": "none"},
            "Format driver 'throttle' does not support image creation": {"format": "throttle"},
        }
        for text, options in refusals.items():
            assert await monitor.refusal("drive-backup", **backup(image, **options)) == text
        busy = rig.add_disk("busy", CONTENT)
        rig.add_disk("target")
        async with busy.hold(Op.READ) as gate:
            await monitor.get(
                "blockdev-backup", job_id="b", device="busy", target="target", sync="full"
            )
            await gate.reached()
            shown = await monitor.refusal("drive-backup", **backup(image, device="target"))
            assert shown == ("Node 'target' is busy: block device is in use by block job: backup")
            await monitor.get("job-cancel", id="b")
        await monitor.event("JOB_STATUS_CHANGE", id="b", status="null")

    run(tmp_path, scenario)
    assert image.read_bytes() == b"the backup of yesterday"


def test_the_top_of_a_chain_needs_a_target_that_can_be_in_one(tmp_path: Path) -> None:
    image = tmp_path / "backup.img"

    async def scenario(rig: Rig, monitor: Monitor) -> None:
        graph = rig.daemon.graph
        disk, base = graph.nodes["disk"], rig.add_disk("base", bytes(MIB))
        graph.attach(disk, "backing", base, Role.BACKING)
        assert await monitor.refusal("drive-backup", **backup(image, sync="top")) == (
            "Backing file not supported for file format 'raw'"
        )
        graph.detach(disk.edges["backing"])
        await monitor.get("drive-backup", **backup(image, sync="top"))
        await monitor.event("JOB_STATUS_CHANGE", id="j", status="null")

    run(tmp_path, scenario)
    assert image.read_bytes() == CONTENT


@pytest.mark.parametrize("size", [MIB - 512, MIB + 512])
def test_an_existing_image_keeps_its_size(tmp_path: Path, size: int) -> None:
    image = tmp_path / "backup.img"
    image.write_bytes(b"x" * size)

    async def scenario(rig: Rig, monitor: Monitor) -> None:
        shown = await monitor.refusal("drive-backup", **backup(image, mode="existing"))
        assert shown == "Source and target image have different sizes"
        assert set(rig.daemon.graph.nodes) == {"disk"}

    run(tmp_path, scenario)
    assert image.read_bytes() == b"x" * size


def test_a_disk_that_looks_like_an_image_needs_a_format_given(tmp_path: Path) -> None:
    """Or else its guest would choose the format of the backup."""
    image = tmp_path / "backup.img"
    image.write_bytes(bytes(MIB))

    async def scenario(rig: Rig, monitor: Monitor) -> None:
        rig.add_disk("guest", b"QFI\xfb" + CONTENT[4:])
        existing = backup(image, device="guest", mode="existing")
        del existing["format"]
        await monitor.get("drive-backup", **existing)
        completed = await monitor.event("BLOCK_JOB_COMPLETED")
        assert completed["error"] == "Operation not permitted"
        await monitor.event("JOB_STATUS_CHANGE", id="j", status="null")
        assert set(rig.daemon.graph.nodes) == {"disk", "guest"}
        await monitor.get("drive-backup", **(existing | {"format": "raw"}))
        await monitor.event("JOB_STATUS_CHANGE", id="j", status="null")

    run(tmp_path, scenario)
    assert image.read_bytes() == b"QFI\xfb" + CONTENT[4:]
