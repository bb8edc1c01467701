# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A client that comes while the command line is being worked through sees all of it done."""

from __future__ import annotations

from tests.interop.conftest import StartDaemon


def test_an_early_monitor_client_finds_everything_set_up(start_daemon: StartDaemon) -> None:
    nodes = [f"node{number}" for number in range(40)]
    # The monitor's option comes before these, and the client connects as soon as it listens.
    daemon = start_daemon(*(f"--blockdev=null-co,node-name={name}" for name in nodes))
    found = {each["node-name"] for each in daemon.qmp.execute("query-named-block-nodes")}
    assert found == set(nodes)
