# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""sync=top copies what an overlay has itself, as it was when the backup started."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nbdjobs.jobs.backup import BackupOptions, SyncMode, start_backup
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.error_policy import OnError
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.qcow2.create import CreateOptions, empty_image
from tests.jobs.chains import CLUSTER, Chain, chain, writers
from tests.nodes.qcow2.rig import HAS_QEMU_IMG, content_of, qemu_img

SIZE = 64 * 16 * CLUSTER
SIZES = {"base": SIZE, "top": SIZE}
UNIT = 64 * 1024


async def target(made: Chain, *, has_backing: bool) -> Node:
    path = made.directory / "target.qcow2"
    options = CreateOptions(
        size=SIZE,
        backing_file="base.qcow2" if has_backing else None,
        backing_format="qcow2" if has_backing else None,
    )
    path.write_bytes(empty_image(options))
    return await made.add(
        driver="qcow2",
        **{"node-name": "target"},
        file={"driver": "file", "filename": str(path)},
        backing=None,
    )


@pytest.mark.skipif(not HAS_QEMU_IMG, reason="qemu-img is not installed")
@pytest.mark.parametrize("fails", [False, True])
def test_the_target_above_the_same_base_is_the_disk_at_the_start(
    tmp_path: Path, fails: bool
) -> None:
    fails_at = {"top": "read_aio"} if fails else None

    async def main() -> None:
        async with chain(tmp_path, SIZES, fails_at=fails_at) as made:
            at_start = bytes(made.model)
            options = BackupOptions(sync=SyncMode.TOP, job_id="j", on_source_error=OnError.IGNORE)
            top, copy = made.node("top"), await target(made, has_backing=True)
            job = await start_backup(made.jobs, made.graph, top, copy, options)
            async with writers(made, 1):
                await made.run_through(job)
            assert job.current_progress == job.total_progress
            await made.check_seen()
        (tmp_path / "start.raw").write_bytes(at_start)
        path = tmp_path / "target.qcow2"
        qemu_img("check", path)
        qemu_img("compare", "-F", "raw", path, tmp_path / "start.raw")

    asyncio.run(main())


def test_what_comes_from_below_is_not_copied(tmp_path: Path) -> None:
    async def main() -> None:
        async with chain(tmp_path, SIZES) as made:
            top, copy = made.node("top"), await target(made, has_backing=False)
            own = 0
            for begin in range(0, SIZE, UNIT):
                found, length = await top.allocation(begin, UNIT)
                own += found or length < UNIT
            assert 0 < own < SIZE // UNIT
            options = BackupOptions(sync=SyncMode.TOP, job_id="j")
            job = await start_backup(made.jobs, made.graph, top, copy, options)
            await made.run_through(job)
            assert job.total_progress == own * UNIT
            for begin in range(0, SIZE, UNIT):
                found, length = await top.allocation(begin, UNIT)
                if not found and length == UNIT:
                    assert await copy.allocation(begin, UNIT) == (False, UNIT)

    asyncio.run(main())


def test_a_target_above_the_disk_keeps_its_zeroes(tmp_path: Path) -> None:
    """What is not copied it reads from the disk; hence old zeroes have to be written to it."""

    async def main() -> None:
        async with chain(tmp_path, {"disk": SIZE}) as made:
            at_start = bytes(made.model)
            disk = made.node("disk")
            path = tmp_path / "target.qcow2"
            path.write_bytes(empty_image(CreateOptions(size=SIZE)))
            copy = await made.add(
                driver="qcow2",
                **{"node-name": "target"},
                file={"driver": "file", "filename": str(path)},
                backing="disk",
            )
            options = BackupOptions(sync=SyncMode.NONE, job_id="j")
            job = await start_backup(made.jobs, made.graph, disk, copy, options)
            reader = Device(made.graph, copy)
            for begin in range(0, SIZE, 10 * CLUSTER):
                await made.guest.pwrite(begin, memoryview(b"new" * 100))
                made.model[begin : begin + 300] = b"new" * 100
            assert await content_of(reader) == at_start
            await reader.close()
            job.cancel()
            await made.run_through(job)
            await made.check_seen()

    asyncio.run(main())
