# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio

from nbdjobs.errors import JobError
from nbdjobs.jobs.job import JobOptions
from nbdjobs.jobs.status import JobStatus
from nbdjobs.jobs.transaction import Transaction
from tests.jobs.rig import turns
from tests.jobs.toy import MANUAL, Bench, ToyJob

KEPT = JobOptions(auto_dismiss=False)


async def group(bench: Bench, *options: JobOptions) -> list[ToyJob]:
    transaction = Transaction()
    jobs = [bench.add(f"j{n}", each, transaction) for n, each in enumerate(options)]
    for job in jobs:
        bench.jobs.start(job)
    await turns()
    return jobs


def statuses(jobs: list[ToyJob]) -> list[str]:
    return [str(job.status) for job in jobs]


def test_the_first_one_done_waits_for_the_last() -> None:
    async def main() -> None:
        bench = Bench()
        jobs = await group(bench, KEPT, KEPT, KEPT)
        await jobs[1].finish()
        await jobs[0].finish()
        assert statuses(jobs) == ["waiting", "waiting", "running"]
        await jobs[2].finish()
        assert statuses(jobs) == ["concluded"] * 3
        for job in jobs:
            assert job.calls == ["run", "prepare", "commit", "clean", "announce end"]
        await bench.end()

    asyncio.run(main())


def test_when_one_fails_all_others_are_cancelled_whatever_they_do() -> None:
    async def main() -> None:
        bench = Bench()
        jobs = await group(bench, KEPT, KEPT, KEPT, KEPT)
        await jobs[0].finish()
        jobs[1].pause()
        await turns()
        assert statuses(jobs) == ["waiting", "paused", "running", "running"]
        await jobs[3].fail(JobError("no more paper"))
        assert statuses(jobs) == ["concluded"] * 4
        assert [job.error for job in jobs] == ["Operation canceled"] * 3 + ["no more paper"]
        assert [job.is_cancelled for job in jobs] == [True] * 3 + [False]
        for job in jobs:
            assert job.calls[-3:] == ["abort", "clean", "announce end"]
        await bench.end()

    asyncio.run(main())


def test_no_job_concludes_before_all_have_stopped() -> None:
    class Slow(ToyJob):
        async def run(self) -> None:
            await self.stopped.wait()

        stopped: asyncio.Event

    async def main() -> None:
        bench = Bench()
        jobs = await group(bench, KEPT)
        slow = Slow(bench.jobs, "slow", KEPT, jobs[0].transaction)
        slow.stopped = asyncio.Event()
        bench.jobs.add(slow)
        bench.jobs.start(slow)
        await jobs[0].fail(JobError("no more paper"))
        assert statuses([*jobs, slow]) == ["aborting", "running"]
        slow.stopped.set()
        await turns()
        assert statuses([*jobs, slow]) == ["concluded", "concluded"]
        await bench.end()

    asyncio.run(main())


def test_one_that_asks_for_consent_holds_all_and_any_consent_counts_for_all() -> None:
    async def main() -> None:
        bench = Bench()
        jobs = await group(bench, KEPT, MANUAL)
        for job in jobs:
            await job.finish()
        assert statuses(jobs) == ["pending", "pending"]
        assert jobs[0].calls == ["run"]
        assert jobs[1].calls == ["run", "announce pending"]
        jobs[0].finalize()
        await turns()
        assert statuses(jobs) == ["concluded", "concluded"]
        await bench.end()

    asyncio.run(main())


def test_cancelling_one_that_is_pending_cancels_all() -> None:
    async def main() -> None:
        bench = Bench()
        jobs = await group(bench, MANUAL, MANUAL)
        for job in jobs:
            await job.finish()
        jobs[1].cancel()
        await turns()
        assert statuses(jobs) == ["concluded", "concluded"]
        assert [job.error for job in jobs] == ["Operation canceled"] * 2
        assert all(job.is_cancelled for job in jobs)
        await bench.end()

    asyncio.run(main())


def test_one_that_cannot_take_effect_keeps_all_from_it() -> None:
    async def main() -> None:
        bench = Bench()
        jobs = await group(bench, KEPT, KEPT, KEPT)
        jobs[1].refusal = JobError("changed my mind")
        for job in jobs:
            await job.finish()
        assert statuses(jobs) == ["concluded"] * 3
        assert [job.error for job in jobs] == [
            "Operation canceled", "changed my mind", "Operation canceled",
        ]  # fmt: skip
        assert ["prepare" in job.calls for job in jobs] == [True, True, False]
        assert not any("commit" in job.calls for job in jobs)
        await bench.end()

    asyncio.run(main())


def test_a_job_that_never_starts_does_not_hold_the_others() -> None:
    async def main() -> None:
        bench = Bench()
        jobs = await group(bench, KEPT)
        stillborn = bench.add("never", KEPT, jobs[0].transaction)
        await jobs[0].finish()
        assert statuses(jobs) == ["waiting"]
        stillborn.never_started()
        await turns()
        assert statuses(jobs) == ["concluded"]
        assert stillborn.status is JobStatus.NULL
        await bench.end()

    asyncio.run(main())
