# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""qemu-io over QMP: requests held at break points, requests that nobody waits for, permissions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdjobs.daemon import side_requests
from nbdjobs.protocol.constants import Command
from nbdjobs.qmp.qemu_io import image, reads, words
from nbdjobs.qmp.qemu_io.shell import run_line
from tests.daemon.rig import Monitor, Rig, running
from tests.jobs.rig import turns
from tests.nodes.faults import MemoryNode, Op

CLUSTER = 64 * 1024
OLD = b"\x11" * 4 * CLUSTER


async def io(monitor: Monitor, name: str, line: str, *, flag: str = "") -> str:
    answer: str = await monitor.get(
        "human-monitor-command", command_line=f'qemu-io {flag} {name} "{line}"'
    )
    return answer


@asynccontextmanager
async def debugged(
    directory: Path, content: bytes | int = OLD
) -> AsyncIterator[tuple[Rig, Monitor, MemoryNode]]:
    """A daemon with a disk in memory below a blkdebug node "debug"."""
    async with running(directory) as rig:
        monitor = await rig.monitor()
        disk = rig.add_disk("disk", content)
        await monitor.get("blockdev-add", driver="blkdebug", node_name="debug", image="disk")
        yield rig, monitor, disk


# Copies held at an event


def test_a_write_waits_for_the_copy_of_its_cluster_and_another_passes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with debugged(tmp_path, bytes(4 * CLUSTER)) as (rig, monitor, target):
            source = rig.add_disk("source", OLD)
            await rig.start_nbd(monitor)
            await rig.export(monitor, "source")
            first, second = await rig.client("source"), await rig.client("source")
            await monitor.get(
                "blockdev-backup", job_id="job", device="source", target="debug", sync="none"
            )
            assert await io(monitor, "debug", "break pwritev copy") == ""
            waiting = first.send(Command.WRITE, 512, 512, payload=b"n" * 512)
            assert await io(monitor, "debug", "wait_break copy") == ""
            await second.write(2 * CLUSTER, b"m" * 512)
            assert source.content[512:1024] == OLD[:512]
            assert source.content[2 * CLUSTER : 2 * CLUSTER + 512] == b"m" * 512
            assert bytes(target.content[2 * CLUSTER : 3 * CLUSTER]) == OLD[:CLUSTER]
            assert bytes(target.content[:CLUSTER]) == bytes(CLUSTER)
            assert await io(monitor, "debug", "resume copy") == ""
            (reply,) = await first.reply()
            assert (reply.cookie, reply.error) == (waiting, 0)
            assert source.content[512:1024] == b"n" * 512
            assert bytes(target.content[:CLUSTER]) == OLD[:CLUSTER]
            await monitor.get("block-job-cancel", device="job")
            await monitor.event("BLOCK_JOB_CANCELLED")

    asyncio.run(scenario())


def test_the_background_copy_of_a_cluster_is_what_a_write_to_it_waits_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with debugged(tmp_path, bytes(4 * CLUSTER)) as (rig, monitor, target):
            source = rig.add_disk("source", OLD)
            await rig.start_nbd(monitor)
            await rig.export(monitor, "source")
            client = await rig.client("source")
            await io(monitor, "debug", "break pwritev copy")
            await monitor.get(
                "blockdev-backup", job_id="job", device="source", target="debug", sync="full"
            )
            await io(monitor, "debug", "wait_break copy")
            copies = target.counts[Op.WRITE]
            client.send(Command.WRITE, 0, 512, payload=b"n" * 512)
            answer = asyncio.create_task(client.reply())
            await turns()
            assert not answer.done()
            await io(monitor, "debug", "resume copy")
            (reply,) = await answer
            assert reply.error == 0
            await monitor.event("BLOCK_JOB_COMPLETED")
            assert bytes(target.content) == OLD
            assert bytes(source.content) == b"n" * 512 + OLD[512:]
            assert target.counts[Op.WRITE] > copies

    asyncio.run(scenario())


# Requests that nobody waits for


