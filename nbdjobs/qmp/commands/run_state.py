# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Commands that hold the requests of clients and let them go on.

Source: QEMU qapi/run-state.json and qapi/misc.json.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.daemon.run_state import RunState
from nbdjobs.qmp.registry import command


@command("stop")
async def stop(daemon: Daemon) -> None:
    """Hold the requests of clients; what they wrote is stable when the answer comes."""
    await daemon.run.stop()


@command("cont")
def cont(daemon: Daemon) -> None:
    """Let the requests of clients go on, those that an error has stopped included."""
    daemon.cont()


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusInfo:
    """Whether clients are served.

    Attributes:
        running: Whether their requests go on.
        singlestep: About emulation, so never; in QEMU until 9.0.
        status: If not, why.
    """

    running: bool
    singlestep: bool
    status: RunState


@command("query-status")
def query_status(daemon: Daemon) -> StatusInfo:
    """Whether clients are served."""
    return StatusInfo(running=daemon.run.is_running, singlestep=False, status=daemon.run.state)
