# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""How stops, errors and limits are told."""

from __future__ import annotations

from typing import Any

import pytest

from nbdjobs.cli.client_view import ClientState, ExportState

MIB = 1 << 20


def device(**inserted: Any) -> dict[str, Any]:
    """An entry of query-block for the export `e`."""
    rates = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    return {"device": "", "qdev": "e", "inserted": {"node-name": "disk", **rates, **inserted}}


def told(entry: dict[str, Any]) -> list[str]:
    return [*ClientState.from_qmp(None, [entry]).export("e").describe("e")]


@pytest.mark.parametrize(
    ("status", "remark"),
    [
        ("running", ""),
        ("paused", "clients are stopped"),
        ("io-error", "clients are stopped by an I/O error"),
        ("prelaunch", "clients are not served: prelaunch"),
    ],
)
def test_a_server_is_stopped_or_not(status: str, remark: str) -> None:
    assert ClientState.from_qmp({"status": status, "running": False}, []).describe() == remark


def test_a_server_without_these_commands_has_nothing_to_tell() -> None:
    state = ClientState.from_qmp(None, [])
    assert (state.describe(), state.status) == ("", None)
    assert state.export("e") == ExportState()
    assert told({"device": "drive0", "qdev": "e", "io-status": "failed"}) == []


@pytest.mark.parametrize(
    ("status", "remarks"),
    [
        (None, []),
        ("ok", []),
        ("failed", ["an I/O error has stopped it"]),
        ("nospace", ["no space is left"]),
    ],
)
def test_an_error_that_stops_an_export_is_told(status: str | None, remarks: list[str]) -> None:
    assert told(device() | ({"io-status": status} if status else {})) == remarks


@pytest.mark.parametrize(
    ("limits", "remarks"),
    [
        ({}, []),
        ({"bps": 50 * MIB, "group": "e"}, ["at most 50 MiB/s"]),
        (
            {"bps_rd": MIB, "bps_wr": 2 * MIB, "group": "g"},
            ["at most reads 1.0 MiB/s and writes 2.0 MiB/s in group g"],
        ),
        ({"iops": 12000, "group": "e"}, ["at most 12,000 requests/s"]),
        (
            {"iops_rd": 5, "iops_wr": 7, "iops_size": 4096, "group": "e"},
            ["at most 5 reads/s and 7 writes/s"],
        ),
        (
            {"bps": MIB, "bps_max": 2 * MIB, "bps_max_length": 60, "group": "e"},
            ["at most 1.0 MiB/s (2.0 MiB/s for 1 min 00 s)"],
        ),
    ],
)
def test_limits_are_told(limits: dict[str, Any], remarks: list[str]) -> None:
    assert told(device(**limits)) == remarks
    state = ClientState.from_qmp(None, [device(**limits)]).export("e")
    assert state.limits == limits
