# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots of a disk that a client writes: each is the disk as it was at one instant."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdjobs.cli.main import main
from tests.daemon.rig import MIB, Monitor, Rig, running
from tests.nodes.faults import Op
from tests.nodes.qcow2.rig import HAS_QEMU_IMG, content_of, opened, qemu_img

SLOT = 4096
SLOTS = 64
WRITES = 600


def node(path: Path, name: str, **options: Any) -> dict[str, Any]:
    file = {"driver": "file", "filename": str(path)}
    return {"driver": "qcow2", "node_name": name, "file": file, **options}


@asynccontextmanager
async def served(tmp_path: Path, path: Path) -> AsyncIterator[tuple[Rig, Monitor]]:
    async with running(tmp_path) as rig:
        monitor = await rig.monitor()
        await monitor.get("blockdev-add", **node(path, "disk"))
        await rig.start_nbd(monitor)
        await rig.export(monitor, "disk")
        yield rig, monitor
        await monitor.get("block-export-del", id="export-disk", mode="hard")
        await monitor.event("BLOCK_EXPORT_DELETED", id="export-disk")
        await monitor.get("blockdev-del", node_name="disk")


def after(count: int) -> bytes:
    """The disk after so many writes, each of its number to the next slot in turn."""
    content = bytearray(MIB)
    for number in range(max(count - SLOTS, 0), count):
        place = number % SLOTS * SLOT
        content[place : place + SLOT] = number.to_bytes(4) * (SLOT // 4)
    return bytes(content)


def test_a_snapshot_under_writes_is_one_instant(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    assert main(["create", "-f", "qcow2", "-o", "cluster-size=4K", str(path), "1M"]) == 0
    begun: list[int] = []
    done: list[int] = []

    async def write(rig: Rig, progress: asyncio.Condition, counter: list[int]) -> None:
        client = await rig.client("disk")
        for number in range(WRITES):
            data = number.to_bytes(4) * (SLOT // 4)
            await client.write(number % SLOTS * SLOT, data)
            counter[0] = number + 1
            async with progress:
                progress.notify_all()

    async def go() -> None:
        async with served(tmp_path, path) as (rig, monitor):
            progress, counter = asyncio.Condition(), [0]
            writing = asyncio.create_task(write(rig, progress, counter))
            for turn in range(1, 5):
                async with progress:
                    await progress.wait_for(lambda: counter[0] >= turn * 100)  # noqa: B023
                begun.append(counter[0])
                await monitor.get("blockdev-snapshot-internal-sync", device="disk", name=f"s{turn}")
                done.append(counter[0])
            deleted = await monitor.get(
                "blockdev-snapshot-delete-internal-sync", device="disk", name="s2"
            )
            assert deleted["id"] == "2"
            await writing
        async with opened(path, read_only=True) as disk:
            assert await content_of(disk) == after(WRITES)
        for turn in (1, 3, 4):
            async with opened(path, read_only=True, snapshot=f"s{turn}") as disk:
                content = await content_of(disk)
            # The write in flight may be in it, or not yet.
            possible = range(begun[turn - 1], done[turn - 1] + 2)
            assert content in [after(count) for count in possible]

    asyncio.run(go())
    if HAS_QEMU_IMG:
        qemu_img("check", path)


def test_a_failure_is_told_and_the_clients_go_on(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    assert main(["create", "-f", "qcow2", "-o", "refcount-bits=1", str(path), "1M"]) == 0

    async def go() -> None:
        async with served(tmp_path, path) as (rig, monitor):
            client = await rig.client("disk")
            await client.write(0, b"a" * SLOT)
            assert await monitor.refusal(
                "blockdev-snapshot-internal-sync", device="disk", name="s"
            ) == ("Failed to create snapshot 's' on device 'disk': Invalid argument")
            await client.write(SLOT, b"b" * SLOT)
            assert await client.read(0, 2 * SLOT) == b"a" * SLOT + b"b" * SLOT

    asyncio.run(go())
    assert main(["check", str(path)]) == 0


def test_clients_wait_while_a_snapshot_is_taken(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(tmp_path) as rig:
            monitor, other = await rig.monitor(), await rig.monitor()
            file = rig.add_disk("file", 4 * MIB)
            create = {"driver": "qcow2", "file": "file", "size": MIB}
            await monitor.get("blockdev-create", job_id="j", options=create)
            await monitor.event("JOB_STATUS_CHANGE", id="j", status="concluded")
            await monitor.get("job-dismiss", id="j")
            await monitor.get("blockdev-add", driver="qcow2", node_name="disk", file="file")
            await rig.start_nbd(monitor)
            await rig.export(monitor, "disk")
            client = await rig.client("disk")
            await client.write(0, b"old" * SLOT)
            async with file.hold(Op.FLUSH) as gate:
                monitor.send("blockdev-snapshot-internal-sync", device="disk", name="s")
                await gate.reached()
                late = asyncio.create_task(client.write(0, b"new" * SLOT))
                nodes = await other.get("query-named-block-nodes", flat=True)
                assert all("snapshots" not in each["image"] for each in nodes)
                assert not late.done()
            assert (await monitor.reply())["return"] == {}
            await late
            read_only = {"driver": "qcow2", "file": "file", "read_only": True, "snapshot": "s"}
            assert "Permission conflict" in await monitor.refusal(
                "blockdev-add", node_name="then", **read_only
            )
            await monitor.get("block-export-del", id="export-disk", mode="hard")
            await monitor.event("BLOCK_EXPORT_DELETED", id="export-disk")
            await monitor.get("blockdev-del", node_name="disk")
            await monitor.get("blockdev-add", node_name="then", **read_only)
            await rig.export(monitor, "then", writable=False)
            reader = await rig.client("then")
            assert await reader.read(0, 3 * SLOT) == b"old" * SLOT

    asyncio.run(go())


def test_a_terabyte_is_checked_in_little_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "disk.qcow2"
    assert main(["create", "-f", "qcow2", str(path), "1T"]) == 0

    async def fill() -> None:
        async with opened(path) as disk:
            for number in range(32):
                await disk.pwrite(number * (32 << 30), memoryview(b"x" * 65536))

    asyncio.run(fill())
    assert main(["check", str(path)]) == 0  # so that all modules are there
    tracemalloc.start()
    try:
        assert main(["check", "--output", "json", str(path)]) == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * MIB
    assert '"allocated-clusters": 32' in capsys.readouterr().out
