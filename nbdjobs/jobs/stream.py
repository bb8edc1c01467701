# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Stream: an overlay gets what it has from images below, so that it needs them no more.

    clients ──▶ copy-on-read ──▶ overlay ──▶ middle ──▶ base
                    ▲ job           └──────────────────▶ base     afterwards

The job has every cluster copied that comes from between overlay and base, by the filter that
clients' requests come through as well (`nodes/copy_on_read.py`): so nothing that a client has
written is overwritten. When all is copied and stable, the image is told its new backing file, and
then the graph follows. Until then, whatever happens, the chain is as it was and shows the same.

Source: QEMU `block/stream.c`, `blockdev.c` (qmp_block_stream); QAPI `block-stream`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nbdjobs.errors import CommandError, JobError, NodeError
from nbdjobs.jobs.collection import Jobs
from nbdjobs.jobs.job import JobOptions
from nbdjobs.jobs.read_only import be_read_only
from nbdjobs.jobs.status import JobType
from nbdjobs.jobs.sweep import Piece, SweepJob, job_error
from nbdjobs.nodes import filters, permissions
from nbdjobs.nodes.backing_chain import (
    backing_of,
    chain_from,
    contains,
    find_overlay,
    set_backing,
    skip_filters,
    write_backing,
)
from nbdjobs.nodes.block_copy import CopyError
from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.copy_on_read import CopyOnRead
from nbdjobs.nodes.error_policy import OnError
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.op_blockers import BlockOp
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.reopening import set_read_only

