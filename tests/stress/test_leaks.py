# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What comes and goes many times leaves nothing behind: descriptors, threads, tasks, objects."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.daemon.rig import Monitor, Rig, running
from tests.interop.daemon import Daemon, unix_server
from tests.interop.tools import require_libnbd
from tests.protocol.client import Client

CYCLES = 200
SIZE = 256 * 1024

#: Answers of the daemon after which what it closes in the background must be closed.
ROUND_TRIPS = 2000


def test_a_process_is_after_many_cycles_what_it_was_before(tmp_path: Path) -> None:
    nbd = require_libnbd()
    (tmp_path / "run").mkdir()
    for name in ("source", "target"):
        (tmp_path / name).write_bytes(b"\x11" * SIZE)
    with Daemon(tmp_path / "run", *unix_server()) as daemon:
        cycle(daemon, nbd, tmp_path, 0)
        wait_until_settled(daemon, lambda: count_threads(daemon) == 1)
        before = open_files(daemon)
        for number in range(CYCLES):
            cycle(daemon, nbd, tmp_path, number)
        wait_until_settled(daemon, lambda: count_threads(daemon) == 1)
        wait_until_settled(daemon, lambda: open_files(daemon) == before)
        assert daemon.qmp.execute("query-named-block-nodes") == []
        assert daemon.qmp.execute("query-block-exports") == []
        assert daemon.qmp.execute("query-jobs") == []


def cycle(daemon: Daemon, nbd: Any, directory: Path, number: int) -> None:
    """Open disks, export one, write, start a backup, cancel it, in varying order close all."""
    qmp = daemon.qmp
    for name in ("source", "target"):
        file = {"driver": "file", "node-name": name, "filename": str(directory / name)}
        qmp.execute("blockdev-add", file)
    export = {"type": "nbd", "id": "export", "node-name": "source", "writable": True}
    qmp.execute("block-export-add", export)
    handle = nbd.NBD()
    handle.connect_uri(daemon.uri("source"))
    backup = {"job-id": "job", "device": "source", "target": "target", "sync": "full", "speed": 1}
    qmp.execute("blockdev-backup", backup)
    handle.pwrite(b"x" * 1000, number * 512, nbd.CMD_FLAG_FUA)
    ways: list[Callable[[], object]] = [
        lambda: qmp.execute("job-cancel", {"id": "job"}),
        handle.shutdown,
        lambda: qmp.execute("block-export-del", {"id": "export", "mode": "hard"}),
    ]
    for way in ways[number % 2 :] + ways[: number % 2]:
        way()
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    qmp.wait_job_status("job", "null")
    for name in ("source", "target"):
        qmp.execute("blockdev-del", {"node-name": name})
    qmp.events.clear()


def wait_until_settled(daemon: Daemon, is_settled: Callable[[], bool]) -> None:
    """Give the daemon turns until what ends in the background has ended."""
    for _ in range(ROUND_TRIPS):
        if is_settled():
            return
        daemon.qmp.execute("query-jobs")
    raise AssertionError("something is left behind")


def count_threads(daemon: Daemon) -> int:
    return len(list(Path(f"/proc/{daemon.process.pid}/task").iterdir()))


def open_files(daemon: Daemon) -> list[str]:
    """What the daemon has open, by name; all sockets and all anonymous files look alike."""
    links = Path(f"/proc/{daemon.process.pid}/fd").iterdir()
    return sorted(str(link.readlink()).partition("[")[0] for link in links)


def test_no_task_outlives_what_it_was_made_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as rig:
            monitor = await rig.monitor()
            await rig.start_nbd(monitor)
            await cycle_in_memory(rig, monitor)
            before = len(asyncio.all_tasks())
            for _ in range(CYCLES // 4):
                await cycle_in_memory(rig, monitor)
            assert len(asyncio.all_tasks()) == before

    asyncio.run(scenario())


async def cycle_in_memory(rig: Rig, monitor: Monitor) -> None:
    """Disks, an export, a client and a backup that is cancelled under it come and go."""
    for name in ("source", "target"):
        rig.add_disk(name, SIZE)
    await rig.export(monitor, "source")
    client = await Client.attach(rig.nbd_path, name="source")
    await monitor.get(
        "blockdev-backup", job_id="job", device="source", target="target", sync="full", speed=1
    )
    await client.write(1000, b"x" * 1000)
    await monitor.get("job-cancel", id="job")
    await monitor.event("JOB_STATUS_CHANGE", id="job", status="null")
    await monitor.get("block-export-del", id="export-source", mode="hard")
    await monitor.event("BLOCK_EXPORT_DELETED")
    await client.close()
    for name in ("source", "target"):
        await monitor.get("blockdev-del", node_name=name)
