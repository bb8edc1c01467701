# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Committing images, those that guests write included; texts and events are QEMU 7.2's."""

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
from nbdjobs.jobs.active_commit import ActiveCommitJob, start_active_commit
from nbdjobs.jobs.commit import CommitJob, start_commit
from nbdjobs.jobs.commit_images import CommitOptions
from nbdjobs.jobs.job import JobOptions
from nbdjobs.nodes.backing_chain import backing_of
from nbdjobs.nodes.commit_top import CommitTop
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.error_policy import OnError
from nbdjobs.nodes.mirror_top import MirrorTop
from nbdjobs.nodes.permissions import Permission
from tests.jobs.chains import CLUSTER, Chain, chain, writers
from tests.jobs.rig import turns
from tests.nodes.qcow2.rig import content_of

BEGIN = ["created", "running", "paused", "running"]
END = ["waiting", "pending", "concluded", "null"]
NAMES = ("base", "mid", "top")


async def commit(made: Chain, top: str = "mid", base: str = "base", **options: Any) -> CommitJob:
    return await start_commit(
        made.jobs,
        made.graph,
        made.guest.node,
        made.node(top),
        made.node(base),
        CommitOptions(job_id="j", **options),
    )


async def commit_active(made: Chain, base: str = "base", **options: Any) -> ActiveCommitJob:
    return await start_active_commit(
        made.jobs,
        made.graph,
        made.guest.node,
        made.node(base),
        CommitOptions(job_id="j", **options),
    )


# Images that nobody writes


def test_the_content_of_an_image_goes_into_the_one_below(tmp_path: Path) -> None:
    async def main() -> None:
        async with chain(tmp_path) as made:
            async with writers(made, 1):
                job = await commit(made)
                assert isinstance(backing_of(made.node("top")), CommitTop)
                await made.run_through(job)
            await made.check_seen()
            assert made.events.statuses() == BEGIN + END
            assert backing_of(made.node("top")) is made.node("base")
            assert all(not node.op_blockers for node in made.graph.nodes.values())
            assert {node.name for node in made.graph.nodes.values() if "#" not in node.name} == {
                *NAMES
            }
        assert made.backing_chain("top") in ([], ["top", "base"])
        made.check_images("top", "base")

    asyncio.run(main())


def test_the_overlay_gets_the_name_that_the_user_wants(tmp_path: Path) -> None:
    async def main() -> None:
        async with chain(tmp_path) as made:
            await made.run_through(await commit(made, backing_file="other"))
            header = made.node("top").header  # type: ignore[attr-defined]  # a qcow2 node
            assert header.backing_file == b"other"
            await made.check_seen()

    asyncio.run(main())


def test_nobody_can_read_an_image_while_it_is_committed(tmp_path: Path) -> None:
    async def main() -> None:
        async with chain(tmp_path) as made:
            job = await commit(made, job=JobOptions(speed=1))
            with pytest.raises(CommandError, match="Permission conflict on node 'mid'"):
                Device(made.graph, made.node("mid"))
            with pytest.raises(CommandError, match=r"Node '.*' is busy"):
                await commit_active(made)
            job.cancel()
            await made.run_through(job)
            await made.check_seen()
            await Device(made.graph, made.node("mid")).close()
        assert made.backing_chain("top") in ([], ["top", "mid", "base"])
        made.check_images("top", "mid", "base")

    asyncio.run(main())


def test_a_base_that_somebody_else_reads_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with chain(tmp_path) as made:
            reader = Device(made.graph, made.node("base"), shared=Permission.CONSISTENT_READ)
            with pytest.raises(CommandError, match="Permission conflict on node 'base'"):
                await commit(made)
            with pytest.raises(CommandError, match="Permission conflict on node 'base'"):
                await commit_active(made)
            assert made.guest.node is made.node("top")
            assert not made.jobs
            await reader.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "sizes",
    [(16, 32, 32), (32, 16, 32), (32, 32, 16), (32, 9, 16), (8, 16, 32)],
)
def test_images_of_different_sizes(tmp_path: Path, sizes: tuple[int, int, int]) -> None:
    async def main() -> None:
        named = {name: size * CLUSTER for name, size in zip(NAMES, sizes, strict=True)}
        async with chain(tmp_path, named) as made:
            await made.check_seen()
            await made.run_through(await commit(made))
            await made.check_seen()
            await made.run_through(await commit_and_complete(made))
            await made.check_seen()

    asyncio.run(main())


async def commit_and_complete(made: Chain, **options: Any) -> ActiveCommitJob:
    made.events.clear()
    job = await commit_active(made, **options)
    await made.until("BLOCK_JOB_READY")
    job.complete()
    return job


def test_images_that_are_only_read_are_so_again_afterwards(tmp_path: Path) -> None:
    async def main() -> None:
        made = Chain(tmp_path, dict.fromkeys(NAMES, 8 * CLUSTER))
        made.make_images()
        file = {"driver": "file", "filename": str(made.path("top"))}
        node = await made.add(driver="qcow2", **{"node-name": "top"}, file=file)
        made.guest = Device(made.graph, node)
        mid = backing_of(node)
        assert mid is not None
        base = backing_of(mid)
        assert base is not None
        assert base.is_read_only
        job = await start_commit(made.jobs, made.graph, node, mid, base, CommitOptions(job_id="j"))
        assert not base.is_read_only
        await made.run_through(job)
        assert base.is_read_only
        assert backing_of(node) is base
        assert mid.name not in made.graph.nodes
        await made.close()
        assert made.backing_chain("top") in ([], ["top", "base"])

    asyncio.run(main())


