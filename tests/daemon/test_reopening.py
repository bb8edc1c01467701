# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""blockdev-reopen beside jobs: what they have put into the graph stays there."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.errors import CommandError
from nbdjobs.qmp.commands import REGISTRY

SIZE = 1 << 20
NULL = {"driver": "null-co", "size": SIZE, "read-zeroes": True}


async def ask(daemon: Daemon, command: str, **arguments: Any) -> Any:
    named = {name.replace("_", "-"): value for name, value in arguments.items()}
    return await REGISTRY.find(command).execute(daemon, named)


async def back_up(daemon: Daemon, device: str) -> None:
    """Begin a backup that lasts."""
    await ask(daemon, "blockdev-add", **NULL, node_name="target")
    await ask(
        daemon,
        "blockdev-backup",
        job_id="j",
        device=device,
        target="target",
        sync="none",
        filter_node_name="filter",
    )


@pytest.mark.parametrize("is_inline", [False, True])
def test_a_backup_goes_on_below_a_node_that_is_reopened(is_inline: bool) -> None:
    async def go() -> None:
        daemon = Daemon()
        disk = {**NULL, "node-name": "disk"}
        if not is_inline:
            await ask(daemon, "blockdev-add", **disk)
        top = {"driver": "raw", "node-name": "top", "file": disk if is_inline else "disk"}
        await ask(daemon, "blockdev-add", **top)
        await back_up(daemon, "disk")
        edge = daemon.graph.nodes["top"].edges["file"]
        assert edge.node.name == "filter"
        options = {**top, "detect-zeroes": "on", "read-only": True}
        await ask(daemon, "blockdev-reopen", options=[options])
        assert edge.node.name == "filter"
        assert daemon.graph.nodes["top"].is_read_only
        assert daemon.graph.nodes["disk"].is_read_only == is_inline
        await ask(daemon, "blockdev-reopen", options=[top])
        await daemon.shutdown()

    asyncio.run(go())


def test_a_node_does_not_leave_a_running_backup_as_a_writer(tmp_path: Path) -> None:
    async def go() -> None:
        daemon = Daemon()
        await ask(daemon, "blockdev-add", **NULL, node_name="disk")
        await ask(daemon, "blockdev-add", driver="raw", node_name="top", file="disk")
        await back_up(daemon, "top")
        server = {"type": "unix", "data": {"path": str(tmp_path / "nbd.sock")}}
        await ask(daemon, "nbd-server-start", addr=server)
        await ask(daemon, "block-export-add", type="nbd", id="e", node_name="filter", writable=True)
        await ask(daemon, "blockdev-add", **NULL, node_name="other")
        options = {"driver": "raw", "node-name": "top", "file": "other", "size": SIZE // 2}
        with pytest.raises(CommandError, match="its size would change"):
            await ask(daemon, "blockdev-reopen", options=[options])
        with pytest.raises(CommandError, match="does not support reopening"):
            await ask(
                daemon,
                "blockdev-reopen",
                options=[
                    {
                        "driver": "copy-before-write",
                        "node-name": "filter",
                        "file": "disk",
                        "target": "target",
                    }
                ],
            )
        await daemon.shutdown()

    asyncio.run(go())
