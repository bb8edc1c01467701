# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Streaming into an overlay while guests write; texts and events are those of QEMU 7.2."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdjobs.errors import CommandError
from nbdjobs.jobs.job import JobOptions
from nbdjobs.jobs.stream import StreamJob, StreamOptions, start_stream
from nbdjobs.nodes.backing_chain import backing_of
from nbdjobs.nodes.copy_on_read import CopyOnRead
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.error_policy import OnError
from nbdjobs.nodes.graph import cumulative_permissions
from nbdjobs.nodes.permissions import Permission
from tests.jobs.chains import CLUSTER, Chain, chain, writers
from tests.jobs.rig import turns

BEGIN = ["created", "running", "paused", "running"]
END = ["waiting", "pending", "concluded", "null"]


async def stream(made: Chain, base: str | None = None, **options: Any) -> StreamJob:
    return await start_stream(
        made.jobs,
        made.graph,
        made.node("top"),
        None if base is None else made.node(base),
        None,
        StreamOptions(job_id="j", **options),
    )


@pytest.mark.parametrize(
    ("base", "left"), [(None, ["top"]), ("base", ["top", "base"]), ("mid", ["top", "mid", "base"])]
)
def test_the_overlay_gets_what_is_above_the_base(
    tmp_path: Path, base: str | None, left: list[str]
) -> None:
    async def main() -> None:
        async with chain(tmp_path) as made:
            before = {name: made.path(name).read_bytes() for name in ("base", "mid")}
            async with writers(made, 1):
                job = await stream(made, base)
                await made.run_through(job)
            await made.check_seen()
            assert made.events.statuses() == BEGIN + END
            assert made.guest.node is made.node("top")
            below = backing_of(made.node("top"))
            assert below is (None if base is None else made.node(base))
            assert all(not node.op_blockers for node in made.graph.nodes.values())
            assert all(before[name] == made.path(name).read_bytes() for name in before)
        assert made.backing_chain("top") in ([], left)
        made.check_images("top")

    asyncio.run(main())


def test_bottom_is_the_last_image_copied_from(tmp_path: Path) -> None:
    async def main() -> None:
        async with chain(tmp_path) as made:
            options = StreamOptions(job_id="j", backing_file="other")
            job = await start_stream(
                made.jobs, made.graph, made.node("top"), None, made.node("mid"), options
            )
            await made.run_through(job)
            assert backing_of(made.node("top")) is made.node("base")
            await made.check_seen()
            header = made.node("top").header  # type: ignore[attr-defined]  # a qcow2 node
            assert header.backing_file == b"other"
            assert header.backing_format == "qcow2"

    asyncio.run(main())


def test_a_cancelled_job_leaves_the_chain(tmp_path: Path) -> None:
    async def main() -> None:
        async with chain(tmp_path) as made:
            job = await stream(made, job=JobOptions(speed=1))
            await turns(200)
            assert isinstance(made.guest.node, CopyOnRead)
            with pytest.raises(CommandError, match="Node 'top' is busy: block device is in use"):
                await stream(made)
            job.cancel()
            async with writers(made, 2):
                await made.run_through(job)
            await made.check_seen()
            assert made.events[-3][0] == "BLOCK_JOB_CANCELLED"
            assert made.guest.node is made.node("top")
            assert set(made.graph.nodes) >= {"top", "mid", "base"}
        assert made.backing_chain("top") in ([], ["top", "mid", "base"])
        made.check_images("top", "mid")

    asyncio.run(main())


