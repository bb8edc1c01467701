# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The reference QMP client library drives a whole backup while an NBD client writes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import EventListener, ExecuteError, Message, QMPClient

from tests.interop.conftest import DISK_SIZE, Connect, StartDaemon
from tests.interop.daemon import Daemon, Disk

#: Slow enough that the job is certainly still running while the test writes (bytes per second).
HELD_BACK = 1


async def session(socket: Path) -> QMPClient:
    client = QMPClient("test")
    await client.connect(str(socket))
    return client


async def event(listener: EventListener, name: str, **wanted: object) -> Message:
    """Return the next event of this name whose data has these values."""
    async with asyncio.timeout(60):
        async for message in listener:
            if message["event"] == name and wanted.items() <= data_of(message).items():
                return message
    raise AssertionError(f"the session ended without {name}")


def data_of(message: Message) -> dict[str, object]:
    data = message.get("data", {})
    assert isinstance(data, dict)
    return data


async def add_disk(client: QMPClient, name: str, path: Path) -> None:
    file_node = {"driver": "file", "filename": str(path), "discard": "unmap"}
    options = {"driver": "raw", "node-name": name, "file": file_node, "discard": "unmap"}
    await client.execute("blockdev-add", options)


async def serve_disk(client: QMPClient, daemon: Daemon, name: str) -> None:
    address = {"type": "unix", "data": {"path": str(daemon.nbd_socket)}}
    await client.execute("nbd-server-start", {"addr": address})
    export = {"type": "nbd", "id": "export", "node-name": name, "name": "disk0", "writable": True}
    await client.execute("block-export-add", export)


@pytest.fixture
def qmp_socket(tmp_path: Path) -> Path:
    """Where the daemon of ``bare_daemon`` listens for the library's own session."""
    return tmp_path / "library.sock"


@pytest.fixture
def bare_daemon(start_daemon: StartDaemon, qmp_socket: Path) -> Daemon:
    """A daemon without any node, with a second monitor."""
    return start_daemon(
        *("--chardev", f"socket,id=library,path={qmp_socket},server=on,wait=off"),
        *("--monitor", "chardev=library"),
    )


def test_a_full_backup_under_writes_is_the_disk_at_its_start(
    bare_daemon: Daemon, qmp_socket: Path, disk: Disk, tmp_path: Path, connect: Connect
) -> None:
    target = tmp_path / "target.img"
    target.write_bytes(bytes(DISK_SIZE))
    before = disk.content()

    async def back_up() -> None:
        client = await session(qmp_socket)
        await add_disk(client, "disk0", disk.path)
        await add_disk(client, "target0", target)
        await serve_disk(client, bare_daemon, "disk0")
        with client.listener() as events:
            job = {"job-id": "job0", "device": "disk0", "target": "target0", "sync": "full"}
            manual = {"auto-dismiss": False, "auto-finalize": False, "speed": HELD_BACK}
            await client.execute("blockdev-backup", {**job, **manual})
            await event(events, "JOB_STATUS_CHANGE", id="job0", status="running")

            await asyncio.to_thread(overwrite, connect(bare_daemon))

            [running] = await query(client, "query-block-jobs")
            assert running["device"] == "job0"
            assert running["type"] == "backup"
            assert running["status"] == "running"
            assert running["speed"] == HELD_BACK
            await client.execute("block-job-set-speed", {"device": "job0", "speed": 0})
            await event(events, "JOB_STATUS_CHANGE", id="job0", status="pending")
            await client.execute("job-finalize", {"id": "job0"})
            completed = await event(events, "BLOCK_JOB_COMPLETED", device="job0")
            assert "error" not in data_of(completed)

            [concluded] = await query(client, "query-jobs")
            assert concluded["status"] == "concluded"
            assert concluded["current-progress"] == concluded["total-progress"]
            await client.execute("job-dismiss", {"id": "job0"})
            await event(events, "JOB_STATUS_CHANGE", id="job0", status="null")
        assert await query(client, "query-jobs") == []
        await client.execute("blockdev-del", {"node-name": "target0"})
        await client.disconnect()

    asyncio.run(back_up())
    assert target.read_bytes() == before
    assert disk.content() != before


def overwrite(handle: Any) -> None:
    """Change the disk by every command that can, aligned and not."""
    handle.pwrite(b"n" * 4096, 0)
    handle.pwrite(b"o" * 3, 65535)
    handle.zero(100_000, 130_000)
    handle.trim(65536, DISK_SIZE // 2)
    handle.pwrite(b"p" * 65536, DISK_SIZE - 65536)
    handle.flush()


async def query(client: QMPClient, command: str) -> list[dict[str, Any]]:
    answer = await client.execute(command)
    assert isinstance(answer, list)
    return answer


def test_a_cancelled_backup_leaves_the_source_alone(
    bare_daemon: Daemon, qmp_socket: Path, disk: Disk, tmp_path: Path, connect: Connect
) -> None:
    target = tmp_path / "target.img"
    target.write_bytes(bytes(DISK_SIZE))

    async def cancel() -> None:
        client = await session(qmp_socket)
        await add_disk(client, "disk0", disk.path)
        await add_disk(client, "target0", target)
        await serve_disk(client, bare_daemon, "disk0")
        nodes = sorted(node["node-name"] for node in await query(client, NODES))
        with client.listener() as events:
            job = {"job-id": "job0", "device": "disk0", "target": "target0", "sync": "full"}
            await client.execute("blockdev-backup", {**job, "speed": HELD_BACK})
            await asyncio.to_thread(overwrite, connect(bare_daemon))
            await client.execute("block-job-cancel", {"device": "job0"})
            await event(events, "BLOCK_JOB_CANCELLED", device="job0")
            await event(events, "JOB_STATUS_CHANGE", id="job0", status="null")
        assert await query(client, "query-jobs") == []
        assert sorted(node["node-name"] for node in await query(client, NODES)) == nodes
        await client.execute("blockdev-del", {"node-name": "target0"})
        await client.disconnect()

    asyncio.run(cancel())
    assert disk.content(0, 4096) == b"n" * 4096


NODES = "query-named-block-nodes"


def test_errors_come_as_the_library_expects(bare_daemon: Daemon, qmp_socket: Path) -> None:
    async def ask() -> None:
        client = await session(qmp_socket)
        job = {"job-id": "job0", "device": "none", "target": "none", "sync": "full"}
        with pytest.raises(ExecuteError, match="Cannot find device='none'") as refusal:
            await client.execute("blockdev-backup", job)
        assert refusal.value.error_class == "GenericError"
        with pytest.raises(ExecuteError) as unknown:
            await client.execute("no-such-command")
        assert unknown.value.error_class == "CommandNotFound"
        await client.disconnect()

    asyncio.run(ask())
    assert bare_daemon.qmp.execute("query-jobs") == []