def test_what_became_of_a_request_is_told_with_the_next_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with debugged(tmp_path) as (_, monitor, disk):
            await io(monitor, "debug", "break pwritev A")
            assert await io(monitor, "debug", "aio_write -P 9 0 512") == ""
            await io(monitor, "debug", "wait_break A")
            assert disk.content[:512] == OLD[:512]
            assert await io(monitor, "debug", "resume A") == ""
            told = await io(monitor, "debug", "aio_flush")
            assert told.startswith("wrote 512/512 bytes at offset 0\n")
            assert await io(monitor, "debug", "aio_flush") == ""
            assert disk.content[:512] == b"\x09" * 512

    asyncio.run(scenario())


def test_a_request_that_need_not_wait_is_told_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with debugged(tmp_path) as (_, monitor, _disk):
            told = await io(monitor, "disk", "aio_read -P 0x11 0 512")
            assert told.startswith("read 512/512 bytes at offset 0\n")
            assert "verification failed" not in told

    asyncio.run(scenario())


def test_aio_flush_waits_for_requests_of_its_node_only(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with debugged(tmp_path) as (rig, monitor, disk):
            second = await rig.monitor()
            async with disk.hold(Op.READ) as gate:
                await io(monitor, "disk", "aio_read -q 0 512")
                await gate.reached()
                assert await io(monitor, "debug", "aio_flush") == ""
                waiting = asyncio.create_task(io(second, "disk", "aio_flush"))
                await io(monitor, "debug", "length")
                assert not waiting.done()
            assert await waiting == ""

    asyncio.run(scenario())


def test_a_node_with_a_held_request_is_not_deleted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with debugged(tmp_path) as (_, monitor, _disk):
            await io(monitor, "debug", "break pwritev A")
            await io(monitor, "debug", "aio_write -q 0 512")
            words = await monitor.refusal("blockdev-del", node_name="debug")
            assert words == "Node debug is in use"
            await io(monitor, "debug", "remove_break A")
            await io(monitor, "debug", "aio_flush")
            await monitor.get("blockdev-del", node_name="debug")

    asyncio.run(scenario())


def test_removing_a_break_point_ends_the_wait_for_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with debugged(tmp_path) as (rig, _monitor, _disk):
            await run_line(rig.daemon, "debug", "break pwritev A")
            waiting = asyncio.create_task(run_line(rig.daemon, "debug", "wait_break A"))
            await turns()
            assert await run_line(rig.daemon, "debug", "remove_break A") == ""
            gone = "Could not wait for breakpoint A: No such file or directory\n"
            assert await waiting == gone

    asyncio.run(scenario())


def test_the_end_of_the_daemon_lets_held_requests_go(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with debugged(tmp_path) as (rig, monitor, disk):
            await rig.start_nbd(monitor)
            await rig.export(monitor, "debug")
            client = await rig.client("debug")
            for tag in ("A", "B", "C"):
                await io(monitor, "debug", f"break pwritev {tag}")
            client.send(Command.WRITE, 0, 512, payload=b"c" * 512)
            await io(monitor, "debug", "wait_break A")
            await io(monitor, "disk", "length")
            monitor.send("human-monitor-command", command_line='qemu-io debug "wait_break nobody"')
        assert disk.content[:512] == b"c" * 512

    asyncio.run(scenario())


def test_an_export_whose_client_is_held_goes_when_the_request_does(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with debugged(tmp_path) as (rig, monitor, disk):
            await rig.start_nbd(monitor)
            await rig.export(monitor, "debug", id="e")
            client = await rig.client("debug")
            await io(monitor, "debug", "break pwritev A")
            client.send(Command.WRITE, 0, 512, payload=b"c" * 512)
            await io(monitor, "debug", "wait_break A")
            await monitor.get("block-export-del", id="e", mode="hard")
            await io(monitor, "debug", "remove_break A")
            await monitor.event("BLOCK_EXPORT_DELETED", id="e")
            assert disk.in_flight == 0

    asyncio.run(scenario())


def test_requests_that_nobody_fetches_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_requests, "MAX_REQUESTS", 2)
    monkeypatch.setattr(side_requests, "MAX_BYTES", 4096)

    async def scenario() -> None:
        async with debugged(tmp_path) as (_, monitor, disk):
            async with disk.hold():
                assert await io(monitor, "disk", "aio_write -q 0 4k") == ""
                too_many = "Too many asynchronous requests\n"
                assert await io(monitor, "disk", "aio_write 4k 1") == too_many
                assert await io(monitor, "disk", "aio_write -q -z 8k 4k") == ""
                assert await io(monitor, "disk", "aio_write -z 12k 4k") == too_many
            assert await io(monitor, "disk", "aio_flush") == ""
            told = await io(monitor, "disk", "aio_write 4k 4k")
            assert told.startswith("wrote 4096/4096")

    asyncio.run(scenario())


# Sizes


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("read 0 129M", f"length cannot exceed {words.MAX_BUFFER}, given 129M\n"),
        ("write 0 129M", f"length cannot exceed {words.MAX_BUFFER} without -n, given 129M\n"),
        ("readv 0 129M", f"Argument '129M' exceeds maximum size {words.MAX_BUFFER}\n"),
        (
            "aio_write 0 128M 1",
            f"The total number of bytes exceed the maximum size {words.MAX_BUFFER}\n",
        ),
        ("read -v 0 1M", f"-v shows at most {reads.MAX_DUMP} bytes\n"),
        ("truncate -m falloc 2M", "Unsupported preallocation mode 'falloc'\n"),
    ],
)
def test_memory_is_not_taken_for_whatever_is_asked(line: str, told: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with debugged(tmp_path) as (_, monitor, disk):
            assert await io(monitor, "disk", line) == told
            assert not disk.requests

    asyncio.run(scenario())


def test_a_fragmented_map_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "MAX_RUNS", 0)

    async def scenario() -> None:
        async with debugged(tmp_path) as (_, monitor, _disk):
            assert await io(monitor, "disk", "map") == "only the first 0 areas are shown\n"

    asyncio.run(scenario())


