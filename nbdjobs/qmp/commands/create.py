# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The commands that make images."""

from __future__ import annotations

from dataclasses import dataclass

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.jobs.create import CreateJob, start_image_job
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
    start_image_job(
        CreateJob, daemon.jobs, arguments.job_id, lambda: create_image(daemon.graph, options)
    )
