# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""blockdev-set-active as QMP and NBD clients see it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from nbdjobs.protocol.constants import Command, NbdError
from tests.daemon.rig import Monitor, running

EXPORT = {"type": "nbd", "id": "e", "node-name": "disk", "writable": True}


async def is_active(monitor: Monitor) -> bool:
    nodes: list[dict[str, Any]] = await monitor.get("query-named-block-nodes", flat=True)
    return bool(nodes[0]["active"])


async def refusal(monitor: Monitor, command: str, **arguments: object) -> str:
    reply = await monitor.ask(command, **arguments)
    return str(reply["error"]["desc"])


async def set_active(monitor: Monitor, active: bool, name: str | None = None) -> None:
    named = {} if name is None else {"node_name": name}
    await monitor.get("blockdev-set-active", active=active, **named)


def test_an_export_that_may_be_inactive_serves_reads_only_meanwhile(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(tmp_path) as rig:
            rig.add_disk("disk")
            monitor = await rig.monitor()
            await rig.start_nbd(monitor)
            await monitor.get("block-export-add", **EXPORT, allow_inactive=True)
            client = await rig.client("disk")
            await client.write(0, b"x" * 512)
            await set_active(monitor, False, "disk")
            assert not await is_active(monitor)
            assert await client.read(0, 512) == b"x" * 512
            chunks = await client.ask(Command.WRITE, 0, payload=b"y" * 512)
            assert (chunks[-1].error, chunks[-1].text) == (
                NbdError.EPERM,
                "export is inactive",
            )
            assert await client.error(Command.FLUSH) == NbdError.EPERM
            await set_active(monitor, True)
            await client.write(0, b"z" * 512)
            assert await client.read(0, 512) == b"z" * 512

    asyncio.run(go())


def test_an_export_activates_its_disk_and_keeps_it_active(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(tmp_path) as rig:
            rig.add_disk("disk")
            monitor = await rig.monitor()
            await rig.start_nbd(monitor)
            await set_active(monitor, False)
            assert not await is_active(monitor)
            await monitor.get("block-export-add", **EXPORT)
            assert await is_active(monitor)
            assert await refusal(
                monitor, "blockdev-set-active", active=False, node_name="disk"
            ) == ("Failed to inactivate node: Operation not permitted")
            assert await refusal(monitor, "blockdev-set-active", active=False) == (
                "Failed to inactivate all nodes: Operation not permitted"
            )
            assert await is_active(monitor)

    asyncio.run(go())


def test_what_needs_an_active_disk_is_refused(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(tmp_path) as rig:
            rig.add_disk("disk")
            rig.add_disk("target")
            monitor = await rig.monitor()
            await set_active(monitor, False, "disk")
            assert await refusal(monitor, "blockdev-set-active", active=False, node_name="zz") == (
                "Failed to find node with node-name='zz'"
            )
            assert await refusal(monitor, "block_resize", node_name="disk", size=512) == (
                "Permission 'resize' unavailable on inactive node"
            )
            copy = {"job_id": "j", "device": "disk", "target": "target", "sync": "full"}
            sentence = await refusal(monitor, "blockdev-backup", **copy)
            assert "Inactive 'disk' can't be a file child of active '#block" in sentence
            await set_active(monitor, True, "disk")
            await set_active(monitor, False, "target")
            sentence = await refusal(monitor, "blockdev-backup", **copy)
            assert "Inactive 'target' can't be a target child of active '#block" in sentence
            assert await monitor.get("query-jobs") == []

    asyncio.run(go())
