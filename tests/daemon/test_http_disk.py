# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A disk on a web server, as clients of the daemon see it: read over NBD, and copied to a file."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.daemon.rig import MIB, running
from tests.jobs.rig import random_content
from tests.nodes.web_server import Site, web_server

pytest.importorskip("aiohttp", reason="needs the Python package aiohttp")

CONTENT = random_content(2 * MIB)


def test_it_is_read_and_copied_and_its_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    copy = tmp_path / "copy.img"

    async def scenario(site: Site) -> None:
        async with running(tmp_path) as rig:
            monitor = await rig.monitor()
            await monitor.get("object-add", qom_type="secret", id="word", data="secret")
            web = {"driver": "http", "read-only": True, "url": site.url, "username": "ann"}
            await monitor.get(
                "blockdev-add", **web, node_name="web", password_secret="word", readahead=65536
            )
            await rig.start_nbd(monitor)
            await rig.export(monitor, "web", writable=False)
            client = await rig.client("web")
            assert await client.read(12345, 100_000) == CONTENT[12345:112345]
            for offset in range(0, 65536, 4096):
                assert await client.read(offset, 4096) == CONTENT[offset : offset + 4096]
            backup = {"device": "web", "target": str(copy), "sync": "full", "format": "raw"}
            await monitor.get("drive-backup", job_id="j", **backup)
            completed = await monitor.event("BLOCK_JOB_COMPLETED")
            assert "error" not in completed
            await monitor.event("JOB_STATUS_CHANGE", id="j", status="null")
            assert await asyncio.to_thread(copy.read_bytes) == CONTENT

            site.version = {"ETag": '"another"'}
            await monitor.get("drive-backup", job_id="k", **backup)
            completed = await monitor.event("BLOCK_JOB_COMPLETED")
            assert completed["error"] == "Input/output error"

    async def main() -> None:
        async with web_server(CONTENT) as site:
            await scenario(site)

    asyncio.run(main())
