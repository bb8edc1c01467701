# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The commands that make images, and change them as they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.jobs.create import start_amend_job, start_create_job
from nbdjobs.nodes.amending import (
    BlockdevAmendOptions,
    amend_image,
    find_to_amend,
    hold_image,
)
from nbdjobs.nodes.creation import BlockdevCreateOptions, check_creatable, create_image
from nbdjobs.qmp.registry import command


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockdevCreate:
    """Arguments of blockdev-create."""

    job_id: str
    options: BlockdevCreateOptions


@command("blockdev-create")
def blockdev_create(daemon: Daemon, arguments: BlockdevCreate) -> None:
    """Start a job that makes an image; what is there already is lost."""
    options = arguments.options
    check_creatable(options)
    work = partial(create_image, daemon.graph, options)
    start_create_job(daemon.jobs, arguments.job_id, work)


@dataclass(frozen=True, slots=True, kw_only=True)
class XBlockdevAmend:
    """Arguments of x-blockdev-amend; with `force`, what may lose all data is done as well."""

    job_id: str
    node_name: str
    options: BlockdevAmendOptions
    force: bool | None = None


@command("x-blockdev-amend", features=("unstable",))
def x_blockdev_amend(daemon: Daemon, arguments: XBlockdevAmend) -> None:
    """Start a job that changes the passwords of an encrypted image."""
    graph, options = daemon.graph, arguments.options
    node = find_to_amend(graph, arguments.node_name, options)
    work = partial(amend_image, graph, node, options, is_forced=bool(arguments.force))
    start_amend_job(daemon.jobs, arguments.job_id, work, hold_image(graph, node))
