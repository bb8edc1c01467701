# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Puts commands to a daemon inside the test and to the real program, and waits for image jobs.

The answer of a command that starts one is what `query-jobs` says once the job has ended.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, Final

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.errors import CommandError
from nbdjobs.qapi.visitor import to_qapi
from nbdjobs.qmp.commands import REGISTRY
from tests.interop.encrypted_images import UNTIMED
from tests.interop.oracle import Oracle, Reply

Options = dict[str, Any]
Step = tuple[str, Options]

CREATE: Final = "blockdev-create"
AMEND: Final = "x-blockdev-amend"
JOBS: Final = frozenset({CREATE, AMEND})


def ours(steps: Sequence[Step]) -> list[Reply]:
    """What a new daemon answers, and what became of the jobs."""

    async def go() -> list[Reply]:
        daemon = Daemon()
        try:
            return [await _step(daemon, number, *step) for number, step in enumerate(steps)]
        finally:
            await daemon.shutdown()

    return asyncio.run(go())


async def _step(daemon: Daemon, number: int, command: str, arguments: Options) -> Reply:
    if command not in JOBS:
        return await _answer(daemon, command, arguments)
    job_id = f"job{number}"
    reply = await _answer(daemon, command, {"job-id": job_id, **arguments})
    job = daemon.jobs.find(job_id)
    if job is None:
        return reply
    await daemon.jobs.ended(job)
    result = await _answer(daemon, "query-jobs", {})
    await _answer(daemon, "job-dismiss", {"id": job_id})
    return result


async def _answer(daemon: Daemon, command: str, arguments: Options) -> Reply:
    try:
        returned = await REGISTRY.find(command).execute(daemon, arguments)
    except CommandError as error:
        return {"error": {"class": error.error_class.value, "desc": error.description}}
    return {"return": {} if returned is None else to_qapi(returned)}


def theirs(steps: Sequence[Step], oracle: Oracle) -> list[Reply]:
    """What the real program answers, likewise."""
    return [_their_step(oracle, number, *step) for number, step in enumerate(steps)]


def _their_step(oracle: Oracle, number: int, command: str, arguments: Options) -> Reply:
    if command not in JOBS:
        return oracle.execute(command, arguments)
    while True:
        result = _their_job(oracle, f"job{number}", command, arguments)
        if UNTIMED not in json.dumps(result):
            return result


def _their_job(oracle: Oracle, job_id: str, command: str, arguments: Options) -> Reply:
    reply = oracle.execute(command, {"job-id": job_id, **arguments})
    if "error" in reply:
        return reply
    end = {"id": job_id, "status": "concluded"}
    oracle.events_until(lambda event: event.get("data") == end)
    result = oracle.execute("query-jobs", {})
    oracle.execute("job-dismiss", {"id": job_id})
    return result
