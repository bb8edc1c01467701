# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Subcommands for one job: pause, resume, cancel, speed, complete, finalize, dismiss.

All are rows of one table: what is asked of the server, and the sentence that says it was granted.
Refusals are in the server's own words, since it alone knows the rules of its jobs.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdjobs.cli import arguments as common
from nbdjobs.cli.exits import CliError, ExitCode
from nbdjobs.cli.session import RefusedError, Session, open_session
from nbdjobs.cli.units import format_rate

Options = argparse.Namespace
Arguments = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Verb:
    """What can be done to a job; a subcommand.

    Attributes:
        participle: What could not be done, in the sentence about a refusal.
        ask: The QMP command and its arguments for a job.
        granted: What to say about the job when the server has agreed.
        describe: Adds the arguments beyond the job's name.
        hint: What to add to the server's reason for a refusal.
    """

    participle: str
    ask: Callable[[str, Options], tuple[str, Arguments]]
    granted: Callable[[Options], str]
    describe: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    hint: Callable[[str], str] = lambda reason: ""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Describe the command line."""
        parser.add_argument("job", metavar="JOB", help="name of the job, see nbdjobs jobs")
        self.describe(parser)
        common.add_server(parser)

    def run(self, arguments: argparse.Namespace) -> int:
        """Ask it of the server and say what came of it.

        Raises:
            CliError: There is no such job, or it is refused.
        """
        asyncio.run(self._apply(common.server(arguments), arguments))
        print(f"job '{arguments.job}' {self.granted(arguments)}")
        return ExitCode.DONE

    async def _apply(self, path: Path, options: Options) -> None:
        job: str = options.job
        command, arguments = self.ask(job, options)
        async with open_session(path) as session:
            await _check_present(session, job)
            try:
                await session.execute(command, arguments)
            except RefusedError as error:
                hint = self.hint(error.description)
                raise CliError(
                    f"job '{job}' cannot be {self.participle}: {error.description}{hint}"
                ) from error


async def _check_present(session: Session, job: str) -> None:
    """Say which jobs there are when the named one is not among them."""
    names = [each["id"] for each in await session.execute("query-jobs")]
    if job not in names:
        there = ", ".join(f"'{name}'" for name in names) or "none"
        raise CliError(f"the server has no job '{job}': it has {there}")


def _simple(participle: str, command: str, granted: str) -> Verb:
    """A verb that needs nothing but the job's name."""
    return Verb(participle, lambda job, options: (command, {"id": job}), lambda options: granted)


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--force",
        action="store_true",
        help="even if it is paused; and one that is ready ends without a consistent copy",
    )


def _cancel(job: str, options: Options) -> tuple[str, Arguments]:
    # The older of the two commands: only it tells a gentle end from a forced one.
    return "block-job-cancel", {"device": job, "force": options.force}


def _hint_at_force(reason: str) -> str:
    is_paused = reason.endswith("is currently paused")
    return " (--force cancels it all the same)" if is_paused else ""


def _add_rate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "rate", metavar="RATE", type=common.size, help="bytes per second, such as 50M; 0: no limit"
    )


def _set_speed(job: str, options: Options) -> tuple[str, Arguments]:
    return "block-job-set-speed", {"device": job, "speed": options.rate}


def _speed_granted(options: Options) -> str:
    return f"is limited to {format_rate(options.rate)}" if options.rate else "has no speed limit"


VERBS: Final[Mapping[str, Verb]] = {
    "pause": _simple("paused", "job-pause", "pauses"),
    "resume": _simple("resumed", "job-resume", "goes on"),
    "cancel": Verb(
        "cancelled", _cancel, lambda options: "is being cancelled", _add_force, _hint_at_force
    ),
    "speed": Verb("limited", _set_speed, _speed_granted, _add_rate),
    "complete": _simple("completed", "job-complete", "is being completed"),
    "finalize": _simple("finalized", "job-finalize", "is being finalized"),
    "dismiss": _simple("dismissed", "job-dismiss", "is dismissed"),
}
"""The verbs by the names of their subcommands."""
