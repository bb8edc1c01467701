# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""block_set_io_throttle: what is refused, what query-block shows, who shares, and what waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdjobs.nodes.device import Device
from nbdjobs.nodes.leaky_bucket import MAX_VALUE, ThrottleConfig
from nbdjobs.nodes.permissions import ALL
from nbdjobs.nodes.throttle_group import ThrottleGroup
from nbdjobs.protocol.constants import Command
from tests.daemon.rig import Monitor, Rig, running
from tests.jobs.rig import ManualClock
from tests.nodes.faults import MemoryNode, Op

SET = "block_set_io_throttle"
NONE = {"bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0}
TOTALS = "bps/iops/max total values and read/write values cannot be used at the same time"


@asynccontextmanager
async def exporting(directory: Path, *names: str) -> AsyncIterator[tuple[Rig, Monitor]]:
    async with running(directory) as rig:
        monitor = await rig.monitor()
        await rig.start_nbd(monitor)
        for name in names or ("disk",):
            rig.add_disk(name)
            await rig.export(monitor, name, id=name)
        yield rig, monitor


async def limit(monitor: Monitor, export: str, **limits: object) -> None:
    await monitor.get(SET, id=export, **(NONE | limits))


async def shown(monitor: Monitor, export: str = "disk") -> dict[str, Any]:
    """The limits that query-block shows, without those that are 0."""
    devices = {device["qdev"]: device for device in await monitor.get("query-block")}
    inserted = devices[export]["inserted"]
    limits = {name: inserted[name] for name in inserted if name.startswith(("bps", "iops"))}
    group = {"group": inserted["group"]} if "group" in inserted else {}
    return {name: value for name, value in limits.items() if value} | group


def manual_group(rig: Rig, name: str = "group") -> ManualClock:
    """Make a group whose time the test moves."""
    clock = ManualClock()
    rig.daemon.graph.throttle_groups[name] = ThrottleGroup(ThrottleConfig(), clock)
    return clock


# What is refused


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"bps": 1, "bps_rd": 1}, TOTALS),
        ({"iops": 1, "iops_wr": 1}, TOTALS),
        ({"bps": 2, "bps_max": 2, "bps_wr_max": 2}, TOTALS),
        ({"bps": -1}, f"bps/iops/max values must be within [0, {MAX_VALUE}]"),
        ({"iops_wr": MAX_VALUE + 1}, f"bps/iops/max values must be within [0, {MAX_VALUE}]"),
        ({"iops": 5, "iops_max": 4}, "bps_max/iops_max cannot be lower than bps/iops"),
        ({"bps_max": 4}, "bps_max/iops_max require corresponding bps/iops values"),
        ({"bps": 4, "bps_max_length": 2}, "burst length set without burst rate"),
        ({"bps": 4, "bps_max_length": -1}, "burst length set without burst rate"),
        ({"bps": 4, "bps_max": 4, "bps_max_length": 0}, "the burst length cannot be 0"),
        ({"bps": 4, "iops_size": 512}, "iops size requires an iops value to be set"),
    ],
)
def test_limits_that_do_not_go_together_are_refused_and_change_nothing(
    tmp_path: Path, limits: dict[str, object], said: str
) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (_, monitor):
            await limit(monitor, "disk", bps=1000)
            before = await shown(monitor)
            assert await monitor.refusal(SET, id="disk", **(NONE | limits)) == said
            assert await shown(monitor) == before

    asyncio.run(main())


def test_exactly_one_device_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (_, monitor):
            both = "Need exactly one of 'device' and 'id'"
            assert await monitor.refusal(SET, **NONE) == both
            assert await monitor.refusal(SET, id="disk", device="disk", **NONE) == both
            for named in ({"id": "nobody"}, {"device": "disk"}):
                (name,) = named.values()
                reply = await monitor.ask(SET, **named, **NONE)
                assert reply["error"] == {
                    "class": "DeviceNotFound",
                    "desc": f"Device '{name}' not found",
                }

    asyncio.run(main())


