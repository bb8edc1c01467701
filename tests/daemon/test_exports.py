# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nbdjobs.daemon import exports
from nbdjobs.protocol.constants import Command
from tests.daemon.rig import Monitor, Rig, running
from tests.jobs.rig import turns


def with_daemon(scenario: Callable[[Rig, Monitor], Awaitable[None]], directory: Path) -> None:
    async def run() -> None:
        async with running(directory) as rig:
            rig.add_disk("disk")
            await scenario(rig, await rig.monitor())

    asyncio.run(run())


def test_an_export_needs_a_server(tmp_path: Path) -> None:
    async def scenario(rig: Rig, monitor: Monitor) -> None:
        refusal = await monitor.refusal("block-export-add", type="nbd", id="e", node_name="disk")
        assert refusal == "NBD server not running"
        assert await monitor.refusal("nbd-server-stop") == "NBD server not running"

    with_daemon(scenario, tmp_path)


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"id": "export-disk"}, "Block export id 'export-disk' is already in use"),
        ({"id": "1"}, "Invalid block export id"),
        ({"id": "e"}, "NBD server already has export named 'disk'"),
        ({"id": "e", "node_name": "no"}, "Cannot find device='' nor node-name='no'"),
        ({"id": "e", "name": "n", "iothread": "i"}, 'iothread "i" not found'),
        ({"id": "e", "name": "n", "bitmaps": ["b"]}, "Bitmap 'b' is not found"),
        ({"id": "e", "name": "n" * 4097}, f"export name '{'n' * 4097}' too long"),
        ({"id": "e", "name": "n", "bitmap": "b"}, "Parameter 'bitmap' is unexpected"),
        ({"id": "e", "type": "fuse"}, "Parameter 'type' does not accept value 'fuse'"),
    ],
)
def test_a_refused_export_leaves_nothing_behind(
    tmp_path: Path, options: dict[str, object], refusal: str
) -> None:
    async def scenario(rig: Rig, monitor: Monitor) -> None:
        await rig.start_nbd(monitor)
        await rig.export(monitor, "disk")
        before = await monitor.get("query-block-exports")
        arguments: dict[str, object] = {"type": "nbd", "node_name": "disk"}
        assert await monitor.refusal("block-export-add", **(arguments | options)) == refusal
        assert await monitor.get("query-block-exports") == before
        assert len(rig.daemon.graph.nodes["disk"].parents) == 1

    with_daemon(scenario, tmp_path)


def test_a_safe_removal_is_refused_while_a_client_is_there(tmp_path: Path) -> None:
    async def scenario(rig: Rig, monitor: Monitor) -> None:
        await rig.start_nbd(monitor)
        await rig.export(monitor, "disk")
        client = await rig.client("disk")
        refusal = await monitor.refusal("block-export-del", id="export-disk")
        assert refusal == "export 'export-disk' still in use"
        assert await monitor.refusal("blockdev-del", node_name="disk") == "Node disk is in use"
        await client.close()
        while "return" not in await monitor.ask("block-export-del", id="export-disk"):
            pass  # until the server has noticed that the client left
        await monitor.event("BLOCK_EXPORT_DELETED", id="export-disk")
        await monitor.get("blockdev-del", node_name="disk")

    with_daemon(scenario, tmp_path)


def test_a_hard_removal_cuts_the_client_off_and_finishes_its_request(tmp_path: Path) -> None:
    async def scenario(rig: Rig, monitor: Monitor) -> None:
        disk = rig.add_disk("slow")
        await rig.start_nbd(monitor)
        await rig.export(monitor, "slow")
        client = await rig.client("slow")
        async with disk.hold() as gate:
            client.send(1, 0, payload=b"w" * 512)
            await gate.reached()
            await monitor.get("block-export-del", id="export-slow", mode="hard")
            (shown,) = await monitor.get("query-block-exports")
            assert shown["shutting-down"]
            again = await monitor.refusal("block-export-del", id="export-slow", mode="hard")
            assert again == "Export 'export-slow' is already shutting down"
        await monitor.event("BLOCK_EXPORT_DELETED", id="export-slow")
        assert await client.is_closed_by_server()
        assert disk.content[:512] == b"w" * 512

    with_daemon(scenario, tmp_path)


