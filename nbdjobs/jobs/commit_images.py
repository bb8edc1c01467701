# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What both kinds of commit do with the images of a chain: hold on to them, and write the base."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from nbdjobs.errors import CommandError
from nbdjobs.jobs.block_job import BlockJob
from nbdjobs.jobs.job import JobOptions
from nbdjobs.nodes import permissions
from nbdjobs.nodes.backing_chain import backing_of, chain_from, contains, find_overlay
from nbdjobs.nodes.error_policy import OnError
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.op_blockers import BlockOp
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.reopening import set_read_only

_WRITERS: Final = Permission.WRITE | Permission.WRITE_UNCHANGED
BASE_USERS: Final = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitOptions:
    """Arguments of `block-commit` beside the nodes.

    Attributes:
        job_id: Name of the job.
        backing_file: What overlays are to call their new backing file; its file name if None.
        filter_node_name: Name of the filter; None lets the graph choose one.
        on_error: What to do about I/O errors.
        job: Speed, auto-finalize, auto-dismiss.
    """

    job_id: str
    backing_file: str | None = None
    filter_node_name: str | None = None
    on_error: OnError = OnError.REPORT
    job: JobOptions = field(default_factory=JobOptions)


def check_images(top: Node, base: Node) -> None:
    """Refuse images that are busy, or not below each other (any more).

    Raises:
        CommandError: In QEMU's words.
    """
    if not contains(top, base):
        raise CommandError(f"'{base.name}' is not in this backing file chain")
    for node in chain_from(top):
        node.op_blockers.check(BlockOp.COMMIT)
        if node is base:
            break
    if top is base:
        raise CommandError("cannot commit an image into itself")


@asynccontextmanager
async def writable_base(graph: Graph, base: Node) -> AsyncIterator[bool]:
    """While inside, and afterwards unless it fails, the base can be written; keeps others off.

    Gives whether it could not be written before.

    Raises:
        CommandError: It cannot be written.
    """
    was_read_only = base.is_read_only
    async with graph.node_changes:
        if was_read_only:
            await set_read_only(graph, base, is_read_only=False)
        try:
            yield was_read_only
        except BaseException:
            if was_read_only:
                await set_read_only(graph, base, is_read_only=True)
            raise


def use_intermediates(job: BlockJob, top: Node, base: Node, *, with_top: bool) -> None:
    """Hold on to the images between: nobody may read them by themselves from now on.

    Filters on the base show what the base shows; those may be read.
    """
    lowest = find_overlay(top, base)
    assert lowest is not None, "the base is below the top"
    filtered_base = backing_of(lowest)
    shared = _WRITERS
    number = 0
    for node in chain_from(top):
        if node is base:
            return
        if node is filtered_base:
            shared |= Permission.CONSISTENT_READ
        if node is top and not with_top:
            continue
        number += 1
        job.use(
            f"intermediate node {number}" if number > 1 else "intermediate node",
            node,
            shared=shared,
        )


def base_needs(top: Node, base: Node) -> Permission:
    """What a commit needs of the base beside reading it."""
    resize = Permission.RESIZE if base.size < top.size else permissions.NONE
    return Permission.WRITE | resize
