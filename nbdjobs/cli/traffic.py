# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What clients did to the exports of a server between two looks at it. Pure: time is an argument.

A server counts requests, bytes and the time they took, per export. A server that does not, such as
the real qemu-storage-daemon, still has its exports shown, without numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from nbdjobs.cli.histogram import Histogram

#: What an entry of `query-blockstats` may call the export that it is about.
_NAMES: Final = ("qdev", "device")


@dataclass(frozen=True, slots=True)
class Count:
    """What was done of one kind of request since the export was made.

    Attributes:
        operations: Requests.
        length: Bytes.
        time_ns: Time that they took, added up.
        histogram: How long each took; None if the server does not keep that.
    """

    operations: int
    length: int
    time_ns: int
    histogram: Histogram | None


@dataclass(frozen=True, slots=True)
class Counts:
    """What was done to an export."""

    read: Count
    write: Count

    @classmethod
    def from_qmp(cls, stats: Mapping[str, Any]) -> Counts:
        """Read a QAPI `BlockDeviceStats`."""
        return cls(_count(stats, "rd"), _count(stats, "wr"))

    @property
    def has_histograms(self) -> bool:
        """Whether the server keeps any: then somebody has chosen which."""
        return self.read.histogram is not None or self.write.histogram is not None


def _count(stats: Mapping[str, Any], kind: str) -> Count:
    return Count(
        operations=stats[f"{kind}_operations"],
        length=stats[f"{kind}_bytes"],
        time_ns=stats[f"{kind}_total_time_ns"],
        histogram=Histogram.from_qmp(stats.get(f"{kind}_latency_histogram")),
    )


def counts_by_export(
    exports: Iterable[Mapping[str, Any]], blockstats: Iterable[Mapping[str, Any]]
) -> dict[str, Counts]:
    """Find the statistics of exports.

    Args:
        exports: Answer of `query-block-exports`.
        blockstats: Answer of `query-blockstats`, where other devices may be too.
    """
    ids = {export["id"] for export in exports}
    named = {entry[key]: entry for entry in blockstats for key in _NAMES if entry.get(key)}
    return {name: Counts.from_qmp(entry["stats"]) for name, entry in named.items() if name in ids}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """One kind of request, lately.

    Attributes:
        iops: Requests per second.
        rate: Bytes per second.
        average_ns: How long one took on average; None if there was none.
        p50_ns: How long the faster half took at most; None if that is not known.
        p99_ns: How long all but a hundredth took at most; likewise.
    """

    iops: float
    rate: float
    average_ns: float | None
    p50_ns: float | None
    p99_ns: float | None

    def to_json(self) -> dict[str, object]:
        """The flow for programs; latencies in nanoseconds."""
        return {
            "operations-per-second": round(self.iops, 1),
            "bytes-per-second": round(self.rate),
            "latency-average-ns": _rounded(self.average_ns),
            "latency-p50-ns": _rounded(self.p50_ns),
            "latency-p99-ns": _rounded(self.p99_ns),
        }


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRow:
    """An export with what its clients do.

    Attributes:
        id: Its name.
        node: The node that it shows.
        clients: Connections to it; None if the server does not tell.
        is_shutting_down: It ends with its last client.
        read: Reads lately; None while that is not known.
        write: Writes lately; likewise.
    """

    id: str
    node: str
    clients: int | None
    is_shutting_down: bool
    read: Flow | None
    write: Flow | None

    def to_json(self) -> dict[str, object]:
        """The row for programs."""
        return {
            "id": self.id,
            "node-name": self.node,
            "clients": self.clients,
            "shutting-down": self.is_shutting_down,
            "read": None if self.read is None else self.read.to_json(),
            "write": None if self.write is None else self.write.to_json(),
        }


class TrafficWatch:
    """Remembers the last look, and so knows what happened since."""

    def __init__(self) -> None:
        self._at = 0.0
        self._counts: Mapping[str, Counts] = {}

    def rows(
        self, now: float, exports: Sequence[Mapping[str, Any]], counts: Mapping[str, Counts]
    ) -> list[ExportRow]:
        """Take one look.

        Args:
            now: Seconds on any clock that never goes back.
            exports: Answer of `query-block-exports`.
            counts: The statistics that there are, by export.
        """
        seconds = now - self._at
        rows = [_row(export, self._counts, counts, seconds) for export in exports]
        self._at, self._counts = now, counts
        return rows


def _row(
    export: Mapping[str, Any],
    earlier: Mapping[str, Counts],
    later: Mapping[str, Counts],
    seconds: float,
) -> ExportRow:
    then, now = earlier.get(export["id"]), later.get(export["id"])
    read = write = None
    if then is not None and now is not None:
        read = _flow(then.read, now.read, seconds)
        write = _flow(then.write, now.write, seconds)
    return ExportRow(
        id=export["id"],
        node=export["node-name"],
        clients=export.get("x-connections"),
        is_shutting_down=export["shutting-down"],
        read=read,
        write=write,
    )


def _flow(then: Count, now: Count, seconds: float) -> Flow | None:
    """What happened between two looks; None if another export of that name is there by now."""
    operations, length = now.operations - then.operations, now.length - then.length
    if seconds <= 0 or operations < 0 or length < 0:
        return None
    latencies = None if now.histogram is None else now.histogram.since(then.histogram)
    return Flow(
        iops=operations / seconds,
        rate=length / seconds,
        average_ns=(now.time_ns - then.time_ns) / operations if operations else None,
        p50_ns=None if latencies is None else latencies.percentile(0.50),
        p99_ns=None if latencies is None else latencies.percentile(0.99),
    )