def test_connections_are_counted_per_export(tmp_path: Path) -> None:
    async def scenario(rig: Rig, monitor: Monitor) -> None:
        async def counts() -> dict[str, int]:
            exports = await monitor.get("query-block-exports")
            return {export["id"]: export["x-connections"] for export in exports}

        await rig.start_nbd(monitor)
        await rig.export(monitor, "disk")
        await rig.export(monitor, "disk", id="second", name="second", writable=False)
        assert await counts() == {"export-disk": 0, "second": 0}
        await rig.client("disk")
        await rig.client("disk")
        assert await counts() == {"export-disk": 2, "second": 0}

    with_daemon(scenario, tmp_path)


def test_stopping_the_server_ends_all_exports(tmp_path: Path) -> None:
    async def scenario(rig: Rig, monitor: Monitor) -> None:
        await rig.start_nbd(monitor)
        await rig.export(monitor, "disk")
        await rig.export(monitor, "disk", id="second", name="second", writable=False)
        client = await rig.client("second")
        await monitor.get("nbd-server-stop")
        assert await monitor.get("query-block-exports") == []
        assert await client.is_closed_by_server()
        deleted = [each["data"]["id"] for each in monitor.events]
        assert sorted(deleted) == ["export-disk", "second"]
        await rig.start_nbd(monitor)
        await rig.export(monitor, "disk")

    with_daemon(scenario, tmp_path)


def test_stopping_the_server_answers_requests_in_flight(tmp_path: Path) -> None:
    async def scenario(rig: Rig, monitor: Monitor) -> None:
        disk = rig.add_disk("slow")
        await rig.start_nbd(monitor)
        await rig.export(monitor, "slow")
        client = await rig.client("slow")
        async with disk.hold() as gate:
            cookie = client.send(Command.WRITE, 0, payload=b"w" * 512)
            await gate.reached()
            monitor.send("nbd-server-stop")
            while rig.daemon.exports.is_server_running:
                await turns(1)
        (reply,) = await client.reply()
        assert (reply.cookie, reply.error) == (cookie, 0)
        assert await client.is_closed_by_server()
        assert await monitor.reply() == {"return": {}}
        assert disk.content[:512] == b"w" * 512

    with_daemon(scenario, tmp_path)


def test_stopping_the_server_does_not_wait_for_clients_that_read_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(rig: Rig, monitor: Monitor) -> None:
        await rig.start_nbd(monitor)
        await rig.export(monitor, "disk")
        client = await rig.client("disk")
        for _ in range(64):  # its reader stops at some KiB, as nobody takes anything from it
            client.send(Command.READ, 0, 1 << 20)
        monkeypatch.setattr(exports, "STOP_GRACE_S", 0)
        await monitor.get("nbd-server-stop")
        assert await monitor.get("query-block-exports") == []

    with_daemon(scenario, tmp_path)


def test_a_writethrough_export_makes_every_write_stable(tmp_path: Path) -> None:
    async def scenario(rig: Rig, monitor: Monitor) -> None:
        disk = rig.add_disk("safe")
        await rig.start_nbd(monitor)
        await rig.export(monitor, "safe", writethrough=True)
        client = await rig.client("safe")
        await client.write(0, b"w" * 512)
        assert disk.stable[:512] == b"w" * 512

    with_daemon(scenario, tmp_path)


def test_an_export_shows_the_filter_of_a_backup_and_later_the_disk_again(tmp_path: Path) -> None:
    async def scenario(rig: Rig, monitor: Monitor) -> None:
        rig.add_disk("target")
        await rig.start_nbd(monitor)
        await rig.export(monitor, "disk")
        await monitor.get(
            "blockdev-backup",
            job_id="job",
            device="disk",
            target="target",
            sync="none",
            filter_node_name="filter",
        )
        (export,) = await monitor.get("query-block-exports")
        assert export["node-name"] == "filter"
        await monitor.get("block-job-cancel", device="job")
        await monitor.event("JOB_STATUS_CHANGE", id="job", status="null")
        (export,) = await monitor.get("query-block-exports")
        assert export["node-name"] == "disk"

    with_daemon(scenario, tmp_path)