# Who may do what


def test_a_node_in_use_is_not_written_where_its_user_does_not_share_that(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with debugged(tmp_path) as (rig, monitor, disk):
            await rig.start_nbd(monitor)
            await rig.export(monitor, "disk")
            told = await io(monitor, "disk", "truncate 1M")
            assert told.startswith("Permission conflict on node 'disk': permissions 'resize'")
            assert (await io(monitor, "disk", "write -q 0 512")) == ""
            assert disk.content[:512] == b"\xcd" * 512
            assert len(disk.parents) == 2  # blkdebug and the export, and nobody else any more

    asyncio.run(scenario())


def test_an_exports_own_door_does_what_it_does_for_clients(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with debugged(tmp_path) as (rig, monitor, disk):
            await rig.start_nbd(monitor)
            await rig.export(monitor, "disk", id="rw")
            await rig.export(monitor, "disk", id="ro", name="ro", writable=False)
            assert await io(monitor, "rw", "write -q 0 512", flag="-d") == ""
            refused = "Device 'ro' does not allow that\n"
            assert await io(monitor, "ro", "write 0 512", flag="-d") == refused
            await io(monitor, "ro", "aio_read -i 0 512", flag="-d")
            await io(monitor, "rw", "aio_write -i 0 512", flag="-d")
            stats = {each["qdev"]: each["stats"] for each in await monitor.get("query-blockstats")}
            assert stats["rw"]["wr_operations"] == 1
            assert stats["rw"]["invalid_wr_operations"] == 1
            assert stats["ro"]["invalid_rd_operations"] == 1
            assert disk.content[:512] == b"\xcd" * 512

    asyncio.run(scenario())


def test_a_failing_flush_and_a_failing_status_are_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with debugged(tmp_path) as (_, monitor, disk):
            disk.fail(Op.FLUSH)
            assert await io(monitor, "disk", "flush") == "flush failed: Input/output error\n"
            disk.fail(Op.STATUS)
            told = "Failed to get allocation status: Input/output error\n"
            assert await io(monitor, "disk", "map") == told
            disk.fail(Op.STATUS)
            told = "is_allocated failed: Input/output error\n"
            assert await io(monitor, "disk", "alloc 0") == told

    asyncio.run(scenario())