def test_rates_have_to_be_given(tmp_path: Path) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (_, monitor):
            assert await monitor.refusal(SET, id="disk") == "Parameter 'bps' is missing"

    asyncio.run(main())


# What is shown


def test_every_limit_is_shown_by_its_name(tmp_path: Path) -> None:
    limits = {
        "bps_rd": 1000,
        "bps_wr": 2000,
        "iops": 30,
        "bps_rd_max": 1500,
        "bps_wr_max": 2500,
        "iops_max": 45,
        "bps_rd_max_length": 1,
        "bps_wr_max_length": 7,
        "iops_max_length": 60,
        "iops_size": 4096,
    }

    async def main() -> None:
        async with exporting(tmp_path) as (_, monitor):
            assert await shown(monitor) == {}
            await limit(monitor, "disk", **limits)
            assert await shown(monitor) == limits | {"group": "disk"}
            (device,) = await monitor.get("query-block")
            assert (device["device"], device["locked"], device["removable"]) == ("", False, False)
            assert device["inserted"]["node-name"] == "disk"
            (node,) = await monitor.get("query-named-block-nodes")
            assert node["bps_rd"] == 0
            assert "group" not in node
            await limit(monitor, "disk")
            assert await shown(monitor) == {}

    asyncio.run(main())


def test_a_named_device_is_limited_as_well(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as rig:
            monitor = await rig.monitor()
            rig.daemon.devices["d"] = Device(
                rig.daemon.graph, rig.add_disk("disk"), name="d", shared=ALL
            )
            await monitor.get(SET, device="d", **(NONE | {"iops": 5}))
            (device,) = await monitor.get("query-block")
            assert (device["device"], device["inserted"]["group"]) == ("d", "d")

    asyncio.run(main())


# Groups


def test_members_of_a_group_have_its_limits_and_it_goes_with_the_last(tmp_path: Path) -> None:
    async def main() -> None:
        async with exporting(tmp_path, "a", "b") as (rig, monitor):
            groups = rig.daemon.graph.throttle_groups
            await limit(monitor, "a", bps=1000, group="both")
            await limit(monitor, "b", bps=2000, group="both")
            assert await shown(monitor, "a") == {"bps": 2000, "group": "both"}
            await limit(monitor, "a", iops=7)  # without a name it stays where it is
            assert await shown(monitor, "b") == {"iops": 7, "group": "both"}
            await limit(monitor, "a", iops=7, group="both")
            assert set(groups) == {"both"}
            await limit(monitor, "a")
            await monitor.get("block-export-del", id="b")
            await monitor.event("BLOCK_EXPORT_DELETED")
            assert not groups

    asyncio.run(main())


def test_a_group_may_be_an_object_and_one_without_keeps_its_name(tmp_path: Path) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (_, monitor):
            await monitor.get(
                "object-add", qom_type="throttle-group", id="g", limits={"iops-total": 3}
            )
            await limit(monitor, "disk", bps=1000, group="g")
            limits = await monitor.get("qom-get", path="/objects/g", property="limits")
            assert (limits["bps-total"], limits["iops-total"]) == (1000, 0)
            assert "in use" in await monitor.refusal("object-del", id="g")
            await limit(monitor, "disk", bps=1000, group="other")
            await monitor.get("object-del", id="g")
            said = await monitor.refusal("object-add", qom_type="throttle-group", id="other")
            assert said == "A group with this name already exists"
            secret = {"qom_type": "secret", "id": "other", "data": "x"}
            await monitor.get("object-add", **secret)
            await monitor.get("object-del", id="other")
            assert await shown(monitor) == {"bps": 1000, "group": "other"}

    asyncio.run(main())


def test_a_throttle_node_shares_the_limits_of_a_device(tmp_path: Path) -> None:
    async def main() -> None:
        async with exporting(tmp_path, "disk", "below") as (rig, monitor):
            await limit(monitor, "disk", bps=1000, group="g")
            await monitor.get(
                "blockdev-add", driver="throttle", node_name="t", throttle_group="g", file="below"
            )
            await limit(monitor, "disk")
            assert set(rig.daemon.graph.throttle_groups) == {"g"}
            await monitor.get("blockdev-del", node_name="t")
            assert not rig.daemon.graph.throttle_groups

    asyncio.run(main())


# What waits


def test_clients_keep_to_the_limits_and_go_on_when_they_change(tmp_path: Path) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (rig, monitor):
            clock = manual_group(rig)
            await limit(monitor, "disk", iops=10, group="group")
            client = await rig.client("disk")
            for _ in range(50):
                client.send(Command.WRITE, 0, payload=bytes(512))
            disk = rig.daemon.graph.find("disk")
            assert isinstance(disk, MemoryNode)
            await monitor.get("query-status")
            done = 2  # what a tenth of a second allows, and the request that exceeds it
            assert disk.counts[Op.WRITE] == done
            for _ in range(20):
                clock.advance(0.1)
                done += 1
                await monitor.get("query-status")
                assert disk.counts[Op.WRITE] == done
            await limit(monitor, "disk", iops=1000)
            clock.advance(0.03)
            for _ in range(50):
                assert not (await client.reply())[-1].error

    asyncio.run(main())


@pytest.mark.parametrize("how", ["unlimited", "export", "server", "quit"])
def test_nobody_waits_for_a_limit_that_is_over(tmp_path: Path, how: str) -> None:
    async def main() -> None:
        async with running(tmp_path) as rig:
            monitor = await rig.monitor()
            await rig.start_nbd(monitor)
            disk = rig.add_disk("disk")
            await rig.export(monitor, "disk", id="disk")
            manual_group(rig)
            await limit(monitor, "disk", iops=1, group="group")
            client = await rig.client("disk")
            for _ in range(50):
                client.send(Command.WRITE, 0, payload=b"x" * 512)
            await monitor.get("query-status")
            assert disk.counts[Op.WRITE] == 1
            if how == "unlimited":
                await limit(monitor, "disk")
            elif how == "export":
                assert "in use" in await monitor.refusal("block-export-del", id="disk")
                await monitor.get("block-export-del", id="disk", mode="hard")
                await monitor.event("BLOCK_EXPORT_DELETED")
                assert disk.counts[Op.WRITE] == 50
                return
            elif how == "server":
                await monitor.get("nbd-server-stop")
            else:
                await rig.daemon.shutdown()
            for _ in range(50):
                assert not (await client.reply())[-1].error

    asyncio.run(main())


def test_a_backup_begins_while_clients_wait_for_their_turn(tmp_path: Path) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (rig, monitor):
            target = rig.add_disk("target")
            manual_group(rig)
            await limit(monitor, "disk", iops=1, group="group")
            client = await rig.client("disk")
            for _ in range(10):
                client.send(Command.WRITE, 0, payload=b"x" * 512)
            await monitor.get(
                "blockdev-backup", job_id="j", device="disk", target="target", sync="full"
            )
            await monitor.event("BLOCK_JOB_COMPLETED")
            assert target.content[:512] == b"x" * 512
            await limit(monitor, "disk")
            for _ in range(10):
                assert not (await client.reply())[-1].error

    asyncio.run(main())


def test_stopping_does_not_wait_for_limits(tmp_path: Path) -> None:
    async def main() -> None:
        async with exporting(tmp_path) as (rig, monitor):
            clock = manual_group(rig)
            await limit(monitor, "disk", iops=1, group="group")
            client = await rig.client("disk")
            for _ in range(3):
                client.send(Command.READ, 0, 512)
            await monitor.get("stop")
            await monitor.get("cont")
            for _ in range(3):
                clock.advance(1)
                assert not (await client.reply())[-1].error

    asyncio.run(main())
