# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The `info` commands of the human monitor: what QMP's queries answer, as texts."""

from __future__ import annotations

from collections.abc import Mapping

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.daemon.run_state import RunState
from nbdjobs.qmp.commands.human.texts import device_text, job_text, node_text, stats_text
from nbdjobs.qmp.commands.jobs import query_block_jobs
from nbdjobs.qmp.commands.nodes import (
    QueryBlockstats,
    QueryNamedBlockNodes,
    query_block,
    query_blockstats,
    query_named_block_nodes,
)
from nbdjobs.qmp.commands.run_state import query_status


async def info_block(daemon: Daemon, arguments: Mapping[str, str]) -> str:
    """Show devices, or nodes with `-n`, or whatever has the name given."""
    name, is_verbose = arguments.get("device"), "v" in arguments
    devices = [] if "n" in arguments else query_block(daemon)
    texts = [
        # As in QEMU: a blank line between, even if nothing of what is before is shown.
        ("\n" if place else "") + device_text(info, is_verbose=is_verbose)
        for place, info in enumerate(devices)
        if name in (None, info.device)
    ]
    if texts or (name is None and "n" not in arguments):
        return "".join(texts)
    nodes = query_named_block_nodes(daemon, QueryNamedBlockNodes())
    return "".join(
        ("\n" if place else "") + node_text(info, is_verbose=is_verbose)
        for place, info in enumerate(nodes)
        if name in (None, info.node_name)
    )


async def info_blockstats(daemon: Daemon, arguments: Mapping[str, str]) -> str:
    """Show what was done to each device."""
    return "".join(stats_text(stats) for stats in query_blockstats(daemon, QueryBlockstats()))


async def info_block_jobs(daemon: Daemon, arguments: Mapping[str, str]) -> str:
    """Show how far jobs are."""
    return "".join(job_text(info) for info in query_block_jobs(daemon)) or "No active jobs\n"


async def info_status(daemon: Daemon, arguments: Mapping[str, str]) -> str:
    """Show whether clients are served."""
    info = query_status(daemon)
    if info.running:
        return "VM status: running\n"
    reason = "" if info.status is RunState.PAUSED else f" ({info.status})"
    return f"VM status: paused{reason}\n"
