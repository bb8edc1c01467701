# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest

from nbdjobs.errors import CommandError, JobError
from nbdjobs.jobs.backup import BackupOptions, SyncMode, start_backup
from nbdjobs.jobs.job import JobInfo, JobOptions
from nbdjobs.jobs.status import VERBS, JobStatus, JobType, JobVerb
from tests.jobs.rig import CLUSTER, Rig, turns
from tests.jobs.toy import MANUAL, Bench, ToyJob
from tests.nodes.faults import MemoryNode, Op


def where(job: ToyJob) -> str:
    return str(job.status)


CALLS: dict[JobVerb, Callable[[ToyJob], None]] = {
    JobVerb.CANCEL: lambda job: job.cancel(force=True),
    JobVerb.PAUSE: ToyJob.pause,
    JobVerb.RESUME: ToyJob.resume,
    JobVerb.SET_SPEED: lambda job: job.set_speed(5),
    JobVerb.COMPLETE: ToyJob.complete,
    JobVerb.FINALIZE: ToyJob.finalize,
    JobVerb.DISMISS: ToyJob.dismiss,
}
REACHABLE = [s for s in JobStatus if s not in (JobStatus.UNDEFINED, JobStatus.ABORTING)]


def refusal(call: Callable[[], object]) -> str | None:
    try:
        call()
    except CommandError as error:
        return str(error)
    return None


@pytest.mark.parametrize("status", REACHABLE)
@pytest.mark.parametrize("verb", JobVerb)
def test_each_verb_in_each_status(status: JobStatus, verb: JobVerb) -> None:
    async def main() -> None:
        bench = Bench()
        job = await bench.bring_to(status)
        said = refusal(lambda: CALLS[verb](job))
        if verb is JobVerb.RESUME and status not in (JobStatus.PAUSED, JobStatus.STANDBY):
            assert said == "Can't resume a job that was not paused"
        elif verb is JobVerb.PAUSE and status in (JobStatus.PAUSED, JobStatus.STANDBY):
            assert said == "Job is already paused"
        elif status not in VERBS[verb]:
            assert said == f"Job 'j' in state '{status}' cannot accept command verb '{verb}'"
        elif verb is JobVerb.COMPLETE:
            assert said == "The active block job 'j' cannot be completed"
        else:
            assert said is None
        if status is JobStatus.CREATED and job.status is JobStatus.CREATED:
            job.never_started()
        await bench.end()

    asyncio.run(main())


def test_a_job_that_succeeds() -> None:
    async def main() -> None:
        bench = Bench()
        job = await bench.start()
        await job.finish()
        assert bench.events.statuses() == [
            "created", "running", "waiting", "pending", "concluded", "null",
        ]  # fmt: skip
        assert job.calls == ["run", "prepare", "commit", "clean", "announce end"]
        assert job.error is None
        await bench.end()

    asyncio.run(main())


def test_a_job_that_fails() -> None:
    async def main() -> None:
        bench = Bench()
        job = await bench.start(options=MANUAL)
        await job.fail(JobError("no more paper"))
        assert bench.events.statuses() == ["created", "running", "aborting", "concluded"]
        assert job.calls == ["run", "abort", "clean", "announce end"]
        assert job.info().error == "no more paper"
        await bench.end()
        assert bench.events.statuses()[-1] == "null"

    asyncio.run(main())


def test_a_mistake_of_our_own_fails_the_job_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        bench = Bench()
        job = await bench.start(options=MANUAL)
        with caplog.at_level(logging.ERROR):
            await job.fail(ZeroDivisionError())
        assert where(job) == "concluded"
        assert job.error == "internal error"
        assert "job j failed unexpectedly" in caplog.text
        await bench.end()

    asyncio.run(main())


def test_a_job_that_waits_for_its_user_at_the_end() -> None:
    async def main() -> None:
        bench = Bench()
        job = await bench.start(options=MANUAL)
        await job.finish()
        assert where(job) == "pending"
        assert job.calls == ["run", "announce pending"]
        job.finalize()
        await turns()
        assert where(job) == "concluded"
        job.dismiss()
        assert bench.jobs.find("j") is None
        await bench.end()

    asyncio.run(main())


