# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A disk that hangs holds up its own requests, and nothing else."""

from __future__ import annotations

import asyncio
from pathlib import Path

from nbdjobs.protocol.constants import Command
from tests.daemon.rig import running
from tests.nodes.faults import Op

CLUSTER = 64 * 1024


def test_qmp_and_other_exports_go_on_while_a_disk_hangs(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as rig:
            stuck, healthy = rig.add_disk("stuck"), rig.add_disk("healthy")
            monitor = await rig.monitor()
            await rig.start_nbd(monitor)
            await rig.export(monitor, "stuck")
            await rig.export(monitor, "healthy")
            victim, bystander = await rig.client("stuck"), await rig.client("healthy")
            async with stuck.hold() as gate:
                cookie = victim.send(Command.READ, 0, 4096)
                await gate.reached()
                await bystander.write(0, b"x" * 4096, flags=1)
                assert await bystander.read(0, 4096) == b"x" * 4096
                assert len(await monitor.get("query-block-exports")) == 2
                assert len(await monitor.get("query-named-block-nodes")) == 2
                newcomer = rig.add_disk("newcomer")
                await rig.export(monitor, "newcomer")
                third = await rig.client("newcomer")
                await third.write(512, b"y" * 512)
                assert newcomer.content[512:1024] == b"y" * 512
                assert stuck.in_flight == 1
            (reply,) = await victim.reply()
            assert reply.cookie == cookie
            assert healthy.content[:4096] == b"x" * 4096

    asyncio.run(scenario())


def test_a_stuck_target_holds_up_only_writes_that_need_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as rig:
            source, target = rig.add_disk("source", b"\x11" * 4 * CLUSTER), rig.add_disk("target")
            target.content[:] = bytes(4 * CLUSTER)
            del target.content[4 * CLUSTER :]
            other = rig.add_disk("other")
            monitor, second = await rig.monitor(), await rig.monitor()
            await rig.start_nbd(monitor)
            await rig.export(monitor, "source")
            await rig.export(monitor, "other")
            client, reader = await rig.client("source"), await rig.client("source")
            bystander = await rig.client("other")
            async with target.hold(Op.WRITE) as gate:
                await monitor.get(
                    "blockdev-backup", job_id="job", device="source", target="target", sync="full"
                )
                await gate.reached()
                client.send(Command.WRITE, 3 * CLUSTER, payload=b"\x22" * 512)
                assert await reader.read(3 * CLUSTER, 512) == b"\x11" * 512
                await bystander.write(0, b"z" * 512)
                (job,) = await second.get("query-jobs")
                assert job["status"] == "running"
                await second.get("block-job-set-speed", device="job", speed=1 << 30)
                assert source.content[3 * CLUSTER] == 0x11
            await monitor.event("BLOCK_JOB_COMPLETED", device="job")
            (reply,) = await client.reply()
            assert not reply.error
            assert source.content[3 * CLUSTER : 3 * CLUSTER + 512] == b"\x22" * 512
            assert target.content == b"\x11" * 4 * CLUSTER
            assert other.content[:512] == b"z" * 512

    asyncio.run(scenario())


def test_cancelling_a_backup_to_a_stuck_target_lets_the_guest_go_on_at_once(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as rig:
            source = rig.add_disk("source", b"\x11" * 4 * CLUSTER)
            target = rig.add_disk("target", 4 * CLUSTER)
            monitor = await rig.monitor()
            await rig.start_nbd(monitor)
            await rig.export(monitor, "source")
            client = await rig.client("source")
            async with target.hold(Op.WRITE) as gate:
                await monitor.get(
                    "blockdev-backup", job_id="job", device="source", target="target", sync="none"
                )
                client.send(Command.WRITE, 0, payload=b"\x22" * 512)
                await gate.reached()
                await monitor.get("block-job-cancel", device="job")
                (reply,) = await client.reply()
                assert not reply.error
                assert source.content[:512] == b"\x22" * 512
                assert await monitor.get("query-block-exports")
            await monitor.event("BLOCK_JOB_CANCELLED", device="job")
            assert [edge.parent for edge in source.parents] == [
                export.device for export in rig.daemon.exports
            ]

    asyncio.run(scenario())
