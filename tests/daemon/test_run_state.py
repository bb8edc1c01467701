# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""stop, cont and query-status, as clients and users see them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdjobs.daemon import exports
from nbdjobs.protocol.constants import Command, NbdError
from nbdjobs.protocol.turns import ALONE
from tests.daemon.rig import Monitor, Rig, running
from tests.nodes.faults import MemoryNode, Op

RUNNING = {"running": True, "singlestep": False, "status": "running"}
PAUSED = {"running": False, "singlestep": False, "status": "paused"}
OLD = b"old!" * 16384


@asynccontextmanager
async def exporting(directory: Path, *names: str) -> AsyncIterator[tuple[Rig, Monitor]]:
    async with running(directory) as rig:
        monitor = await rig.monitor()
        await rig.start_nbd(monitor)
        for name in names or ("disk",):
            rig.add_disk(name, OLD)
            await rig.export(monitor, name)
        yield rig, monitor


def disk_of(rig: Rig, name: str = "disk") -> MemoryNode:
    disk = rig.daemon.graph.find(name)
    assert isinstance(disk, MemoryNode)
    return disk


async def gone(monitor: Monitor, export: str = "export-disk") -> None:
    await monitor.event("BLOCK_EXPORT_DELETED", id=export)


async def until_no_client(rig: Rig) -> None:
    for _ in range(10_000):
        if not rig.daemon.exports.connection_count:
            return
        await asyncio.sleep(0)
    raise AssertionError("the client is still there")


def test_requests_wait_while_stopped_and_go_on_in_order(tmp_path: Path) -> None:
    async def main() -> None:
        async with exporting(tmp_path, "disk", "other") as (rig, monitor):
            clients = [await rig.client("disk"), await rig.client("other")]
            assert await monitor.get("query-status") == RUNNING
            assert await monitor.get("stop") == {}
            assert [event["event"] for event in monitor.events] == ["STOP"]
            assert await monitor.get("query-status") == PAUSED
            for client in clients:
                for number in range(4):
                    client.send(Command.WRITE, 512 * number, payload=bytes(512))
                client.send(Command.READ, 0, 512)
            later = await rig.client("disk")  # negotiation goes on
            later.send(Command.FLUSH)
            assert await monitor.get("query-status") == PAUSED
            assert not disk_of(rig).requests_of(Op.WRITE)
            monitor.events.clear()
            assert await monitor.get("cont") == {}
            assert [event["event"] for event in monitor.events] == ["RESUME"]
            for client in clients:
                for _ in range(5):
                    assert not (await client.reply())[-1].error
            assert not (await later.reply())[-1].error
            for name in ("disk", "other"):
                written = disk_of(rig, name).requests_of(Op.WRITE)
                assert [request.offset for request in written] == [0, 512, 1024, 1536]
            assert await monitor.get("query-status") == RUNNING

    asyncio.run(main())


def test_stop_waits_for_what_is_in_flight_and_makes_it_stable(tmp_path: Path) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (rig, monitor):
            client, disk = await rig.client("disk"), disk_of(rig)
            async with disk.hold(Op.WRITE) as gate:
                client.send(Command.WRITE, 0, payload=b"new!" * 128)
                await gate.reached()
                monitor.send("stop")
                await monitor.event("STOP")
                other = await rig.monitor()
                assert await other.get("query-status") == PAUSED
                assert disk.stable == OLD
            assert await monitor.reply() == {"return": {}}
            assert not (await client.reply())[-1].error
            assert disk.stable[:512] == b"new!" * 128

    asyncio.run(main())


