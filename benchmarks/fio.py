# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""fio with its NBD engine as the client: one load on one server, one result."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

#: Seconds until fio, which ends by itself, is taken for hung.
PATIENCE_S: Final = 600.0

#: One seed for all: each peer gets the same offsets in the same order.
SEED: Final = 20240229


@dataclass(frozen=True, slots=True)
class Load:
    """What a client does.

    Attributes:
        pattern: fio's word: randread, randwrite, randrw, read or write.
        block_size: Bytes of one request.
        depth: Requests in flight on each connection.
        connections: Clients at the same time, each with its own connection.
        read_percentage: Share of reads for randrw.
        never_twice: Every block comes at most once, which costs fio a map.
    """

    pattern: str
    block_size: int
    depth: int
    connections: int = 1
    read_percentage: int = 70
    never_twice: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What fio measured, reads and writes together.

    Attributes:
        iops: Requests per second.
        bytes_per_s: Payload per second.
        write_p99_us: 99th percentile of the writes' completion latency in microseconds.
        requests: How many were made in all, those of the warm-up included.
    """

    iops: float
    bytes_per_s: float
    write_p99_us: float
    requests: float


def run_for(load: Load, uri: str, size: int, seconds: float, directory: Path) -> Result:
    """Run a load for a time, after a short warm-up that is not counted.

    Args:
        load: What to do.
        uri: The export.
        size: Bytes of the export that are used, from its start.
        seconds: How long is measured.
        directory: Where fio's files go.
    """
    milliseconds = round(seconds * 1000)
    warm_up = milliseconds // 4
    timing = [f"--runtime={milliseconds}ms", f"--ramp_time={warm_up}ms", "--time_based"]
    result = _run(load, uri, size, timing, directory)
    return replace(result, requests=result.iops * (milliseconds + warm_up) / 1000)


def run_requests(load: Load, uri: str, size: int, requests: int, directory: Path) -> Result:
    """Run a load for a fixed number of requests, so that each peer does the very same work."""
    result = _run(load, uri, size, [f"--io_size={requests * load.block_size}"], directory)
    return replace(result, requests=requests * load.connections)


def _run(load: Load, uri: str, size: int, extent: list[str], directory: Path) -> Result:
    output = directory / "fio.json"
    command = [
        *("fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", f"--rw={load.pattern}"),
        *(f"--bs={load.block_size}", f"--iodepth={load.depth}", f"--numjobs={load.connections}"),
        *(f"--rwmixread={load.read_percentage}", f"--size={size}", f"--randseed={SEED}"),
        # The map of blocks already written costs fio time, and no peer more than another.
        *([] if load.never_twice else ["--norandommap"]),
        *("--group_reporting", *extent),
        *("--output-format=json", f"--output={output}"),
    ]
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
    return _read(output)


def _read(output: Path) -> Result:
    text = output.read_text()
    # Notes of fio's may come before the JSON.
    [job] = json.loads(text[text.index("{") :])["jobs"]
    ways: list[dict[str, Any]] = [job["read"], job["write"]]
    percentiles = job["write"]["clat_ns"].get("percentile", {})
    return Result(
        iops=sum(way["iops"] for way in ways),
        bytes_per_s=sum(way["bw_bytes"] for way in ways),
        write_p99_us=percentiles.get("99.000000", 0) / 1000,
        requests=0,
    )


class FioError(Exception):
    """fio failed; the message is what it said."""
