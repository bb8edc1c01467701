# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What keeps a server's clients waiting, in words: a stop, an I/O error, limits. Pure.

A server without these, such as qemu-storage-daemon, says nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from nbdjobs.cli.units import format_rate, format_seconds

_RUNNING: Final = "running"
_STOPPED: Final = {
    "paused": "clients are stopped",
    "io-error": "clients are stopped by an I/O error",
}
_IO_STATUS: Final = {"failed": "an I/O error has stopped it", "nospace": "no space is left"}

#: The limits by their names in QMP, and how their numbers are told.
_LIMITS: Final[Mapping[str, Callable[[Any], str]]] = {
    "bps": format_rate,
    "bps_rd": lambda rate: f"reads {format_rate(rate)}",
    "bps_wr": lambda rate: f"writes {format_rate(rate)}",
    "iops": lambda rate: f"{rate:,} requests/s",
    "iops_rd": lambda rate: f"{rate:,} reads/s",
    "iops_wr": lambda rate: f"{rate:,} writes/s",
}


@dataclass(frozen=True, slots=True)
class ExportState:
    """What holds up the clients of one export.

    Attributes:
        io_status: As in `query-block`; None where errors do not stop it.
        limits: Those that there are, by their names in `query-block`, with `group`.
    """

    io_status: str | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)

    def describe(self, export_id: str) -> Iterator[str]:
        """Remarks for people; none if nothing is special."""
        if self.io_status in _IO_STATUS:
            yield _IO_STATUS[self.io_status]
        parts = [self._limit(name) for name in _LIMITS if self.limits.get(name)]
        if parts:
            group = self.limits["group"]
            where = "" if group == export_id else f" in group {group}"
            yield f"at most {' and '.join(parts)}{where}"

    def _limit(self, name: str) -> str:
        told = _LIMITS[name](self.limits[name])
        burst = self.limits.get(f"{name}_max")
        if burst is None:
            return told
        length = format_seconds(self.limits[f"{name}_max_length"])
        return f"{told} ({_LIMITS[name](burst)} for {length})"


@dataclass(frozen=True, slots=True)
class ClientState:
    """What holds up the clients of a server.

    Attributes:
        status: As in `query-status`; None if the server has no such command.
        exports: By their ids; those that are not there have nothing special.
    """

    status: str | None = None
    exports: Mapping[str, ExportState] = field(default_factory=dict)

    @classmethod
    def from_qmp(
        cls, status: Mapping[str, Any] | None, devices: Iterable[Mapping[str, Any]]
    ) -> Self:
        """Read the answers of `query-status`, None without one, and `query-block`."""
        return cls(
            None if status is None else status["status"],
            {
                device["qdev"]: _export_state(device)
                for device in devices
                if not device["device"] and "qdev" in device
            },
        )

    def describe(self) -> str:
        """A remark for people, or "" while clients are served."""
        if self.status in (None, _RUNNING):
            return ""
        return _STOPPED.get(str(self.status), f"clients are not served: {self.status}")

    def export(self, export_id: str) -> ExportState:
        """What holds up the clients of one export."""
        return self.exports.get(export_id, ExportState())


def _export_state(device: Mapping[str, Any]) -> ExportState:
    inserted = device.get("inserted", {})
    names = [f"{name}{suffix}" for name in _LIMITS for suffix in ("", "_max", "_max_length")]
    limits = {name: inserted[name] for name in (*names, "iops_size") if inserted.get(name)}
    group = {"group": inserted["group"]} if "group" in inserted else {}
    return ExportState(device.get("io-status"), limits | group)
