# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Commit of the image that clients write: afterwards they write the image below it.

    clients ──▶ mirror_top ──▶ top ──▶ middle ──▶ base       until it is completed
    clients ─────────────────────────────────────▶ base       afterwards

Writes of clients go to the base, too, as soon as it has the rest of the cluster
(`nodes/mirror_top.py`), so the job comes to its end however much is written. When top and base
hold the same, the job is ready. It stays so until a user completes it: in one drained section
clients move to the base. Cancelled when it is ready, it leaves both as they are, with the same
content, and clients on top.

Source: QEMU `block/mirror.c` (commit_active_start); QAPI `block-commit`.
"""

from __future__ import annotations

from nbdjobs.errors import CommandError, JobError, NodeError
from nbdjobs.jobs.collection import Jobs
from nbdjobs.jobs.commit_images import (
    CommitOptions,
    base_needs,
    check_images,
    use_intermediates,
    writable_base,
)
from nbdjobs.jobs.commit_job import ChainCommitJob
from nbdjobs.jobs.events import BlockJobReady
from nbdjobs.jobs.read_only import be_read_only
from nbdjobs.jobs.status import JobStatus
from nbdjobs.jobs.sweep import Piece, job_error
from nbdjobs.nodes import filters, permissions
from nbdjobs.nodes.backing_chain import skip_filters
from nbdjobs.nodes.block_copy import CopyError, choose_cluster_size
from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.error_policy import ErrorAction
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.job_filter import CHILD
from nbdjobs.nodes.mirror_top import MirrorTop
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.permissions import Permission

_ALL_BUT_RESIZE = permissions.ALL & ~Permission.RESIZE
_LONGEST_SCAN = 1 << 30


async def start_active_commit(
    jobs: Jobs, graph: Graph, top: Node, base: Node, options: CommitOptions
) -> ActiveCommitJob:
    """Start to bring the content of `top`, and of what is between, into `base`.

    Raises:
        CommandError: It cannot start; nothing is left behind.
    """
    check_images(top, base)
    async with writable_base(graph, base) as was_read_only, graph.drained(top, base):
        for node in (top, base):
            graph.check_present(node)
        check_images(top, base)
        job = _create(jobs, graph, top, base, options)
        job.was_read_only = was_read_only
        try:
            if base.size < top.size:
                await base.truncate(top.size)
        except BaseException:
            job.undo()
            raise
        jobs.start(job)
    return job


def _create(
    jobs: Jobs, graph: Graph, top: Node, base: Node, options: CommitOptions
) -> ActiveCommitJob:
    """Put the filter in, inside a drained section; the job is not started."""
    jobs.check_id(options.job_id)
    node = MirrorTop(graph.new_name(options.filter_node_name), NodeConfig(can_unmap=True))
    job = ActiveCommitJob(jobs, graph, options, node, top, base)
    jobs.add(job)
    try:
        if options.job.speed:
            job.set_speed(options.job.speed)
        filters.insert(graph, top, node, child=CHILD)
        job.is_filter_in = True
        job.freeze_chain()
        job.use("main node", node, shared=_ALL_BUT_RESIZE)
        job.use("source", top, shared=_ALL_BUT_RESIZE)
        job.use("target", base, needed=base_needs(top, base), shared=_ALL_BUT_RESIZE)
        use_intermediates(job, top, base, with_top=False)
    except BaseException:
        job.undo()
        raise
    node.arm(base, choose_cluster_size(base))
    return job


class ActiveCommitJob(ChainCommitJob):
    """The job."""

    def __init__(
        self,
        jobs: Jobs,
        graph: Graph,
        options: CommitOptions,
        node: MirrorTop,
        top: Node,
        base: Node,
    ):
        super().__init__(jobs, graph, options, node, top, base)
        self._filter = node
        self._copied = 0
        self._has_scanned = False
        self._is_to_pivot = False
        self._is_to_stop = False
        self._has_pivoted = False
        node.on_dirty = self.kick

    @property
    def current_progress(self) -> int:
        """Bytes copied."""
        return self._copied

    @property
    def total_progress(self) -> int:
        """Bytes copied, and those that are left."""
        return self._copied + (self._filter.bytes_to_copy if self._has_scanned else 0)

    # Verbs

    def can_complete(self) -> bool:
        """Move clients to the base."""
        self._is_to_pivot = True
        self.kick()
        return True

    def cancel_gently(self) -> bool:
        """Leave clients where they are, with top and base the same; only when it is ready."""
        if self.status not in (JobStatus.READY, JobStatus.STANDBY):
            return False
        self._is_to_stop = True
        self._is_to_pivot = False
        self.end_pause()
        self.kick()
        return True

    # The work

    async def run(self) -> None:
        """Copy, be ready, and stay in step until told to end."""
        await self._scan()
        while not self.is_cancelled:
            if self._filter.to_copy.any():
                await self.sweep(self._filter.size)
            elif self.should_pause:
                await self.pause_point()
            elif self.status is not JobStatus.READY:
                if await self._flush():
                    self.become_ready()
                    self.emit(BlockJobReady(**self._outcome()))
            elif self._is_to_pivot or self._is_to_stop:
                if await self._flush():
                    return
            else:
                await self.rest()

    async def _scan(self) -> None:
        """Find out what is in step from the beginning."""
        node = self._filter
        position = 0
        while position < node.size and not self.is_cancelled:
            await self.pause_point()
            length = min(node.size - position, _LONGEST_SCAN)
            try:
                position += await node.scan(position, length)
            except NodeError as error:
                if self.handle_error(self._on_error, error, is_read=True) is ErrorAction.REPORT:
                    raise job_error(error) from error
                if not self.should_pause:
                    position += node.unit  # it counts as to be copied
        self._has_scanned = True

    async def _flush(self) -> bool:
        """Bring the base to stable storage; whether that is done, and nothing came meanwhile."""
        try:
            await self._base.flush()
        except NodeError as error:
            if self.handle_error(self._on_error, error, is_read=False) is ErrorAction.REPORT:
                raise job_error(error) from error
            return False
        return not (self._filter.to_copy.any() or self.should_pause or self.is_cancelled)

    async def next_piece(self, offset: int, length: int) -> Piece:
        """Skip what is in step."""
        node = self._filter
        first, last = offset // node.unit, -(-(offset + length) // node.unit)
        found = node.to_copy.find(1, first)
        if found < 0:
            return Piece(node.size, None)
        if found > first:
            return Piece(found * node.unit, None)
        stop = node.to_copy.find(0, first, last)
        end = min((last if stop < 0 else stop) * node.unit, node.size)
        return Piece(end, self._copy(offset, end - offset))

    async def _copy(self, offset: int, length: int) -> None:
        await self._filter.copy(offset, length)
        self._copied += length

    # The end

    async def prepare(self) -> None:
        """Move clients to the base, if that is what the user wants."""
        if not self._is_to_pivot:
            return
        graph = self._graph
        async with graph.node_changes, graph.drained(self._filter, self._base):
            try:
                # What clients have written since, or could not write, is in the base as well.
                await self._filter.copy(0, self._filter.size)
                await self._base.flush()
            except (CopyError, NodeError) as error:
                raise job_error(error) from error
            self.let_go()
            try:
                graph.replace(self._filter, self._base)
            except CommandError as error:
                raise JobError(str(error)) from error
            self.is_filter_in = False
            self._has_pivoted = True
            self.was_read_only = self._top.is_read_only
            await graph.drop(self._filter)

    async def clean(self) -> None:
        """Take the filter out, and let the base be as it is to be."""
        await self._workers.settled()
        self.let_go()
        if self.is_filter_in:
            async with self._graph.drained(self._filter):
                await filters.remove(self._graph, self._filter, child=CHILD)
        if self.was_read_only:
            await be_read_only(self._graph, skip_filters(self._base))
