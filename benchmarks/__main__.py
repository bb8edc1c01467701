# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The command ``python -m benchmarks``: measure, then print one table."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.backup import BackupError
from benchmarks.fio import FioError
from benchmarks.images import Images, settle
from benchmarks.notes import notes
from benchmarks.peers import USUAL, Peer, ServerError, peers
from benchmarks.rows import MIB, Bench, Group, groups
from benchmarks.table import Line, markdown, number
from tests.interop.qmp_client import QmpError


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured: sizes in MiB, seconds of each timed measurement, rounds."""

    disk_mib: int
    backup_mib: int
    seconds: float
    rounds: int


FULL = Scale(disk_mib=1024, backup_mib=2048, seconds=3.0, rounds=3)
QUICK = Scale(disk_mib=256, backup_mib=512, seconds=1.0, rounds=1)


def main() -> int:
    """Measure what the command line asks for; 1 when a peer could not be measured."""
    arguments = _parser().parse_args()
    scale = QUICK if arguments.quick else FULL
    rounds = arguments.rounds or scale.rounds
    seconds = arguments.seconds or scale.seconds
    with tempfile.TemporaryDirectory(prefix="nbdjobs-bench-", dir=arguments.directory) as name:
        directory = Path(name)
        taking_part = [
            peer for peer in peers(directory) if re.fullmatch(arguments.peers, peer.name)
        ]
        chosen = _choose(arguments.rows)
        _say(f"writing images to {directory}")
        images = Images.create(directory, scale.disk_mib * MIB, scale.backup_mib * MIB)
        bench = Bench(images, directory, seconds)
        run = Run(bench, taking_part, rounds)
        lines = [line for group in chosen for line in run.measure(group)]
        facts = [
            f"rounds: {rounds}, timed measurements: {seconds:g} s",
            f"a disk of {scale.disk_mib} MiB, page-cached; backups of {scale.backup_mib} MiB",
            *run.failures,
        ]
        wanted = [line for line in lines if _matches(arguments.rows, line.row.title)]
        table = markdown(wanted, [peer.name for peer in taking_part])
        report = f"# Benchmarks\n\n{table}\n\n{notes(taking_part, facts, directory)}"
    print(report)
    if arguments.output:
        arguments.output.write_text(report)
    return 1 if run.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small disks, one short round")
    parser.add_argument("--rows", default="", metavar="PATTERN", help="rows whose title matches")
    parser.add_argument("--peers", default=USUAL, metavar="PATTERN", help="peers by whole name")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"instead of {FULL.rounds}")
    parser.add_argument("--seconds", type=float, metavar="S", help=f"instead of {FULL.seconds:g}")
    parser.add_argument(
        "--directory",
        type=Path,
        metavar="DIR",
        help="where images are made, such as /dev/shm; the temporary directory otherwise",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report there, too")
    return parser


def _matches(pattern: str, title: str) -> bool:
    return re.search(pattern, title, re.IGNORECASE) is not None


def _choose(pattern: str) -> list[Group]:
    """Return the groups of which at least one row is wanted."""
    chosen = [
        group for group in groups() if any(_matches(pattern, row.title) for row in group.rows)
    ]
    if not chosen:
        sys.exit(f"no row matches {pattern!r}")
    return chosen


class Run:
    """One run: measures groups of rows, and keeps count of what failed.

    Attributes:
        failures: A sentence for each measurement that could not be made.
    """

    def __init__(self, bench: Bench, taking_part: Sequence[Peer], rounds: int) -> None:
        self._bench = bench
        self._peers = taking_part
        self._rounds = rounds
        self.failures: list[str] = []

    def measure(self, group: Group) -> list[Line]:
        """Let the peers answer in turn, round after round."""
        found: dict[str, dict[str, list[float]]] = {
            row.key: defaultdict(list) for row in group.rows
        }
        able = [peer for peer in self._peers if group.can_take_part(peer)]
        self._bench.images.warm()
        for _ in range(self._rounds):
            for peer in able:
                for key, value in self._turn(group, peer).items():
                    if key in found:
                        found[key][peer.name].append(value)
        return [Line(row, found[row.key]) for row in group.rows]

    def _turn(self, group: Group, peer: Peer) -> dict[str, float]:
        title = group.rows[0].title
        settle()
        try:
            values = group.measure(self._bench, peer)
        except (ServerError, FioError, BackupError, QmpError, OSError) as error:
            self.failures.append(f"failed: {title}, {peer.name}: {error}")
            _say(self.failures[-1])
            return {}
        shown = ", ".join(f"{number(values[row.key])} {row.unit}" for row in group.rows)
        _say(f"{title}, {peer.name}: {shown}")
        return values


def _say(text: str) -> None:
    """Report progress, apart from the report itself."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
