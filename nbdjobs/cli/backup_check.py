# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs backup --dry-run`: what a backup would do and why it would fail, without any effect.

Only queries go to the server, and of the target only its state is looked at. What nobody can know
beforehand stays open: whether the server's user may write there, and what fails on the way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nbdjobs.cli.backup_job import Request, Sync, free_job_id
from nbdjobs.cli.exits import CliError, ExitCode
from nbdjobs.cli.images import is_identifier
from nbdjobs.cli.qmp_calls import fetch_schema
from nbdjobs.cli.session import BlockNode, Session
from nbdjobs.cli.target import FileTarget, NodeTarget, Target, look_at
from nbdjobs.cli.units import format_rate, format_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What is known before a backup.

    Attributes:
        plan: What it would do, one sentence each.
        problems: Why it would fail, one sentence each; none when nothing is found.
        warnings: What may go wrong.
    """

    plan: tuple[str, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def code(self) -> ExitCode:
        """The exit code."""
        return ExitCode.FAILED if self.problems else ExitCode.DONE

    def to_json(self) -> dict[str, object]:
        """The only object of `--dry-run --json`."""
        return {
            "type": "dry-run",
            "would-start": not self.problems,
            "exit-code": self.code.value,
            "plan": list(self.plan),
            "problems": list(self.problems),
            "warnings": list(self.warnings),
        }


async def rehearse(
    session: Session, request: Request, target: str, *, is_forced: bool
) -> Rehearsal:
    """Look at everything that a backup would need.

    Args:
        session: To the server.
        request: The job.
        target: A path or `node:NAME`.
        is_forced: An existing target may be replaced.

    Raises:
        CliError: There is no such source, so nothing else can be looked at; or the server went
            away.
    """
    nodes = await session.nodes()
    source = await session.find_node(request.source, nodes)
    jobs = {job["id"] for job in await session.execute("query-jobs")}
    problems = [*_job_problems(request, jobs), *await _option_problems(session, request)]
    plan = [_describe(request, source, request.job_id or free_job_id(source.name, jobs))]
    warnings: list[str] = []
    try:
        place = look_at(
            target,
            size=source.size,
            is_forced=is_forced,
            in_use={node.filename for node in nodes.values()},
        )
    except CliError as error:
        problems.append(str(error))
    else:
        plan += _describe_target(place, source)
        problems += _node_problems(place, source, nodes)
        if isinstance(place, FileTarget):
            free = _free_space(place.path.parent)
            plan.append(f"{format_size(free)} are free in '{place.path.parent}'")
            _compare_space(source, free, problems, warnings)
    return Rehearsal(plan=tuple(plan), problems=tuple(problems), warnings=tuple(warnings))


def _describe(request: Request, source: BlockNode, job_id: str) -> str:
    allocated = "" if source.allocated is None else f", {format_size(source.allocated)} allocated"
    what = "save what clients overwrite on" if request.sync is Sync.NONE else "copy"
    limit = f", at most {format_rate(request.speed)}" if request.speed else ""
    size = format_size(source.size)
    return f"job '{job_id}' would {what} '{source.name}' ({size}{allocated}){limit}"


def _describe_target(target: Target, source: BlockNode) -> Iterator[str]:
    if not isinstance(target, FileTarget):
        yield f"{target.label} would be overwritten"
        return
    yield f"'{target.partial}' would be made, {format_size(source.size)} large"
    replaced = ", in place of the file there" if target.is_replacing else ""
    yield f"once complete, it would become '{target.path}'{replaced}"


def _job_problems(request: Request, jobs: set[str]) -> Iterator[str]:
    if request.job_id is None:
        return
    if request.job_id in jobs:
        yield f"the server has a job '{request.job_id}' already: choose another --job-id"
    elif not is_identifier(request.job_id):
        yield (
            f"'{request.job_id}' cannot be the name of a job: expected a letter, then letters,"
            " digits, '-', '.' or '_'"
        )


async def _option_problems(session: Session, request: Request) -> list[str]:
    """Arguments that this server does not know, by its own schema."""
    schema = await fetch_schema(session)
    if "blockdev-backup" not in schema.commands:
        return ["the server has no command blockdev-backup"]
    known = schema.members(schema.arguments_of("blockdev-backup"), None)
    return [f"the server does not know --{name}" for name in request.options if name not in known]


def _node_problems(
    target: Target, source: BlockNode, nodes: Mapping[str, BlockNode]
) -> Iterator[str]:
    if not isinstance(target, NodeTarget):
        return
    node = nodes.get(target.name)
    if node is None:
        there = ", ".join(f"'{name}'" for name in sorted(nodes))
        yield f"the server has no node '{target.name}': it has {there}"
        return
    if node.name == source.name:
        yield f"'{node.name}' cannot be source and target"
    if node.is_read_only:
        yield f"the target node '{node.name}' is read-only"
    if node.size != source.size:
        yield f"the target node '{node.name}' has {node.size} bytes: expected {source.size}"


def _free_space(folder: Path) -> int:
    """Bytes that this user may still fill on the folder's file system."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _compare_space(source: BlockNode, free: int, problems: list[str], warnings: list[str]) -> None:
    """Holes need no space, but how many there are is known only if the server says it."""
    if source.allocated is not None and free < min(source.allocated, source.size):
        problems.append(
            f"the source takes up {format_size(source.allocated)},"
            f" more than the {format_size(free)} that are free for the target"
        )
    elif free < source.size:
        warnings.append(
            f"the target may grow to {format_size(source.size)}, more than the"
            f" {format_size(free)} that are free, if clients fill the source before it starts"
        )