def test_what_a_guest_has_written_is_not_overwritten(tmp_path: Path) -> None:
    """The write comes while the cluster is being read from below."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            made.graph.nodes["top"].is_owned_by_user = True
            job = await stream(made, job=JobOptions(speed=1))
            await turns(50)
            node = made.guest.node
            assert isinstance(node, CopyOnRead)
            data = b"new" * 100
            copying = asyncio.create_task(node.copy(0, len(made.model)))
            for offset in range(0, len(made.model) - 400, CLUSTER):
                await made.guest.pwrite(offset + 7, memoryview(data))
                made.model[offset + 7 : offset + 7 + len(data)] = data
            await copying
            await made.check_seen()
            job.set_speed(0)
            await made.run_through(job)
            await made.check_seen()
        made.check_images("top")

    asyncio.run(main())


def test_an_error_pauses_the_job_and_it_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with chain(tmp_path, fails_at={"mid": "read_aio"}) as made:
            job = await stream(made, "base", on_error=OnError.STOP)
            error = await made.until("BLOCK_JOB_ERROR")
            assert error == {"device": "j", "operation": "read", "action": "stop"}
            await turns(50)
            assert job.io_status == "failed"
            await made.resume_through(job)
            await made.check_seen()
        assert made.backing_chain("top") in ([], ["top", "base"])
        made.check_images("top")

    asyncio.run(main())


@pytest.mark.parametrize("policy", [OnError.REPORT, OnError.IGNORE])
def test_after_an_error_the_backing_file_stays(tmp_path: Path, policy: OnError) -> None:
    async def main() -> None:
        async with chain(tmp_path, fails_at={"mid": "read_aio"}) as made:
            job = await stream(made, "base", on_error=policy)
            await made.run_through(job)
            completed = made.events.named("BLOCK_JOB_COMPLETED")[0]
            assert completed["error"] == "Input/output error"
            await made.check_seen()
        assert made.backing_chain("top") in ([], ["top", "mid", "base"])
        made.check_images("top", "mid")

    asyncio.run(main())


def test_an_image_that_is_only_read_is_written_and_only_read_again(tmp_path: Path) -> None:
    async def main() -> None:
        made = Chain(tmp_path, dict.fromkeys(("base", "top"), 8 * CLUSTER))
        made.make_images()
        node = await made.add(
            driver="qcow2",
            **{"node-name": "top", "read-only": True},
            file={"driver": "file", "filename": str(made.path("top"))},
        )
        made.guest = Device(made.graph, node)
        job = await stream(made)
        assert not node.is_read_only
        await made.run_through(job)
        assert node.is_read_only
        assert not cumulative_permissions(node)[0] & Permission.WRITE
        await made.close()
        assert made.backing_chain("top") in ([], ["top"])

    asyncio.run(main())


def test_a_short_image_in_between_still_hides_what_is_below(tmp_path: Path) -> None:
    sizes = {"base": 32 * CLUSTER, "mid": 9 * CLUSTER, "top": 32 * CLUSTER}

    async def main() -> None:
        async with chain(tmp_path, sizes) as made:
            await made.check_seen()
            await made.run_through(await stream(made, "base"))
            await made.check_seen()
        made.check_images("top")

    asyncio.run(main())


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**32),
    base=st.sampled_from((None, "base", "mid")),
    speed=st.sampled_from((0, 0, 16 * CLUSTER)),
    fails=st.booleans(),
    cancels=st.booleans(),
)
def test_guests_always_see_their_disk(
    tmp_path: Path, seed: int, base: str | None, speed: int, fails: bool, cancels: bool
) -> None:
    fails_at = {"mid": "read_aio"} if fails else None

    async def main() -> None:
        chance = random.Random(seed)
        async with chain(tmp_path, seed=seed, fails_at=fails_at) as made:
            on_error = chance.choice((OnError.STOP, OnError.IGNORE, OnError.REPORT))
            async with writers(made, seed):
                # Else its name in the header would be that of a file that fails.
                name = None if base is None else f"{base}.qcow2"
                job = await stream(
                    made, base, backing_file=name, on_error=on_error, job=JobOptions(speed=speed)
                )
                await steer(made, job, chance, cancels=cancels)
            await made.check_seen()
            assert made.guest.node is made.node("top")
        made.check_images("top")

    asyncio.run(main())


async def steer(made: Chain, job: StreamJob, chance: random.Random, *, cancels: bool) -> None:
    """Be a user who cannot leave the job alone, but lets it end."""
    for _ in range(20):
        await turns(chance.randrange(12))
        made.clock.advance(chance.random() / 10)
        with suppress(CommandError):  # the job has gone on meanwhile
            if cancels and chance.random() < 0.1:
                job.cancel()
            else:
                chance.choice((job.pause, job.resume, lambda: job.set_speed(0)))()
    await made.resume_through(job)
