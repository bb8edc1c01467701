# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The rows of the table: what is asked of each peer, and what nbdjobs is to reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks import backup, fio, memory
from benchmarks.images import Images, create_qcow2, disk_size
from benchmarks.peers import Peer, Transport, serving

KIB: Final = 1 << 10
MIB: Final = 1 << 20


class Better(Enum):
    """Which of two values wins."""

    HIGHER = "higher"
    LOWER = "lower"


@dataclass(frozen=True, slots=True)
class Bench:
    """What the measurements share.

    Attributes:
        images: The files that are served.
        directory: Where sockets and small files go.
        seconds: How long each timed measurement lasts.
    """

    images: Images
    directory: Path
    seconds: float


#: Values by column of the row's group; one measurement may answer several rows.
Measure = Callable[[Bench, Peer], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        title: What was asked.
        unit: Of the values, for the reader.
        key: Which value of the group's measurement this row shows.
        better: Which values win.
        target: The least ratio to the best peer; None where nothing is promised.
        limit: The most that nbdjobs' own value may be; None where nothing is promised.
    """

    title: str
    unit: str
    key: str
    better: Better = Better.HIGHER
    target: float | None = 1.0
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that one measurement answers.

    Attributes:
        rows: At least one.
        measure: Makes one measurement on one peer.
        needs_qmp: Only peers with QMP can take part.
        needs_qcow2: Only peers that know the format can.
    """

    rows: tuple[Row, ...]
    measure: Measure
    needs_qmp: bool = False
    needs_qcow2: bool = False

    def can_take_part(self, peer: Peer) -> bool:
        """Whether a peer has what is needed."""
        has_qmp = peer.has_qmp or not self.needs_qmp
        return has_qmp and (peer.knows_qcow2 or not self.needs_qcow2)


@dataclass(frozen=True, slots=True)
class Workload:
    """A load for fio and how it is shown.

    Attributes:
        title: What it is.
        load: What fio does.
        unit: Of the speed.
        target: The least ratio to the best peer.
        shows_cost: Whether a row shows the server's processor time, too: where the client is
            the bound, it tells more than the speed.
    """

    title: str
    load: fio.Load
    unit: str = "IOPS"
    target: float = 1.0
    shows_cost: bool = False


WORKLOADS: Final = (
    Workload("4 KiB random reads, depth 1", fio.Load("randread", 4 * KIB, 1)),
    Workload(
        "4 KiB random reads, depth 16",
        fio.Load("randread", 4 * KIB, 16),
        target=1.5,
        shows_cost=True,
    ),
    Workload("4 KiB random reads, depth 16, 4 connections", fio.Load("randread", 4 * KIB, 16, 4)),
    Workload("4 KiB random writes, depth 1", fio.Load("randwrite", 4 * KIB, 1)),
    Workload("4 KiB random writes, depth 16", fio.Load("randwrite", 4 * KIB, 16)),
    Workload("4 KiB random writes, depth 16, 4 connections", fio.Load("randwrite", 4 * KIB, 16, 4)),
    Workload("4 KiB random 70/30 mix, depth 16", fio.Load("randrw", 4 * KIB, 16)),
    Workload("64 KiB random reads, depth 16", fio.Load("randread", 64 * KIB, 16), "MiB/s"),
    Workload("64 KiB random writes, depth 16", fio.Load("randwrite", 64 * KIB, 16), "MiB/s"),
    Workload("1 MiB sequential reads, depth 4", fio.Load("read", MIB, 4), "MiB/s"),
    Workload("1 MiB sequential writes, depth 4", fio.Load("write", MIB, 4), "MiB/s"),
)


#: On an image in which every cluster is allocated.
QCOW2_WORKLOADS: Final = (
    Workload("4 KiB random reads, depth 16", fio.Load("randread", 4 * KIB, 16)),
    Workload("4 KiB random writes, depth 16", fio.Load("randwrite", 4 * KIB, 16)),
    Workload("1 MiB sequential reads, depth 4", fio.Load("read", MIB, 4), "MiB/s"),
)

#: On an image in which nothing is.
ALLOCATING: Final = fio.Load("randwrite", 64 * KIB, 16, never_twice=True)
ALLOCATED_SIZE: Final = 512 * MIB


def groups() -> Iterator[Group]:
    """Yield everything that can be measured, in the table's order."""
    for transport in Transport:
        for work in WORKLOADS:
            title = f"{transport}: {work.title}"
            rows: tuple[Row, ...] = (Row(title, work.unit, key=work.unit, target=work.target),)
            if work.shows_cost:
                cost = f"{title}, the server's processor time for one"
                rows = (*rows, Row(cost, "µs", "cost", Better.LOWER, target=None))
            yield Group(rows, partial(_serve_load, load=work.load, transport=transport))
    for work in QCOW2_WORKLOADS:
        row = Row(f"qcow2: {work.title}", work.unit, key=work.unit)
        yield Group((row,), partial(_serve_qcow2, load=work.load), needs_qcow2=True)
    row = Row("qcow2: 64 KiB random writes to new clusters, depth 16", "MiB/s", key="MiB/s")
    yield Group((row,), _serve_new_qcow2, needs_qcow2=True)
    for content in ("random", "sparse"):
        rows = (
            Row(f"backup raw to raw, {content} disk, until completed", "MiB/s", key="completed"),
            Row(f"backup raw to raw, {content} disk, until stable", "MiB/s", key="stable"),
        )
        yield Group(rows, partial(_back_up, content=content), needs_qmp=True)
    yield from _backups_to_qcow2()
    yield Group(
        (
            Row("4 KiB random writes during a backup", "IOPS", key="iops", target=1.5),
            Row("4 KiB random writes during a backup, p99", "µs", key="p99", better=Better.LOWER),
        ),
        _write_during_backup,
        needs_qmp=True,
    )
    yield Group(
        (
            Row("first 4 KiB writes to clusters during a backup", "IOPS", key="iops"),
            Row(
                "first 4 KiB writes to clusters during a backup, p99",
                "µs",
                key="p99",
                better=Better.LOWER,
                target=None,
            ),
        ),
        _write_first_during_backup,
        needs_qmp=True,
    )
    for connections, title in ((0, "idle"), (memory.CROWD, f"{memory.CROWD} connections")):
        yield Group(_memory_rows(title), partial(_use_memory, connections=connections))


def _backups_to_qcow2() -> Iterator[Group]:
    rows = (
        Row("backup raw to qcow2, random disk, until completed", "MiB/s", key="completed"),
        Row("backup raw to qcow2, random disk, until stable", "MiB/s", key="stable"),
    )
    yield Group(rows, partial(_back_up, content="random", to_qcow2=True), needs_qmp=True)
    title = "backup raw to qcow2, 64 GiB with 256 MiB of data"
    rows = (
        Row(f"{title}, until completed", "s", key="completed_s", better=Better.LOWER),
        Row(f"{title}, until stable", "s", key="stable_s", better=Better.LOWER),
    )
    yield Group(rows, partial(_back_up, content="empty", to_qcow2=True), needs_qmp=True)


def _memory_rows(title: str) -> tuple[Row, ...]:
    limit = 60.0 if title == "idle" else None
    resident = Row(f"memory, {title}", "MiB RSS", "Rss", Better.LOWER, target=None, limit=limit)
    share = Row(f"memory, {title}, shared pages divided", "MiB PSS", "Pss", Better.LOWER, None)
    return (resident, share)


def _serve_load(
    bench: Bench, peer: Peer, *, load: fio.Load, transport: Transport
) -> dict[str, float]:
    image = bench.images.disk
    with serving(peer, image, transport, bench.directory) as server:
        uri, size = server.address.uri, image.stat().st_size
        before = server.processor_s
        result = fio.run_for(load, uri, size, bench.seconds, bench.directory)
        cost = (server.processor_s - before) / result.requests * 1e6
    return {"IOPS": result.iops, "MiB/s": result.bytes_per_s / MIB, "cost": cost}


def _serve_qcow2(bench: Bench, peer: Peer, *, load: fio.Load) -> dict[str, float]:
    image = bench.images.qcow2
    with serving(peer, image, Transport.UNIX, bench.directory) as server:
        uri, size = server.address.uri, disk_size(image)
        result = fio.run_for(load, uri, size, bench.seconds, bench.directory)
    return {"IOPS": result.iops, "MiB/s": result.bytes_per_s / MIB}


def _serve_new_qcow2(bench: Bench, peer: Peer) -> dict[str, float]:
    image = bench.directory / "new.qcow2"
    create_qcow2(image, ALLOCATED_SIZE)
    requests = ALLOCATED_SIZE // ALLOCATING.block_size
    try:
        with serving(peer, image, Transport.UNIX, bench.directory) as server:
            uri = server.address.uri
            result = fio.run_requests(ALLOCATING, uri, ALLOCATED_SIZE, requests, bench.directory)
    finally:
        image.unlink()
    return {"MiB/s": result.bytes_per_s / MIB}


def _back_up(bench: Bench, peer: Peer, *, content: str, to_qcow2: bool = False) -> dict[str, float]:
    sources = {
        "random": bench.images.random,
        "sparse": bench.images.sparse,
        "empty": bench.images.empty,
    }
    source = sources[content]
    took = backup.duration(peer, source, bench.directory, to_qcow2=to_qcow2)
    size = source.stat().st_size / MIB
    return {
        "completed": size / took.completed_s,
        "stable": size / took.stable_s,
        "completed_s": took.completed_s,
        "stable_s": took.stable_s,
    }


def _write_during_backup(bench: Bench, peer: Peer) -> dict[str, float]:
    result = backup.writes_meanwhile(peer, bench.images.random, bench.directory, bench.seconds)
    return {"iops": result.iops, "p99": result.write_p99_us}


def _write_first_during_backup(bench: Bench, peer: Peer) -> dict[str, float]:
    result = backup.first_writes_meanwhile(peer, bench.images.random, bench.directory)
    return {"iops": result.iops, "p99": result.write_p99_us}


def _use_memory(bench: Bench, peer: Peer, *, connections: int) -> dict[str, float]:
    usage = memory.usage(peer, bench.images.disk, bench.directory, connections)
    return {kind: size / MIB for kind, size in usage.items()}