@pytest.mark.parametrize("status", [s for s in REACHABLE if s in VERBS[JobVerb.CANCEL]])
def test_cancelling_ends_the_job_without_effect(status: JobStatus) -> None:
    async def main() -> None:
        bench = Bench()
        job = await bench.bring_to(status)
        job.cancel(force=True)
        await turns()
        assert job.error == "Operation canceled"
        assert job.is_cancelled
        assert "commit" not in job.calls
        if status is JobStatus.CREATED:  # nobody has heard of it yet
            assert where(job) == "null"
            assert job.calls == ["abort", "clean"]
            bench.jobs.start(job)
        else:
            assert where(job) == "concluded"
            assert job.calls[-3:] == ["abort", "clean", "announce end"]
        await bench.end()

    asyncio.run(main())


def test_cancelling_when_the_outcome_is_decided_comes_too_late() -> None:
    class Slow(ToyJob):
        async def commit(self) -> None:
            self.cancel(force=True)
            await super().commit()

    async def main() -> None:
        bench = Bench()
        job = Slow(bench.jobs)
        bench.jobs.add(job)
        bench.jobs.start(job)
        await job.finish()
        assert job.error is None
        assert not job.is_cancelled
        await bench.end()

    asyncio.run(main())


def test_cancelling_while_it_prepares_is_in_time() -> None:
    async def main() -> None:
        bench = Bench()
        job = await bench.start()
        job.preparing = asyncio.Event()
        await job.finish()
        assert job.calls[-1] == "prepare"
        job.cancel()
        assert where(job) == "aborting"
        job.preparing.set()
        await turns()
        assert "commit" not in job.calls
        assert where(job) == "null"
        await bench.end()

    asyncio.run(main())


def test_pauses_of_users_and_of_the_graph_add_up() -> None:
    async def main() -> None:
        bench = Bench()
        job = await bench.start()
        job.pause()
        job.add_pause()
        await job.quiet()
        assert job.info().is_paused
        job.resume()
        await turns()
        assert where(job) == "paused"
        job.remove_pause()
        await turns()
        assert where(job) == "running"
        assert bench.events.statuses() == ["created", "running", "paused", "running"]
        await bench.end()

    asyncio.run(main())


def test_resuming_shows_at_once_and_pausing_again_before_the_job_noticed_holds() -> None:
    async def main() -> None:
        bench = Bench()
        job = await bench.bring_to(JobStatus.PAUSED)
        job.resume()
        assert where(job) == "running"
        job.pause()
        await job.quiet()
        assert where(job) == "paused"
        job.cancel()
        assert where(job) == "running"
        await turns()
        assert bench.events.statuses()[3:] == [
            "running", "paused", "running", "aborting", "concluded",
        ]  # fmt: skip
        await bench.end()

    asyncio.run(main())


def test_a_job_started_while_the_graph_changes_is_paused_at_once() -> None:
    async def main() -> None:
        bench = Bench()
        job = bench.add()
        job.add_pause()
        bench.jobs.start(job)
        assert bench.events.statuses() == ["created", "running", "paused"]
        await turns()
        assert job.calls == []
        job.remove_pause()
        await turns()
        assert job.calls == ["run"]
        await bench.end()

    asyncio.run(main())


def test_ready_jobs_pause_to_standby() -> None:
    async def main() -> None:
        bench = Bench()
        job = await bench.bring_to(JobStatus.STANDBY)
        assert job.info().is_ready
        job.resume()
        await turns()
        assert bench.events.statuses() == ["created", "running", "ready", "standby", "ready"]
        await bench.end()

    asyncio.run(main())


