# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""block-latency-histogram-set and what query-blockstats then shows of exports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdjobs.protocol.constants import Command
from tests.daemon.rig import Monitor, Rig, running

SET = "block-latency-histogram-set"
AGES_NS = 1 << 60
CONTENT = b"x" * 4096


@asynccontextmanager
async def exporting(directory: Path) -> AsyncIterator[tuple[Rig, Monitor]]:
    async with running(directory) as rig:
        monitor = await rig.monitor()
        rig.add_disk("disk", CONTENT)
        await rig.start_nbd(monitor)
        await rig.export(monitor, "disk", id="e")
        yield rig, monitor


async def stats(monitor: Monitor) -> dict[str, Any]:
    (device,) = await monitor.get("query-blockstats")
    assert (device["device"], device["qdev"], device["node-name"]) == ("", "e", "disk")
    found: dict[str, Any] = device["stats"]
    return found


async def boundaries(monitor: Monitor) -> dict[str, list[int]]:
    shown = await stats(monitor)
    return {
        name.removesuffix("_latency_histogram"): value["boundaries"]
        for name, value in shown.items()
        if name.endswith("_latency_histogram")
    }


def test_requests_of_clients_are_counted_from_then_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (rig, monitor):
            client = await rig.client("disk")
            assert await client.read(0, 512) == CONTENT[:512]
            await monitor.get(SET, id="e", boundaries=[AGES_NS])
            assert await client.read(0, 512) == CONTENT[:512]
            await client.write(0, CONTENT[:512])
            assert await client.error(Command.FLUSH) == 0
            shown = await stats(monitor)
            assert shown["rd_operations"] == 2
            assert shown["rd_latency_histogram"] == {"boundaries": [AGES_NS], "bins": [1, 0]}
            assert shown["wr_latency_histogram"]["bins"] == [1, 0]
            assert shown["flush_latency_histogram"]["bins"] == [1, 0]
            assert shown["idle_time_ns"] >= 0
            assert shown["wr_highest_offset"] == 512

    asyncio.run(main())


def test_holes_count_as_reads(tmp_path: Path) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (rig, monitor):
            rig.add_disk("sparse")
            await rig.export(monitor, "sparse", id="s")
            await monitor.get(SET, id="s", boundaries=[AGES_NS])
            client = await rig.client("sparse")
            assert await client.read(0, 8192) == bytes(8192)
            devices = await monitor.get("query-blockstats")
            (shown,) = (each["stats"] for each in devices if each["qdev"] == "s")
            assert (shown["rd_operations"], shown["rd_bytes"]) == (1, 8192)
            assert shown["rd_latency_histogram"]["bins"] == [1, 0]

    asyncio.run(main())


def test_kinds_can_have_boundaries_of_their_own_and_keep_them(tmp_path: Path) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (_, monitor):
            await monitor.get(SET, id="e", boundaries=[1, 2], boundaries_write=[3])
            assert await boundaries(monitor) == {"rd": [1, 2], "wr": [3], "flush": [1, 2]}
            await monitor.get(SET, id="e", boundaries_flush=[])
            assert await boundaries(monitor) == {"rd": [1, 2], "wr": [3], "flush": []}

    asyncio.run(main())


def test_setting_again_begins_anew_and_setting_nothing_ends_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (rig, monitor):
            client = await rig.client("disk")
            for _ in range(2):
                await monitor.get(SET, id="e", boundaries_read=[AGES_NS])
                assert await client.read(0, 512) == CONTENT[:512]
                shown = await stats(monitor)
                assert shown["rd_latency_histogram"]["bins"] == [1, 0]
                await monitor.get(SET, id="e")
                assert await boundaries(monitor) == {}

    asyncio.run(main())


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"boundaries": [10, 5]}, "read"),
        ({"boundaries_read": [0]}, "read"),
        ({"boundaries": [5], "boundaries_write": [3, 3]}, "write"),
        ({"boundaries_flush": [2, 1]}, "flush"),
    ],
)
def test_wrong_boundaries_change_nothing(
    wrong: dict[str, list[int]], kind: str, tmp_path: Path
) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (_, monitor):
            await monitor.get(SET, id="e", boundaries=[7])
            words = f"Device 'e' set {kind} boundaries fail"
            assert await monitor.refusal(SET, id="e", **wrong) == words
            assert await boundaries(monitor) == {"rd": [7], "wr": [7], "flush": [7]}

    asyncio.run(main())


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (_, monitor):
            reply = await monitor.ask(SET, id="nope", boundaries=[1])
            assert reply["error"] == {
                "class": "DeviceNotFound",
                "desc": "Device 'nope' not found",
            }

    asyncio.run(main())
