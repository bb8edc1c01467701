# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The short form of `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.busy_server import DEED_NAMES, BusyServer

ROUNDS = 8


@pytest.mark.interop
def test_rounds_leave_nothing_behind(tmp_path: Path) -> None:
    with BusyServer(tmp_path, seed=1) as server:
        for _ in range(ROUNDS):
            server.round()
    assert set(DEED_NAMES) <= server.deeds.keys()
    assert server.deeds["a backup was exact"]