# The image that guests write


def test_guests_move_to_the_base(tmp_path: Path) -> None:
    async def main() -> None:
        async with chain(tmp_path) as made:
            async with writers(made, 3):
                job = await commit_active(made)
                assert isinstance(made.guest.node, MirrorTop)
                ready = await made.until("BLOCK_JOB_READY")
                assert ready["len"] == ready["offset"]
                for _ in range(30):
                    await asyncio.sleep(0)
                job.complete()
                await made.run_through(job)
                assert made.guest.node is made.node("base")
            await made.check_seen()
            assert made.events.statuses() == [*BEGIN, "ready", *END]
        made.check_images("base", "top")

    asyncio.run(main())


@pytest.mark.parametrize("pauses", [False, True])
def test_cancelled_when_ready_both_hold_the_same(tmp_path: Path, pauses: bool) -> None:
    async def main() -> None:
        async with chain(tmp_path) as made:
            async with writers(made, 4):
                job = await commit_active(made)
                await made.until("BLOCK_JOB_READY")
                if pauses:
                    job.pause()
                    await turns(100)
                    assert job.status == "standby"
                    with pytest.raises(CommandError, match=r"cannot be completed|cannot accept"):
                        job.complete()
            job.cancel()
            await made.run_through(job)
            assert made.events[-3][0] == "BLOCK_JOB_COMPLETED"
            assert made.guest.node is made.node("top")
            await made.check_seen()
            reader = Device(made.graph, made.node("base"))
            assert (await content_of(reader))[: len(made.model)] == bytes(made.model)
            await reader.close()
        assert made.backing_chain("top") in ([], ["top", "mid", "base"])
        made.check_images("base", "top", "mid")

    asyncio.run(main())


def test_a_client_that_writes_all_the_time_does_not_keep_it_from_getting_ready(
    tmp_path: Path,
) -> None:
    """The job is slow, and guests write everything many times before it has come round."""

    async def main() -> None:
        async with chain(tmp_path) as made, writers(made, 5, count=6):
            job = await commit_active(made, job=JobOptions(speed=CLUSTER))
            await made.until("BLOCK_JOB_READY")
            job.cancel()
            await made.run_through(job)

    asyncio.run(main())


@pytest.mark.parametrize("image", ["base", "mid", "top"])
def test_an_error_of_an_image_is_the_jobs_and_is_tried_again(tmp_path: Path, image: str) -> None:
    fails_at = {image: "write_aio" if image == "base" else "read_aio"}

    async def main() -> None:
        async with chain(tmp_path, fails_at=fails_at) as made:
            async with writers(made, 6):
                job = await commit_active(made, on_error=OnError.IGNORE)
                await made.until("BLOCK_JOB_READY")
                job.complete()
                await made.run_through(job)
            assert made.guest.node is made.node("base")
            await made.check_seen()
        made.check_images("base")

    asyncio.run(main())


def test_consent_is_needed_for_the_change(tmp_path: Path) -> None:
    """Until then guests write, and the base follows."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            async with writers(made, 7):
                job = await commit_and_complete(made, job=JobOptions(auto_finalize=False))
                await made.until("BLOCK_JOB_PENDING")
                assert isinstance(made.guest.node, MirrorTop)
                for _ in range(50):
                    await asyncio.sleep(0)
                job.finalize()
                await made.run_through(job)
                assert made.guest.node is made.node("base")
            await made.check_seen()
        made.check_images("base")

    asyncio.run(main())


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**32),
    is_active=st.booleans(),
    base=st.sampled_from(("base", "mid")),
    speed=st.sampled_from((0, 0, 16 * CLUSTER)),
    fails_at=st.sampled_from((None, {"mid": "read_aio"}, {"base": "write_aio"})),
    cancels=st.booleans(),
)
def test_guests_always_see_their_disk(
    tmp_path: Path,
    seed: int,
    is_active: bool,
    base: str,
    speed: int,
    fails_at: dict[str, str] | None,
    cancels: bool,
) -> None:
    async def main() -> None:
        chance = random.Random(seed)
        async with chain(tmp_path, seed=seed, fails_at=fails_at) as made:
            on_error = chance.choice((OnError.STOP, OnError.IGNORE, OnError.REPORT))
            options: dict[str, Any] = {"on_error": on_error, "job": JobOptions(speed=speed)}
            async with writers(made, seed):
                if is_active:
                    job: Any = await commit_active(made, base, **options)
                else:
                    job = await commit(made, **options)
                await steer(made, job, chance, cancels=cancels)
            await made.check_seen()
            name = made.guest.node.name
        assert name in ("top", base)
        made.check_images(name, "base")

    asyncio.run(main())


async def steer(made: Chain, job: Any, chance: random.Random, *, cancels: bool) -> None:
    """Be a user who cannot leave the job alone, but lets it end."""
    for _ in range(20):
        await turns(chance.randrange(12))
        made.clock.advance(chance.random() / 10)
        with suppress(CommandError):  # the job has gone on meanwhile
            if cancels and chance.random() < 0.1:
                job.cancel(force=chance.random() < 0.5)
            else:
                chance.choice((job.pause, job.resume, lambda: job.set_speed(0)))()
    while made.jobs.find(job.id) is not None:
        made.clock.advance(0.05)
        await asyncio.sleep(0)
        with suppress(CommandError):
            job.resume()
        with suppress(CommandError):
            job.complete()
