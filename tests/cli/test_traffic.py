# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What is shown of exports, worked out of two looks at their counts."""

from __future__ import annotations

from typing import Any

from nbdjobs.cli.traffic import ExportRow, TrafficWatch, counts_by_export

BOUNDARIES = [1000, 2000]


def stats(
    reads: int = 0, writes: int = 0, *, bins: list[int] | None = None, time_ns: int = 0
) -> dict[str, Any]:
    """What is read of a BlockDeviceStats: requests of 512 bytes."""
    histogram = {"boundaries": BOUNDARIES, "bins": bins}
    return {
        "rd_operations": reads,
        "rd_bytes": 512 * reads,
        "rd_total_time_ns": time_ns,
        "wr_operations": writes,
        "wr_bytes": 512 * writes,
        "wr_total_time_ns": 0,
        **({"rd_latency_histogram": histogram, "wr_latency_histogram": histogram} if bins else {}),
    }


def export(**more: object) -> dict[str, Any]:
    return {"id": "e", "type": "nbd", "node-name": "disk", "shutting-down": False, **more}


class Looks:
    """Looks at one export, a second after each other."""

    def __init__(self) -> None:
        self._watch = TrafficWatch()
        self._now = 100.0

    def take(self, entry: dict[str, Any] | None, **more: object) -> ExportRow:
        self._now += 1
        blockstats = [] if entry is None else [{"qdev": "e", "stats": entry}]
        exports = [export(**more)]
        [row] = self._watch.rows(self._now, exports, counts_by_export(exports, blockstats))
        return row


def test_rates_come_from_two_looks() -> None:
    looks = Looks()
    first = looks.take(stats(reads=1000))
    assert (first.read, first.write) == (None, None)
    second = looks.take(stats(reads=1300, writes=2, time_ns=600_000))
    assert second.read is not None
    assert second.write is not None
    assert (second.read.iops, second.read.rate, second.read.average_ns) == (300, 300 * 512, 2000)
    assert (second.write.iops, second.write.rate) == (2, 1024)


def test_rates_are_per_second_however_long_it_took() -> None:
    watch, exports = TrafficWatch(), [export()]
    for now, reads in ((0.0, 0), (4.0, 100)):
        counts = counts_by_export(exports, [{"qdev": "e", "stats": stats(reads)}])
        [row] = watch.rows(now, exports, counts)
    assert row.read is not None
    assert row.read.iops == 25


def test_an_idle_export_has_no_latency() -> None:
    looks = Looks()
    looks.take(stats(reads=5, bins=[5, 0, 0]))
    row = looks.take(stats(reads=5, bins=[5, 0, 0]))
    assert row.read is not None
    assert (row.read.iops, row.read.average_ns, row.read.p50_ns) == (0, None, None)


def test_percentiles_are_those_of_the_requests_in_between() -> None:
    looks = Looks()
    looks.take(stats(reads=100, bins=[100, 0, 0]))
    row = looks.take(stats(reads=200, bins=[100, 100, 0]))
    assert row.read is not None
    assert (row.read.p50_ns, row.read.p99_ns) == (1500, 1990)


def test_without_histograms_there_is_the_average() -> None:
    looks = Looks()
    looks.take(stats())
    row = looks.take(stats(reads=2, time_ns=3000))
    assert row.read is not None
    assert (row.read.average_ns, row.read.p50_ns, row.read.p99_ns) == (1500, None, None)


def test_histograms_that_were_switched_on_meanwhile_count() -> None:
    looks = Looks()
    looks.take(stats(reads=50))
    row = looks.take(stats(reads=60, bins=[10, 0, 0]))
    assert row.read is not None
    assert row.read.p50_ns == 500


def test_another_export_of_that_name_starts_from_nothing() -> None:
    looks = Looks()
    looks.take(stats(reads=50))
    assert looks.take(stats(reads=10)).read is None
    again = looks.take(stats(reads=15)).read
    assert again is not None
    assert again.iops == 5


def test_a_server_without_statistics_has_its_exports_shown() -> None:
    looks = Looks()
    looks.take(None)
    row = looks.take(None)
    assert (row.id, row.node, row.clients, row.read) == ("e", "disk", None, None)


def test_clients_are_told_where_the_server_tells() -> None:
    row = Looks().take(None, **{"x-connections": 3, "shutting-down": True})
    assert (row.clients, row.is_shutting_down) == (3, True)


def test_other_devices_of_the_server_are_no_exports() -> None:
    entries = [
        {"device": "drive0", "qdev": "", "stats": stats(1)},
        {"node-name": "e", "stats": stats(2)},
        {"device": "", "qdev": "e", "stats": stats(3)},
    ]
    found = counts_by_export([export()], entries)
    assert {name: counts.read.operations for name, counts in found.items()} == {"e": 3}


def test_programs_get_numbers() -> None:
    looks = Looks()
    looks.take(stats(bins=[0, 0, 0]))
    row = looks.take(stats(reads=10, bins=[10, 0, 0], time_ns=5004))
    assert row.to_json() == {
        "id": "e",
        "node-name": "disk",
        "clients": None,
        "shutting-down": False,
        "read": {
            "operations-per-second": 10.0,
            "bytes-per-second": 5120,
            "latency-average-ns": 500,
            "latency-p50-ns": 500,
            "latency-p99-ns": 990,
        },
        "write": {
            "operations-per-second": 0.0,
            "bytes-per-second": 0,
            "latency-average-ns": None,
            "latency-p50-ns": 500,
            "latency-p99-ns": 990,
        },
    }
    assert Looks().take(None).to_json()["read"] is None
