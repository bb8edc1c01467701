# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Commit of images that nobody writes: their content goes into the image below them.

    active ──▶ commit_top ──▶ top ──▶ middle ──▶ base
       └───────────────────────────────────────────▲      afterwards

While the job copies, whoever reads through the overlay sees the same at any moment: what is new in
the base is hidden below the images that it comes from. When all of it is stable, overlays are told
their new backing file, and then the graph follows. Until then the chain is as it was.

An image that is shorter than its overlay reads as zeroes behind its end. Where the base is longer,
those zeroes are written into it, or the base's old content would come to light.

Source: QEMU `block/commit.c`, `blockdev.c` (qmp_block_commit); QAPI `block-commit`.
"""

from __future__ import annotations

from nbdjobs.errors import CommandError, JobError, NodeError
from nbdjobs.jobs.collection import Jobs
from nbdjobs.jobs.commit_images import (
    BASE_USERS,
    CommitOptions,
    base_needs,
    check_images,
    use_intermediates,
    writable_base,
)
from nbdjobs.jobs.commit_job import ChainCommitJob
from nbdjobs.jobs.read_only import be_read_only
from nbdjobs.jobs.sweep import Piece, job_error
from nbdjobs.nodes import filters
from nbdjobs.nodes.backing_chain import (
    allocated_above,
    find_overlay,
    note_backing,
    skip_filters,
    write_backing,
)
from nbdjobs.nodes.block_copy import CopyError
from nbdjobs.nodes.commit_top import CommitTop
from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.gate import is_zero
from nbdjobs.nodes.graph import Graph, Role
from nbdjobs.nodes.job_filter import CHILD
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.op_blockers import BlockOp
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.reopening import set_read_only


async def start_commit(
    jobs: Jobs, graph: Graph, active: Node, top: Node, base: Node, options: CommitOptions
) -> CommitJob:
    """Start to bring the content of `top`, and of what is between, into `base`.

    Args:
        jobs: Where the job is to be.
        graph: The nodes.
        active: The image that clients write, above `top`.
        top: The uppermost image to commit.
        base: The image to commit to, below `top`.
        options: All else.

    Raises:
        CommandError: It cannot start; nothing is left behind.
    """
    _check(active, top, base)
    async with writable_base(graph, base) as was_read_only, graph.drained(top, base):
        for node in (active, top, base):
            graph.check_present(node)
        _check(active, top, base)
        job = _create(jobs, graph, active, top, base, options)
        job.was_read_only = was_read_only
        try:
            if base.size < top.size:
                await base.truncate(top.size)
        except BaseException:
            job.undo()
            raise
        jobs.start(job)
    return job


def _check(active: Node, top: Node, base: Node) -> None:
    check_images(top, base)
    overlay = find_overlay(active, top)
    if overlay is None:
        raise CommandError(f"'{top.name}' is not in this backing file chain")
    overlay.op_blockers.check(BlockOp.COMMIT)


def _create(
    jobs: Jobs, graph: Graph, active: Node, top: Node, base: Node, options: CommitOptions
) -> CommitJob:
    """Put the filter in, inside a drained section; the job is not started."""
    jobs.check_id(options.job_id)
    overlay = find_overlay(active, top)
    assert overlay is not None
    config = NodeConfig(is_read_only=True)
    node = CommitTop(graph.new_name(options.filter_node_name), config)
    job = CommitJob(jobs, graph, options, node, top, base)
    jobs.add(job)
    try:
        if options.job.speed:
            job.set_speed(options.job.speed)
        filters.insert(graph, top, node, child=CHILD)
        job.is_filter_in = True
        job.freeze_chain()
        job.use("main node", active)
        use_intermediates(job, top, base, with_top=True)
        needed = Permission.CONSISTENT_READ | base_needs(top, base)
        job.use("base", base, needed=needed, shared=BASE_USERS)
    except BaseException:
        job.undo()
        raise
    job.shown_size = overlay.size
    return job


class CommitJob(ChainCommitJob):
    """The job.

    Attributes:
        shown_size: Bytes of the disk that overlays of the images show.
    """

    shown_size = 0

    def __init__(
        self,
        jobs: Jobs,
        graph: Graph,
        options: CommitOptions,
        node: CommitTop,
        top: Node,
        base: Node,
    ):
        super().__init__(jobs, graph, options, node, top, base)
        self._backing_file = options.backing_file
        self._filter = node

    # The work

    async def run(self) -> None:
        """Copy everything."""
        await self.sweep(max(self._top.size, min(self._base.size, self.shown_size)))

    async def next_piece(self, offset: int, length: int) -> Piece:
        """Skip what comes from the base."""
        end = self._top.size
        if offset >= end:
            return Piece(offset + length, self._zero(offset, length))
        length = min(length, end - offset)
        is_wanted, length = await allocated_above(self._top, self._base, offset, length)
        return Piece(offset + length, self._copy(offset, length) if is_wanted else None)

    async def _copy(self, offset: int, length: int) -> None:
        data = memoryview(bytearray(length))
        try:
            await self._top.pread(offset, data)
        except NodeError as error:
            raise CopyError(error, is_read=True) from error
        if is_zero(data):
            await self._zero(offset, length)
            return
        try:
            await self._base.pwrite(offset, data)
        except NodeError as error:
            raise CopyError(error, is_read=False) from error

    async def _zero(self, offset: int, length: int) -> None:
        try:
            await self._base.pwrite_zeroes(offset, length)
        except NodeError as error:
            raise CopyError(error, is_read=False) from error

    # The end

    async def prepare(self) -> None:
        """Give all overlays their new backing file, and then their new backing node."""
        graph = self._graph
        async with graph.node_changes, graph.drained(self._filter, self._base):
            try:
                await self._base.flush()
                overlays = [
                    edge.parent
                    for edge in self._filter.parents
                    if edge.role is Role.BACKING and isinstance(edge.parent, Node)
                ]
                for overlay in overlays:
                    await self._tell(overlay)
            except NodeError as error:
                raise job_error(error) from error
            except CommandError as error:
                raise JobError(str(error)) from error
            self.let_go()
            try:
                graph.replace(self._filter, self._base)
            except CommandError as error:
                raise JobError(str(error)) from error
            for overlay in overlays:
                note_backing(overlay, self._base)
            self.is_filter_in = False
            await graph.drop(self._filter)

    async def _tell(self, overlay: Node) -> None:
        """Write the new backing file into an overlay, which may be an image that is only read."""
        was_read_only = overlay.is_read_only
        if was_read_only:
            await set_read_only(self._graph, overlay, is_read_only=False)
        try:
            await write_backing(overlay, self._backing_file, self._base)
        finally:
            if was_read_only:
                await set_read_only(self._graph, overlay, is_read_only=True)

    async def clean(self) -> None:
        """Take the filter out, and let the base be as it was to its users."""
        await self._workers.settled()
        self.let_go()
        if self.is_filter_in:
            async with self._graph.drained(self._filter):
                await filters.remove(self._graph, self._filter, child=CHILD)
        if self.was_read_only:
            await be_read_only(self._graph, skip_filters(self._base))