_READERS = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED
"""What others may do with the images that the job reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """Arguments of `block-stream` beside the nodes.

    Attributes:
        job_id: Name of the job.
        backing_file: What the image is to call its new backing file; its file name if None.
        filter_node_name: Name of the filter; None lets the graph choose one.
        on_error: What to do about I/O errors.
        job: Speed, auto-finalize, auto-dismiss.
    """

    job_id: str
    backing_file: str | None = None
    filter_node_name: str | None = None
    on_error: OnError = OnError.REPORT
    job: JobOptions = field(default_factory=JobOptions)


async def start_stream(
    jobs: Jobs,
    graph: Graph,
    top: Node,
    base: Node | None,
    bottom: Node | None,
    options: StreamOptions,
) -> StreamJob:
    """Start to copy what `top` has from above `base`, or from down to `bottom`.

    Args:
        jobs: Where the job is to be.
        graph: The nodes.
        top: The image to stream to, or a filter on it.
        base: What is to be its backing node afterwards; None for none, or if `bottom` is given.
        bottom: The last image to copy from.
        options: All else.

    Raises:
        CommandError: It cannot start; nothing is left behind.
    """
    _check_free(top, base, bottom)
    was_read_only = top.is_read_only
    async with graph.node_changes:
        if was_read_only:
            await set_read_only(graph, top, is_read_only=False)
        try:
            async with graph.drained(top):
                for node in (top, base, bottom):
                    if node is not None:
                        graph.check_present(node)
                _check_free(top, base, bottom)
                job = _create(jobs, graph, top, base, bottom, options)
                job.was_read_only = was_read_only
                jobs.start(job)
        except BaseException:
            if was_read_only:
                await set_read_only(graph, top, is_read_only=True)
            raise
    return job


def _check_free(top: Node, base: Node | None, bottom: Node | None) -> None:
    """Refuse to touch nodes that are busy, or that are not below each other any more."""
    if base is not None and not contains(top, base):
        raise CommandError(f"Node '{base.name}' is not a backing image of '{top.name}'")
    if bottom is not None and not contains(top, bottom):
        raise CommandError(f"Node '{bottom.name}' is not in a chain starting from '{top.name}'")
    for node in chain_from(top):
        if node is base:
            return
        node.op_blockers.check(BlockOp.STREAM)
        if node is bottom:
            return


def _create(
    jobs: Jobs,
    graph: Graph,
    top: Node,
    base: Node | None,
    bottom: Node | None,
    options: StreamOptions,
) -> StreamJob:
    """Put the filter in, inside a drained section of `top`; the job is not started."""
    lowest = bottom if bottom is not None else find_overlay(top, base)
    if lowest is None:
        assert base is not None, "the last image of a chain has nothing below it"
        raise CommandError(f"'{base.name}' is not in the backing chain of '{top.name}'")
    node = _insert_filter(graph, top, lowest, options)
    job = None
    try:
        jobs.check_id(options.job_id)
        job = StreamJob(jobs, graph, options, node, lowest)
        jobs.add(job)
        job.use("main node", node, needed=Permission.CONSISTENT_READ, shared=_READERS_AND_WRITERS)
        job.use("active node", top, shared=_READERS_AND_WRITERS)
        for number, image in enumerate(_between(top, lowest)):
            name = "intermediate node" if not number else f"intermediate node {number + 1}"
            job.use(name, image, shared=_READERS)
        if options.job.speed:
            job.set_speed(options.job.speed)
    except BaseException:
        if job is not None:
            job.let_go()
            job.never_started()
        node.disarm()
        filters.take_back(graph, node)
        raise
    return job


_READERS_AND_WRITERS = permissions.ALL & ~Permission.RESIZE


def _between(top: Node, lowest: Node) -> list[Node]:
    """The nodes below `top` down to `lowest`, which go out of the chain."""
    found = []
    for node in list(chain_from(top))[1:]:
        if node is backing_of(lowest):
            break
        found.append(node)
    return found


def _insert_filter(graph: Graph, top: Node, lowest: Node, options: StreamOptions) -> CopyOnRead:
    try:
        name = graph.new_name(options.filter_node_name)
    except CommandError as error:
        raise CommandError(f"Could not create node: {error}") from error
    node = CopyOnRead(name, NodeConfig(can_unmap=True), lowest)
    filters.insert(graph, top, node)
    try:
        node.arm()
    except CommandError:
        filters.take_back(graph, node)
        raise
    return node


class StreamJob(SweepJob):
    """The job.

    Attributes:
        was_read_only: The image was not to be written before, and will not be after it.
    """

    type = JobType.STREAM
    skips_errors = True
    was_read_only = False

    def __init__(
        self, jobs: Jobs, graph: Graph, options: StreamOptions, node: CopyOnRead, lowest: Node
    ):
        super().__init__(jobs, graph, options.job_id, options.job, options.on_error)
        self._backing_file = options.backing_file
        self._filter: CopyOnRead | None = node
        self._below_filter = node.edges["file"].node
        self._image = skip_filters(node)
        self._lowest = lowest

    # The work

    async def run(self) -> None:
        """Have everything copied."""
        if self._image is self._lowest:
            return  # there is nothing in between
        await self.sweep(self._image.size)
        if self.skipped is not None and not self.is_cancelled:
            raise job_error(self.skipped)

    async def next_piece(self, offset: int, length: int) -> Piece:
        """Skip what the image has itself, and what comes from further below."""
        assert self._filter is not None
        is_wanted, length = await self._filter.comes_from_below(offset, length)
        return Piece(offset + length, self._copy(offset, length) if is_wanted else None)

    async def _copy(self, offset: int, length: int) -> None:
        assert self._filter is not None
        try:
            await self._filter.copy(offset, length)
        except NodeError as error:
            raise CopyError(error, is_read=True) from error

    # The end

    async def prepare(self) -> None:
        """Give the image its new backing file, and the node its new backing node."""
        if backing_of(self._image) is None:
            return
        async with self._graph.node_changes, self._graph.drained(self._below_filter):
            await self._remove_filter()
            base = backing_of(self._lowest)
            try:
                await write_backing(self._image, self._backing_file, base)
            except NodeError as error:
                raise job_error(error) from error
            self.let_go()
            try:
                before = set_backing(self._graph, self._image, base)
            except CommandError as error:
                raise JobError(str(error)) from error
        if before is not None:
            await self._graph.drop_if_unused(before)

    async def clean(self) -> None:
        """Take the filter out, and let the image be as it was to its users."""
        await self._workers.settled()
        self.let_go()
        if self._filter is not None:
            async with self._graph.drained(self._filter):
                await self._remove_filter()
        if self.was_read_only:
            await be_read_only(self._graph, self._below_filter)

    async def _remove_filter(self) -> None:
        node, self._filter = self._filter, None
        if node is not None:
            for edge in [edge for edge in self.edges.values() if edge.node is node]:
                edge.node.op_blockers.remove(self._blocks)
                self._graph.detach(edge)
            await filters.remove(self._graph, node)
