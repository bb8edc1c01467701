# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""User-created objects: made, changed, deleted; and their limits in both forms."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from nbdjobs.daemon import throttle_limits
from nbdjobs.daemon.daemon import Daemon
from nbdjobs.daemon.object_options import ObjectOptions
from nbdjobs.daemon.objects import Objects
from nbdjobs.errors import CommandError
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.nodes.permissions import Permission
from nbdjobs.qapi.visitor import visit

GROUP = "throttle-group"


def options(qom_type: str, name: str = "x", /, **properties: object) -> ObjectOptions:
    named = {key.replace("_", "-"): value for key, value in properties.items()}
    return visit(ObjectOptions, {"qom-type": qom_type, "id": name, **named})


def limits_of(**properties: object) -> dict[str, int]:
    """The limits that differ from none at all."""
    objects = Objects(Graph())
    objects.add(options(GROUP, "none"))
    objects.add(options(GROUP, "some", **properties))
    none = throttle_limits.describe(objects.limits("none"))
    some = throttle_limits.describe(objects.limits("some"))
    return {name: value for name, value in some.items() if value != none[name]}


def test_limits_may_be_given_in_either_form() -> None:
    expected = {"iops-total": 5, "iops-total-max": 50, "iops-total-max-length": 2, "iops-size": 512}
    assert limits_of(limits=expected) == expected
    assert limits_of(**{f"x-{name}": value for name, value in expected.items()}) == expected


def test_limits_in_both_forms_are_put_together() -> None:
    assert limits_of(x_iops_total=5, x_bps_read=7, limits={"iops-total": 6, "bps-write": 8}) == {
        "iops-total": 6,
        "bps-read": 7,
        "bps-write": 8,
    }


@pytest.mark.parametrize(
    ("properties", "refusal"),
    [
        ({"x_iops_total": -1}, "Property values cannot be negative"),
        (
            {"x_iops_read_max_length": 1 << 32},
            "x-iops-read-max-length value must be in therange [0, 4294967295]",
        ),
        (
            {"limits": {"bps-write-max-length": 1 << 32}},
            "bps-write-max-length value must be in the range [0, 4294967295]",
        ),
        (
            {"limits": {"bps-total": 5, "bps-total-max": 5, "bps-total-max-length": -1}},
            "burst length too high for this burst rate",
        ),
        (
            {"x_iops_total": 1, "limits": {"iops-read": 1}},
            "bps/iops/max total values and read/write values cannot be used at the same time",
        ),
    ],
)
def test_bad_limits_are_refused(properties: dict[str, object], refusal: str) -> None:
    objects = Objects(Graph())
    with pytest.raises(CommandError) as caught:
        objects.add(options(GROUP, **properties))
    assert caught.value.description == refusal
    assert not list(objects)


def test_limits_that_change_keep_what_is_not_said() -> None:
    async def go() -> None:
        objects = Objects(Graph())
        objects.add(options(GROUP, "tg", limits={"iops-total": 5, "bps-total": 7}))
        changed = options(GROUP, "other", limits={"iops-total": 0, "iops-read": 6})
        objects.set_limits("tg", changed.limits)  # type: ignore[attr-defined]  # of the branch
        limits = throttle_limits.describe(objects.limits("tg"))
        assert [limits[name] for name in ("iops-total", "iops-read", "bps-total")] == [0, 6, 7]
        with pytest.raises(CommandError):
            objects.set_limits("tg", options(GROUP, limits={"iops-total": 1}).limits)  # type: ignore[attr-defined]
        assert throttle_limits.describe(objects.limits("tg")) == limits

    asyncio.run(go())


def test_an_id_is_taken_once_and_free_again_afterwards() -> None:
    graph = Graph()
    objects = Objects(graph)
    objects.add(options("iothread"))
    with pytest.raises(CommandError, match="attempt to add duplicate property 'x' to object"):
        objects.add(options("secret", data="s"))
    objects.delete("x")
    objects.add(options("secret", data="s"))
    assert graph.secrets.find("x") == b"s"
    objects.delete("x")
    with pytest.raises(CommandError, match="No secret with id 'x'"):
        graph.secrets.find("x")
    with pytest.raises(CommandError, match="object 'x' not found"):
        objects.delete("x")


def test_an_id_has_to_be_well_formed() -> None:
    with pytest.raises(CommandError, match="Parameter 'id' expects an identifier"):
        Objects(Graph()).add(options("iothread", "3x"))


def run_daemon(scenario: Callable[[Daemon], Awaitable[None]]) -> None:
    async def go() -> None:
        daemon = Daemon()
        try:
            await scenario(daemon)
        finally:
            await daemon.shutdown()

    asyncio.run(go())


async def add_throttled(daemon: Daemon, **limits: int) -> None:
    named = {name.replace("_", "-"): value for name, value in limits.items()}
    daemon.objects.add(options(GROUP, "tg", limits=named))
    node: dict[str, Any] = {
        "driver": "throttle",
        "node-name": "t",
        "throttle-group": "tg",
        "file": {"driver": "null-co", "size": 1 << 20},
    }
    await daemon.blockdev_add(visit(BlockdevOptions, node))


def test_a_group_in_use_is_not_deleted() -> None:
    async def scenario(daemon: Daemon) -> None:
        await add_throttled(daemon)
        with pytest.raises(CommandError) as caught:
            daemon.objects.delete("tg")
        assert caught.value.description == "object 'tg' is in use, can not be deleted"
        await daemon.blockdev_del("t")
        daemon.objects.delete("tg")
        assert not daemon.graph.throttle_groups

    run_daemon(scenario)


def test_the_end_does_not_wait_for_limits() -> None:
    async def scenario(daemon: Daemon) -> None:
        await add_throttled(daemon, iops_total=1)
        needed = Permission.CONSISTENT_READ | Permission.WRITE
        device = Device(daemon.graph, daemon.graph.find("t"), needed=needed)
        daemon.devices["d"] = device
        writes = [
            asyncio.get_running_loop().create_task(device.pwrite(0, memoryview(bytes(512))))
            for _ in range(1000)  # many minutes' worth
        ]
        await asyncio.sleep(0)
        await daemon.shutdown()
        await asyncio.gather(*writes)

    run_daemon(scenario)