def test_whoever_continues_frees_clients_from_a_stop_that_waits_for_a_stuck_disk(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with exporting(tmp_path, "stuck", "healthy") as (rig, monitor):
            victim, bystander = await rig.client("stuck"), await rig.client("healthy")
            async with disk_of(rig, "stuck").hold() as gate:
                victim.send(Command.READ, 0, 512)
                await gate.reached()
                monitor.send("stop")
                await monitor.event("STOP")
                other = await rig.monitor()
                assert await other.get("cont") == {}
                assert await monitor.reply() == {"return": {}}
                assert await bystander.read(0, 512) == OLD[:512]
            assert not (await victim.reply())[-1].error

    asyncio.run(main())


def test_stop_and_cont_twice_are_told_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (rig, monitor):
            for command in ("cont", "stop", "stop", "cont", "cont"):
                await monitor.get(command)
            assert [event["event"] for event in monitor.events] == ["STOP", "RESUME"]
            await (await rig.client("disk")).read(0, 512)

    asyncio.run(main())


def test_a_flush_that_fails_does_not_keep_the_server_from_stopping(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (rig, monitor):
            disk_of(rig).fail(Op.FLUSH)
            assert await monitor.get("stop") == {}
            assert await monitor.get("query-status") == PAUSED

    asyncio.run(main())
    assert "node disk could not be flushed: Input/output error" in caplog.text


def test_an_export_made_while_stopped_is_stopped(tmp_path: Path) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (rig, monitor):
            await monitor.get("stop")
            rig.add_disk("late")
            await rig.export(monitor, "late")
            client = await rig.client("late")
            client.send(Command.WRITE, 0, payload=bytes(512))
            await monitor.get("query-status")
            assert not disk_of(rig, "late").requests
            await monitor.get("cont")
            assert not (await client.reply())[-1].error

    asyncio.run(main())


def test_jobs_run_while_clients_are_stopped(tmp_path: Path) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (rig, monitor):
            target = rig.add_disk("target", len(OLD))
            client = await rig.client("disk")
            await monitor.get("stop")
            client.send(Command.WRITE, 0, payload=b"new!" * 128)
            await monitor.get(
                "blockdev-backup", job_id="j", device="disk", target="target", sync="full"
            )
            await monitor.event("BLOCK_JOB_COMPLETED")
            assert target.content == OLD
            await monitor.get("cont")
            assert not (await client.reply())[-1].error
            assert disk_of(rig).content[:512] == b"new!" * 128

    asyncio.run(main())


def test_continuing_clears_the_io_status_of_jobs(tmp_path: Path) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (rig, monitor):
            target = rig.add_disk("target", len(OLD))
            target.fail(Op.WRITE)
            await monitor.get(
                "blockdev-backup",
                job_id="j",
                device="disk",
                target="target",
                sync="full",
                on_target_error="stop",
            )
            await monitor.event("BLOCK_JOB_ERROR")
            (job,) = await monitor.get("query-block-jobs")
            assert (job["io-status"], job["paused"]) == ("failed", True)
            await monitor.get("cont")
            (job,) = await monitor.get("query-block-jobs")
            assert (job["io-status"], job["paused"]) == ("ok", True)
            await monitor.get("block-job-resume", device="j")
            await monitor.event("BLOCK_JOB_COMPLETED")

    asyncio.run(main())


# Clients and exports that go while stopped


@pytest.mark.parametrize("requests", [1, ALONE.waiting - 1])
def test_a_client_that_leaves_while_stopped_is_gone(tmp_path: Path, requests: int) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (rig, monitor):
            client = await rig.client("disk")
            await monitor.get("stop")
            for _ in range(requests):
                client.send(Command.WRITE, 0, payload=b"new!" * 128)
            await client.writer.drain()
            client.writer.transport.abort()
            await until_no_client(rig)
            await monitor.get("block-export-del", id="export-disk", mode="safe")
            await gone(monitor)
            assert disk_of(rig).content == OLD

    asyncio.run(main())


@pytest.mark.parametrize("requests", [0, 1, 2 * ALONE.waiting])
def test_an_export_is_removed_with_its_clients_while_stopped(tmp_path: Path, requests: int) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (rig, monitor):
            client = await rig.client("disk")
            await monitor.get("stop")
            for _ in range(requests):
                client.send(Command.WRITE, 0, payload=b"new!" * 128)
            await client.writer.drain()
            await monitor.get("block-export-del", id="export-disk", mode="hard")
            await gone(monitor)
            assert await client.is_closed_by_server()
            assert disk_of(rig).content == OLD
            await monitor.get("cont")

    asyncio.run(main())


@pytest.mark.parametrize("command", ["nbd-server-stop", "quit"])
def test_a_server_that_stops_for_good_refuses_what_waits(tmp_path: Path, command: str) -> None:
    async def main() -> None:
        async with running(tmp_path) as rig:
            monitor = await rig.monitor()
            await rig.start_nbd(monitor)
            disk = rig.add_disk("disk", OLD)
            await rig.export(monitor, "disk")
            client = await rig.client("disk")
            await monitor.get("stop")
            for _ in range(3):
                client.send(Command.WRITE, 0, payload=b"new!" * 128)
            await monitor.get("query-status")
            if command == "quit":
                await rig.daemon.shutdown()
            else:
                await monitor.get(command)
            for _ in range(3):
                assert (await client.reply())[-1].error == NbdError.ESHUTDOWN
            assert await client.is_closed_by_server()
            assert disk.content == OLD

    asyncio.run(main())


def test_a_stop_that_waits_for_a_stuck_disk_is_no_obstacle_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "STOP_GRACE_S", 0.0)

    async def main() -> None:
        async with running(tmp_path) as rig:
            monitor = await rig.monitor()
            await rig.start_nbd(monitor)
            disk = rig.add_disk("disk", OLD)
            await rig.export(monitor, "disk")
            client = await rig.client("disk")
            disk.hold(Op.READ)
            client.send(Command.READ, 0, 512)
            monitor.send("stop")
            await monitor.event("STOP")
            await rig.daemon.shutdown()
            assert await client.is_closed_by_server()
            assert await monitor.reply() == {"return": {}}

    asyncio.run(main())


def test_a_new_server_can_be_started_while_stopped(tmp_path: Path) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (rig, monitor):
            await monitor.get("stop")
            await monitor.get("nbd-server-stop")
            await rig.start_nbd(monitor)
            await rig.export(monitor, "disk")
            client = await rig.client("disk")
            client.send(Command.READ, 0, 512)
            await monitor.get("cont")
            assert not (await client.reply())[-1].error

    asyncio.run(main())


# Errors that stop


async def stopping(rig: Rig, monitor: Monitor, **options: Any) -> MemoryNode:
    disk = rig.add_disk("disk", OLD)
    await rig.start_nbd(monitor)
    await rig.export(monitor, "disk", id="e", **options)
    return disk


async def io_status(monitor: Monitor) -> object:
    (device,) = await monitor.get("query-block")
    return device.get("io-status")


@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [(28, "nospace", "No space left on device"), (5, "failed", "Input/output error")],
)
def test_an_error_stops_all_clients_and_is_over_when_somebody_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: int, status: str, reason: str
) -> None:
    async def main() -> None:
        async with running(tmp_path) as rig:
            monitor = await rig.monitor()
            disk = await stopping(rig, monitor, werror="stop")
            rig.add_disk("other", OLD)
            await rig.export(monitor, "other")
            client, bystander = await rig.client("disk"), await rig.client("other")
            disk.fail(Op.WRITE, fault)
            client.send(Command.WRITE, 0, payload=b"new!" * 128)
            assert await monitor.event("BLOCK_IO_ERROR") == {
                "qom-path": "e",
                "device": "",
                "node-name": "disk",
                "operation": "write",
                "action": "stop",
                "nospace": fault == 28,
                "reason": reason,
            }
            await monitor.event("STOP")
            assert await monitor.get("query-status") == PAUSED | {"status": "io-error"}
            shown = await monitor.get("query-block")
            assert [device.get("io-status") for device in shown] == [status, None]
            bystander.send(Command.READ, 0, 512)
            await monitor.get("stop")  # makes stable what was written, and is no other reason
            assert await monitor.get("query-status") == PAUSED | {"status": "io-error"}
            assert not disk_of(rig, "other").requests_of(Op.READ)
            await monitor.get("cont")
            assert not (await client.reply())[-1].error
            assert not (await bystander.reply())[-1].error
            assert disk.content[:512] == b"new!" * 128
            assert (await monitor.get("query-block"))[0]["io-status"] == "ok"
            assert await monitor.get("query-status") == RUNNING

    asyncio.run(main())
    assert caplog.text.count("clients are stopped because of an I/O error") == 1