def test_a_rest_ends_by_the_clock_and_by_every_command() -> None:
    class Sleeper(ToyJob):
        async def run(self) -> None:
            while not self.is_cancelled:
                self.calls.append("rest")
                await self.rest(10)
                await self.pause_point()

    async def main() -> None:
        bench = Bench()
        job = Sleeper(bench.jobs)
        bench.jobs.add(job)
        bench.jobs.start(job)
        await turns()
        for rests, act in enumerate(
            (
                lambda: bench.clock.advance(10),
                lambda: job.set_speed(7),
                job.pause,
                job.resume,
            )
        ):
            assert job.calls == ["rest"] * (rests + 1 - (rests == 3))
            act()
            await turns()
        assert not job.info().is_busy
        job.cancel()
        await turns()
        assert where(job) == "null"
        await bench.end()

    asyncio.run(main())


def test_a_negative_speed_is_refused() -> None:
    async def main() -> None:
        bench = Bench()
        job = await bench.start()
        assert refusal(lambda: job.set_speed(-1)) == (
            "Parameter 'speed' expects a non-negative value"
        )
        assert job.limit.speed == 0
        await bench.end()

    asyncio.run(main())


def test_what_queries_show() -> None:
    async def main() -> None:
        bench = Bench()
        job = await bench.start(options=JobOptions(auto_dismiss=False))
        job.set_speed(77)
        assert job.info() == JobInfo(
            id="j",
            type=JobType.CREATE,
            status=JobStatus.RUNNING,
            current_progress=3,
            total_progress=10,
            speed=77,
            io_status="ok",
            is_paused=False,
            is_busy=False,
            is_ready=False,
            auto_finalize=True,
            auto_dismiss=False,
            error=None,
        )
        await bench.end()

    asyncio.run(main())


def test_ids_are_well_formed_and_unique() -> None:
    async def main() -> None:
        bench = Bench()
        await bench.start("j")
        assert refusal(lambda: bench.jobs.check_id("j")) == "Job ID 'j' already in use"
        assert refusal(lambda: bench.jobs.check_id("")) == "Invalid job ID ''"
        assert refusal(lambda: bench.jobs.check_id("1bad")) == "Invalid job ID '1bad'"
        assert refusal(lambda: bench.jobs.check_id("good")) is None
        assert refusal(lambda: bench.jobs.get("nope")) == "Job not found"
        assert bench.jobs.get("j") is bench.jobs.find("j")
        assert [job.id for job in bench.jobs] == ["j"]
        await bench.end()

    asyncio.run(main())


def test_shutdown_ends_jobs_in_every_status() -> None:
    async def main() -> None:
        for status in REACHABLE:
            bench = Bench()
            job = await bench.bring_to(status)
            await bench.end()
            assert where(job) == "null"
            if status is JobStatus.CREATED:
                assert job.calls == ["abort", "clean"]

    asyncio.run(main())


def test_no_job_starts_while_the_last_ones_end() -> None:
    async def main() -> None:
        rig = Rig()
        async with rig.target.hold(Op.WRITE) as gate:
            job = await rig.backup()
            await gate.reached()
            ending = asyncio.create_task(rig.jobs.shutdown())
            await turns()
            assert job.is_cancelled
            source, target = (MemoryNode(CLUSTER, name=name) for name in ("s2", "t2"))
            rig.graph.add(source)
            rig.graph.add(target)
            options = BackupOptions(sync=SyncMode.FULL, job_id="k")
            with pytest.raises(CommandError, match="No job can be started"):
                await start_backup(rig.jobs, rig.graph, source, target, options)
            assert not ending.done()
        await ending
        assert list(rig.jobs) == []
        assert rig.guest.node is rig.source

    asyncio.run(main())


def test_cancelling_the_task_itself_still_cleans_up() -> None:
    async def main() -> None:
        bench = Bench()
        job = await bench.start()
        [task] = asyncio.all_tasks() - {asyncio.current_task()}
        task.cancel()
        await bench.jobs.ended(job)
        assert job.calls == ["run", "stop", "abort", "clean", "announce end"]
        await bench.end()

    asyncio.run(main())
