# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Block jobs: jobs that work on nodes.

A block job is a root of the block graph: it holds edges to its nodes, rules out commands that
would disturb it, and pauses while the graph changes around it.

Source: QEMU `blockjob.c`; QAPI `block-core.json` (BLOCK_JOB_* events, `BlockdevOnError`).
"""

from __future__ import annotations

from nbdjobs.errors import CommandError, ErrorClass, NodeError
from nbdjobs.jobs.collection import Jobs
from nbdjobs.jobs.events import (
    BlockJobCancelled,
    BlockJobCompleted,
    BlockJobError,
    BlockJobPending,
    Outcome,
)
from nbdjobs.jobs.job import Job, JobOptions
from nbdjobs.jobs.transaction import Transaction
from nbdjobs.nodes import permissions
from nbdjobs.nodes.error_policy import (
    ErrorAction,
    IoOperation,
    IoStatus,
    OnError,
    choose_action,
)
from nbdjobs.nodes.graph import Graph, Role, Root
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.permissions import Permission


def find_block_job(jobs: Jobs, job_id: str) -> BlockJob:
    """The job for the `block-job-*` commands; `CommandError` if there is none."""
    job = jobs.find(job_id)
    if not isinstance(job, BlockJob):
        raise CommandError(f"Block job '{job_id}' not found", ErrorClass.DEVICE_NOT_ACTIVE)
    return job


class BlockJob(Job, Root):
    """A job with nodes."""

    works_by_itself = True

    def __init__(
        self,
        jobs: Jobs,
        graph: Graph,
        job_id: str,
        options: JobOptions,
        transaction: Transaction | None = None,
    ):
        super().__init__(jobs, job_id, options, transaction)
        self._graph = graph
        self._io_status = IoStatus.OK
        self._blocks = f"block device is in use by block job: {self.type}"

    # As a root of the graph

    def describe(self) -> str:
        """What error messages call it."""
        return f"block job '{self.id}'"

    def hold(self) -> None:
        """Pause on behalf of a drained section."""
        self.add_pause()

    def release(self) -> None:
        """Take back one `hold`."""
        self.remove_pause()

    async def idle(self) -> None:
        """Wait until no request of the job is in flight."""
        await self.quiet()

    def use(
        self,
        name: str,
        node: Node,
        *,
        needed: Permission = permissions.NONE,
        shared: Permission = permissions.ALL,
    ) -> None:
        """Hold on to a node and rule out commands that would disturb the job.

        Raises:
            CommandError: Permissions conflict; nothing has changed.
        """
        self._graph.attach(self, name, node, Role.ROOT, needed=needed, shared=shared)
        node.op_blockers.add(self._blocks)

    def let_go(self) -> None:
        """End all uses of nodes."""
        for edge in list(self.edges.values()):
            edge.node.op_blockers.remove(self._blocks)
            self._graph.detach(edge)

    # Errors

    @property
    def io_status(self) -> str:
        """Whether an error stopped the job."""
        return self._io_status

    def reset_io_status(self) -> None:
        """A user resumes the job: whether the error is gone, it will see."""
        self._io_status = IoStatus.OK

    def handle_error(self, policy: OnError, error: NodeError, *, is_read: bool) -> ErrorAction:
        """Tell users of an I/O error, and pause if the policy says so."""
        action = choose_action(policy, error.errno)
        operation = IoOperation.READ if is_read else IoOperation.WRITE
        self.emit(BlockJobError(device=self.id, operation=operation, action=action))
        if action is ErrorAction.STOP:
            self.pause_for_user()
            self._io_status = self._io_status.after(error.errno)
        return action

    # Verbs of the older commands

    def cancel_block_job(self, *, force: bool = False) -> None:
        """`block-job-cancel`: like `cancel`, but a paused job has to be forced."""
        if self.is_user_paused and not force:
            raise CommandError(f"The block job for device '{self.id}' is currently paused")
        self.cancel(force=force)

    # Events

    def announce_pending(self) -> None:
        """Send BLOCK_JOB_PENDING."""
        self.emit(BlockJobPending(type=self.type, id=self.id))

    def announce_end(self) -> None:
        """Send BLOCK_JOB_CANCELLED or BLOCK_JOB_COMPLETED."""
        if self.is_cancelled:
            self.emit(BlockJobCancelled(**self._outcome()))
        else:
            self.emit(BlockJobCompleted(**self._outcome(), error=self.error))

    def _outcome(self) -> Outcome:
        return {
            "type": self.type,
            "device": self.id,
            "len": self.total_progress,
            "offset": self.current_progress,
            "speed": self.limit.speed,
        }