def test_without_options_errors_are_reported_and_told_to_the_client_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as rig:
            monitor = await rig.monitor()
            disk = await stopping(rig, monitor)
            client = await rig.client("disk")
            disk.fail(Op.WRITE)
            assert await client.error(Command.WRITE, payload=bytes(512)) == NbdError.EIO
            assert await io_status(monitor) is None
            assert not monitor.events

    asyncio.run(main())


def test_a_failing_export_that_is_removed_stops_nobody_any_more(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as rig:
            monitor = await rig.monitor()
            disk = await stopping(rig, monitor, werror="stop")
            client = await rig.client("disk")
            async with disk.hold(Op.WRITE) as gate:
                client.send(Command.WRITE, 0, payload=bytes(512))
                await gate.reached()
                disk.fail(Op.WRITE)
                await monitor.get("block-export-del", id="e", mode="hard")
            await gone(monitor, "e")
            assert await monitor.get("query-status") == RUNNING

    asyncio.run(main())


@pytest.mark.parametrize("how", ["client", "export", "server"])
def test_who_waits_for_a_failed_request_may_go(tmp_path: Path, how: str) -> None:
    async def main() -> None:
        async with running(tmp_path) as rig:
            monitor = await rig.monitor()
            disk = await stopping(rig, monitor, werror="enospc")
            client = await rig.client("disk")
            disk.fail(Op.WRITE, 28, times=None)
            client.send(Command.WRITE, 0, payload=bytes(512))
            await monitor.event("STOP")
            if how == "client":
                client.writer.transport.abort()
                await until_no_client(rig)
                await monitor.get("cont")
                assert await io_status(monitor) == "ok"
            elif how == "export":
                await monitor.get("block-export-del", id="e", mode="hard")
                await gone(monitor, "e")
            else:
                await monitor.get("nbd-server-stop")
                assert (await client.reply())[-1].error == NbdError.ESHUTDOWN
            assert len(disk.requests_of(Op.WRITE)) == 1

    asyncio.run(main())


@pytest.mark.parametrize("word", ["ignore", "enospc"])
def test_what_cannot_be_done_about_reads_is_refused(tmp_path: Path, word: str) -> None:
    async def main() -> None:
        async with running(tmp_path) as rig:
            monitor = await rig.monitor()
            rig.add_disk("disk")
            await rig.start_nbd(monitor)
            arguments = {"type": "nbd", "id": "e", "node_name": "disk", "rerror": word}
            said = await monitor.refusal("block-export-add", **arguments)
            assert said == f"'{word}' invalid read error action"
            assert await monitor.get("query-block-exports") == []

    asyncio.run(main())
