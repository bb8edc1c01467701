# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The same commands get the same answers from nbdjobs and from the real program.

Success, error class, error text, what queries return and which events come are compared. What
must differ is taken away first: the names that QEMU makes up for nodes, how far a job got while
it was asked, and what only nbdjobs tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from tests.interop import chain_cases, command_cases, target_cases
from tests.interop.command_cases import Ask, Step, Until, export, file, serve
from tests.interop.daemon import program
from tests.interop.oracle import PROGRAM, Oracle, Reply
from tests.interop.side_by_side import MadeUpNames, prepare

SCENARIOS: Final = {
    **command_cases.SCENARIOS,
    **target_cases.SCENARIOS,
    **chain_cases.SCENARIOS,
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_both_answer_the_same(tmp_path: Path, name: str) -> None:
    steps = SCENARIOS[name]
    theirs = answers(tmp_path / "theirs", steps, [PROGRAM])
    ours = answers(tmp_path / "ours", steps, program())
    different = [
        {"step": step, "ours": mine, "theirs": other}
        for step, mine, other in zip(steps, ours, theirs, strict=True)
        if mine != other
    ]
    assert different == []


def test_only_nbdjobs_lists_the_devices_of_exports(tmp_path: Path) -> None:
    """What `comparable` leaves out everywhere else."""
    lists: dict[str, list[list[Any]]] = {}
    for directory, command in (("theirs", [PROGRAM]), ("ours", program())):
        prepare(tmp_path / directory)
        with Oracle(tmp_path / directory, capabilities=[], program=command) as daemon:
            for step in (file("f"), serve(), export("f")):
                assert daemon.execute(step.command, step.arguments) == {"return": {}}
            lists[directory] = [
                daemon.execute(query)["return"] for query in ("query-block", "query-blockstats")
            ]
    assert lists["theirs"] == [[], []]
    for (entry,) in lists["ours"]:
        assert (entry["device"], entry["qdev"]) == ("", "e")


def test_the_list_is_long() -> None:
    commands = [step for steps in SCENARIOS.values() for step in steps if isinstance(step, Ask)]
    assert len({repr(step) for step in commands}) > 400


def answers(directory: Path, steps: Sequence[Step], command: Sequence[str]) -> list[Any]:
    """What a daemon says to each step, in comparable form."""
    prepare(directory)
    names = MadeUpNames()
    with Oracle(directory, capabilities=[], program=command) as daemon:
        return [names.comparable(answer(daemon, step)) for step in steps]


def answer(daemon: Oracle, step: Step) -> Reply | list[Reply]:
    match step:
        case Ask(command, arguments):
            return daemon.execute(command, arguments)
        case Until(event, data):
            *passed, last = daemon.events_until(
                lambda found: found["event"] == event and data.items() <= found["data"].items()
            )
            return [*(each for each in passed if not is_short_pause(each)), last]


def is_short_pause(event: Reply) -> bool:
    """Whether a job pauses or goes on: it does so, too, for each change of the graph."""
    return event["event"] == "JOB_STATUS_CHANGE" and event["data"]["status"] in (
        "paused",
        "running",
    )
