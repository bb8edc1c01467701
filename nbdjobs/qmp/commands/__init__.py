# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The QMP commands, one module per group; a new group is one line in `GROUPS`."""

from __future__ import annotations

from types import ModuleType
from typing import Final

from nbdjobs.daemon.daemon import BlockWriteThreshold
from nbdjobs.daemon.exports import BlockExportDeleted
from nbdjobs.daemon.run_state import Resume, Stop
from nbdjobs.jobs import events as job_events
from nbdjobs.nodes.device_errors import BlockIoError
from nbdjobs.nodes.qcow2.event import BlockImageCorrupted
from nbdjobs.qmp.commands import (
    backup,
    chains,
    chardevs,
    core,
    create,
    exports,
    graph,
    human_monitor,
    io_throttle,
    jobs,
    latency,
    node_changes,
    nodes,
    objects,
    run_state,
    snapshots,
)
from nbdjobs.qmp.registry import Registry, commands_of

GROUPS: Final[tuple[ModuleType, ...]] = (
    core,
    run_state,
    nodes,
    node_changes,
    latency,
    io_throttle,
    graph,
    exports,
    objects,
    chardevs,
    create,
    snapshots,
    backup,
    chains,
    jobs,
    human_monitor,
)

EVENTS: Final[tuple[type, ...]] = (
    *job_events.EVENTS,
    BlockIoError,
    BlockExportDeleted,
    BlockImageCorrupted,
    BlockWriteThreshold,
    Stop,
    Resume,
)
"""Dataclasses under `@event`, from the modules that emit them."""

REGISTRY: Final = Registry(commands_of(*GROUPS), EVENTS)
