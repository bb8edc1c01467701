# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What a greedy client leaves to modest ones.

    python -m benchmarks.fairness

One client keeps a thousand large requests in flight, three ask for 4 KiB at a time and wait for
the answer. Each server is measured with the modest clients alone, and then beside the greedy one.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.fio import PATIENCE_S, SEED, FioError
from benchmarks.images import Images, settle
from benchmarks.peers import Peer, ServerError, Transport, peers, serving

KIB: Final = 1 << 10
MIB: Final = 1 << 20

DISK_MIB: Final = 512
MODEST: Final = ("--rw=randread", f"--bs={4 * KIB}", "--iodepth=1")
MODEST_CLIENTS: Final = 3
DEPTH: Final = 1000


@dataclass(frozen=True, slots=True)
class Greed:
    """What the greedy client does."""

    title: str
    pattern: str
    block_size: int

    @property
    def options(self) -> tuple[str, ...]:
        return (f"--rw={self.pattern}", f"--bs={self.block_size}", f"--iodepth={DEPTH}")


GREED: Final = (
    Greed("4 KiB reads", "randread", 4 * KIB),
    Greed("64 KiB reads", "randread", 64 * KIB),
    Greed("1 MiB reads", "randread", MIB),
    Greed("4 KiB writes", "randwrite", 4 * KIB),
    Greed("64 KiB writes", "randwrite", 64 * KIB),
    Greed("1 MiB writes", "randwrite", MIB),
)


@dataclass(frozen=True, slots=True)
class Shares:
    """What each client got.

    Attributes:
        greedy: Bytes per second of the greedy client; 0 without one.
        modest: Requests per second of each modest client.
    """

    greedy: float
    modest: Sequence[float]


def measure(
    peer: Peer, image: Path, greed: Greed | None, seconds: float, directory: Path
) -> Shares:
    """Let the clients work beside each other, for some seconds after a short warm-up."""
    milliseconds = round(seconds * 1000)
    settle()
    with serving(peer, image, Transport.UNIX, directory) as server:
        common = (
            *("fio", "--ioengine=nbd", f"--uri={server.address.uri}", f"--size={DISK_MIB * MIB}"),
            *(f"--runtime={milliseconds}ms", f"--ramp_time={milliseconds // 4}ms", "--time_based"),
            *(f"--randseed={SEED}", "--norandommap", "--output-format=json"),
        )
        jobs = [("--name=greedy", *greed.options)] if greed is not None else []
        jobs += [(f"--name=modest{number}", *MODEST) for number in range(MODEST_CLIENTS)]
        return _run([*common, *(option for job in jobs for option in job)], directory)


def _run(command: Sequence[str], directory: Path) -> Shares:
    finished = subprocess.run(
        command,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    if finished.returncode != 0:
        raise FioError((finished.stderr or finished.stdout).strip())
    found: list[dict[str, Any]] = json.loads(finished.stdout[finished.stdout.index("{") :])["jobs"]
    greedy = [job for job in found if job["jobname"] == "greedy"]
    return Shares(
        greedy=sum(job[way]["bw_bytes"] for job in greedy for way in ("read", "write")),
        modest=[job["read"]["iops"] for job in found if job not in greedy],
    )


def line(peer: Peer, greed: Greed, alone: Sequence[Shares], beside: Sequence[Shares]) -> str:
    """Word the medians of some rounds as a row of a table.

    A modest client's share is what it gets beside the greedy one, as a part of what it gets
    without; the last two columns are those of the client that got least and of the one that
    got most.
    """
    without = median(rate for shares in alone for rate in shares.modest)
    least = median(min(shares.modest) for shares in beside)
    most = median(max(shares.modest) for shares in beside)
    greedy = median(shares.greedy for shares in beside)
    return (
        f"| {greed.title} | {peer.name} | {greedy / MIB:,.0f} | {without:,.0f} "
        f"| {least:,.0f} to {most:,.0f} | {least / without:.1%} to {most / without:.1%} |"
    )


HEADING: Final = """\
| greedy client | server | greedy, MiB/s | modest alone, IOPS | modest beside it, IOPS | share |
| --- | --- | ---: | ---: | ---: | ---: |"""


def main() -> int:
    """Print one table; 1 when a server could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fairness", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="per measurement")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of which the median")
    parser.add_argument("--greed", default="", metavar="PATTERN", help="greedy clients by title")
    parser.add_argument(
        "--peers", default="nbdjobs|qemu-nbd.*|nbdkit", metavar="PATTERN", help="by whole name"
    )
    arguments = parser.parse_args()
    failures = 0
    print(HEADING)
    with tempfile.TemporaryDirectory(prefix="nbdjobs-bench-") as name:
        directory = Path(name)
        taking_part = [p for p in peers(directory) if re.fullmatch(arguments.peers, p.name)]
        images = Images.create(directory, DISK_MIB * MIB, 0)
        images.warm()
        for greed in GREED:
            if not re.search(arguments.greed, greed.title):
                continue
            for peer in taking_part:
                try:
                    rounds = [
                        [
                            measure(peer, images.disk, company, arguments.seconds, directory)
                            for company in (None, greed)
                        ]
                        for _ in range(arguments.rounds)
                    ]
                except (ServerError, FioError, OSError) as error:
                    print(f"failed: {greed.title}, {peer.name}: {error}", file=sys.stderr)
                    failures += 1
                else:
                    alone, beside = zip(*rounds, strict=True)
                    print(line(peer, greed, alone, beside), flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
