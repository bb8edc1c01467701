# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Backup: the content of a disk at one instant, copied while the disk is being written.

    guest ──▶ copy-before-write ──▶ source          the job copies from the source in the
                      │    job ─────┘  │            background, the filter ahead of every write;
                      └──▶ target ◀────┘            both through the same `BlockCopy`

Starting is one drained section: the filter is put above the source and all clusters are marked
as still to copy. That instant is the point in time. At the end, however it comes, copies in
flight end, the filter goes, and its users are back on the source.

Source: QEMU `block/backup.c`, `blockdev.c` (do_backup_common); QAPI `BlockdevBackup`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from nbdjobs.errors import CommandError, JobError, NodeError
from nbdjobs.jobs.block_job import BlockJob
from nbdjobs.jobs.collection import Jobs
from nbdjobs.jobs.job import JobOptions
from nbdjobs.jobs.ratelimit import SLICE_S
from nbdjobs.jobs.status import JobType
from nbdjobs.jobs.transaction import Transaction
from nbdjobs.nodes import copy_before_write
from nbdjobs.nodes.background import Background
from nbdjobs.nodes.backing_chain import skip_filters
from nbdjobs.nodes.block_copy import BlockCopy, CopyError, CopyTuning
from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.copy_before_write import (
    CbwSettings,
    CopyBeforeWrite,
    OnCbwError,
)
from nbdjobs.nodes.error_policy import ErrorAction, OnError
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.op_blockers import BlockOp
from nbdjobs.nodes.rounding import round_down
from nbdjobs.nodes.snapshot_access import SnapshotAccess

logger = logging.getLogger(__name__)

MAX_WORKERS: Final = 2**31 - 1

WRITEBACK_STEP: Final = 8 * 1024 * 1024
"""Bytes copied in the background until the target is asked to begin to make them stable."""

_FILTER_CONFIG: Final = NodeConfig(can_unmap=True)
"""Discards pass through the filter; whether they do anything is the source's option."""


class SyncMode(StrEnum):
    """What a backup copies (QAPI `MirrorSyncMode`)."""

    TOP = "top"
    FULL = "full"
    NONE = "none"
    INCREMENTAL = "incremental"
    BITMAP = "bitmap"


class BitmapSyncMode(StrEnum):
    """When a backup updates its bitmap (QAPI `BitmapSyncMode`)."""

    ON_SUCCESS = "on-success"
    NEVER = "never"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupPerf:
    """Knobs of the copy (QAPI `BackupPerf`).

    Attributes:
        use_copy_range: Let the storage copy by itself where it can.
        max_workers: Most pieces in flight at a time in the background.
        max_chunk: Longest piece in bytes; 0 for no limit but the copy's own.
        min_cluster_size: Least unit of copying in bytes, a power of two or 0.
    """

    use_copy_range: bool = False
    max_workers: int = 64
    max_chunk: int = 0
    min_cluster_size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupOptions:
    """Arguments of `blockdev-backup` beside source and target.

    Attributes:
        job_id: Name of the job; None takes the name of the source's device.
        device_name: That name, "" if the source is not below a named device.
        sync: What to copy.
        bitmap: Name of a dirty bitmap of the source.
        bitmap_mode: When to update the bitmap.
        compress: Write compressed clusters.
        filter_node_name: Name of the filter; None lets the graph choose one.
        on_source_error: What to do about errors when reading.
        on_target_error: What to do about errors when writing.
        on_cbw_error: Who pays when a copy ahead of a guest's write fails.
        cbw_timeout: Seconds that a guest's write waits for such a copy; 0 means for ever.
        discard_source: Give up what is copied, in a source that is a snapshot.
        perf: Knobs of the copy.
        job: Speed, auto-finalize, auto-dismiss.
    """

    sync: SyncMode
    job_id: str | None = None
    device_name: str = ""
    bitmap: str | None = None
    bitmap_mode: BitmapSyncMode | None = None
    compress: bool = False
    filter_node_name: str | None = None
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE
    cbw_timeout: int = 0
    discard_source: bool = False
    perf: BackupPerf = BackupPerf()
    job: JobOptions = field(default_factory=JobOptions)

    @property
    def chosen_job_id(self) -> str:
        """Name of the job, which may not be one that is allowed."""
        return self.device_name if self.job_id is None else self.job_id


async def start_backup(
    jobs: Jobs, graph: Graph, source: Node, target: Node, options: BackupOptions
) -> BackupJob:
    """Start a backup: when this returns, the point in time has been.

    Cancelling the call before that starts nothing.

    Raises:
        CommandError: It cannot start; nothing is left behind.
    """
    _check(source, target, options)
    async with graph.drained(source):
        for node in (source, target):  # the world went on while requests were awaited
            graph.check_present(node)
        _check(source, target, options)
        job = create_backup(jobs, graph, source, target, options)
        jobs.start(job)
    return job


def create_backup(
    jobs: Jobs,
    graph: Graph,
    source: Node,
    target: Node,
    options: BackupOptions,
    transaction: Transaction | None = None,
) -> BackupJob:
    """Take the point in time, inside a drained section of `source`; the job is not started.

    Raises:
        CommandError: It cannot be; nothing is left behind.
    """
    node = _insert_filter(jobs, graph, source, target, options)
    job = None
    try:
        copy = node.arm(
            CopyTuning(
                max_chunk=options.perf.max_chunk,
                use_copy_range=options.perf.use_copy_range,
                compresses=options.compress,
            )
        )
        if options.perf.max_chunk and options.perf.max_chunk < copy.cluster_size:
            raise CommandError(
                f"Required max-chunk ({options.perf.max_chunk}) is less than"
                f" backup cluster size ({copy.cluster_size})"
            )
        job_id = options.chosen_job_id
        jobs.check_id(job_id)
        job = BackupJob(jobs, graph, job_id, options, node, transaction)
        jobs.add(job)
        job.use("main node", node)
        job.use("target", target)
        if options.job.speed:
            job.set_speed(options.job.speed)
    except BaseException:  # a filter that is not armed would let no write pass
        if job is not None:
            job.let_go()
            job.never_started()
        copy_before_write.take_back(graph, node)
        raise
    return job


def check_source(jobs: Jobs, source: Node, options: BackupOptions) -> None:
    """Refuse what cannot work whatever the target, before one is made for it.

    Raises:
        CommandError: It cannot.
    """
    source.op_blockers.check(BlockOp.BACKUP_SOURCE)
    _check_discard(source, options)
    _check_bitmap(options)
    _check_perf(options.perf)
    jobs.check_id(options.chosen_job_id)


def _check(source: Node, target: Node, options: BackupOptions) -> None:
    """Refuse what cannot work, in QEMU's words and order."""
    _check_bitmap(options)
    _check_discard(source, options)
    if source is target:
        raise CommandError("Source and target cannot be the same")
    if options.compress and not target.supports_compressed_writes:
        # QEMU names the device here; a target that is a node has none, and the blank stays.
        raise CommandError("Compression is not supported for this drive ")
    source.op_blockers.check(BlockOp.BACKUP_SOURCE)
    target.op_blockers.check(BlockOp.BACKUP_TARGET)
    _check_perf(options.perf)
    if source.size != target.size:
        raise CommandError("Source and target image have different sizes")


def _check_discard(source: Node, options: BackupOptions) -> None:
    """Keep a job from discarding a disk that others use."""
    if options.discard_source and not isinstance(source, SnapshotAccess):
        raise CommandError(
            f"discard-source needs a node of driver '{SnapshotAccess.driver}' as the source"
        )


def _check_perf(perf: BackupPerf) -> None:
    if not 1 <= perf.max_workers <= MAX_WORKERS:
        raise CommandError(f"max-workers must be between 1 and {MAX_WORKERS}")
    if perf.max_chunk < 0:
        raise CommandError("max-chunk must be zero (which means no limit) or positive")


def _check_bitmap(options: BackupOptions) -> None:
    if options.sync in (SyncMode.INCREMENTAL, SyncMode.BITMAP) and options.bitmap is None:
        raise CommandError(f"must provide a valid bitmap name for '{options.sync}' sync mode")
    if options.sync is SyncMode.INCREMENTAL and options.bitmap_mode not in (
        None,
        BitmapSyncMode.ON_SUCCESS,
    ):
        raise CommandError(
            f"Bitmap sync mode must be '{BitmapSyncMode.ON_SUCCESS}' when using sync mode"
            f" '{options.sync}'"
        )
    if options.bitmap is not None:
        raise CommandError(f"Bitmap '{options.bitmap}' could not be found")
    if options.bitmap_mode is not None:
        raise CommandError("Cannot specify bitmap sync mode without a bitmap")


def _insert_filter(
    jobs: Jobs, graph: Graph, source: Node, target: Node, options: BackupOptions
) -> CopyBeforeWrite:
    try:
        node = CopyBeforeWrite(
            graph.new_name(options.filter_node_name),
            _FILTER_CONFIG,
            CbwSettings(
                on_cbw_error=options.on_cbw_error,
                cbw_timeout=options.cbw_timeout,
                min_cluster_size=options.perf.min_cluster_size,
            ),
            jobs.clock,
        )
    except CommandError as error:
        raise CommandError(f"Could not create node: {error}") from error
    copy_before_write.insert(graph, source, target, node)
    return node


class BackupJob(BlockJob):
    """The job that copies in the background; with sync=none it only watches over the filter."""

    type = JobType.BACKUP

    def __init__(
        self,
        jobs: Jobs,
        graph: Graph,
        job_id: str,
        options: BackupOptions,
        node: CopyBeforeWrite,
        transaction: Transaction | None = None,
    ):
        super().__init__(jobs, graph, job_id, options.job, transaction)
        self._options = options
        self._filter = node
        self._copy: BlockCopy = node.block_copy
        self._workers = Background(self.kick)
        self._failure: CopyError | None = None
        self._has_defect = False
        self._unstable: tuple[int, int] | None = None
        node.on_broken = self.kick

    @property
    def current_progress(self) -> int:
        """Bytes copied."""
        return self._copy.copied

    @property
    def total_progress(self) -> int:
        """Bytes that there were to copy."""
        return self._copy.total

    @property
    def intercepted_operations(self) -> int:
        """Requests of guests that had to wait for a copy."""
        return self._filter.intercepted_operations

    @property
    def intercepted_bytes(self) -> int:
        """Bytes copied ahead of guests' writes."""
        return self._filter.intercepted_bytes

    # The work

    async def run(self) -> None:
        """Copy everything, or with sync=none wait to be cancelled."""
        if self._options.sync is SyncMode.NONE:
            await self._watch()
            return
        if self._options.sync is SyncMode.TOP:
            await self._leave_out_what_is_below()
        while not self.is_cancelled and self._copy.has_work:
            copied_before = self._copy.copied
            await self._pass_over_disk()
            if self._copy.copied == copied_before and not self._must_settle:
                # Only errors that the user wants ignored: look again, but not in a hot loop.
                await self.rest(SLICE_S)
        if not self.is_cancelled:
            await self._flush_target()

    async def _leave_out_what_is_below(self) -> None:
        """Find what the image has itself: only that is to be copied.

        What a guest overwrites meanwhile is saved as always, wherever it was.
        """
        image, size = skip_filters(self._filter), self._copy.size
        position = 0
        while position < size and not self.is_cancelled:
            await self.pause_point()
            self._check_snapshot()
            try:
                is_own, length = await image.allocation(position, size - position)
            except NodeError as error:
                policy = self._options.on_source_error
                if self.handle_error(policy, error, is_read=True) is ErrorAction.REPORT:
                    raise _job_error(error) from error
                if self.should_pause:
                    continue
                is_own, length = True, self._copy.cluster_size  # reading it will show
            if not is_own:
                await self._copy.leave_out(position, position + length)
            position += length
            await asyncio.sleep(0)

    async def _watch(self) -> None:
        while not self.is_cancelled:
            self._check_snapshot()
            if self.should_pause:
                await self.pause_point()
            else:
                await self.rest()

    async def _pass_over_disk(self) -> None:
        """Go once over the disk, from begin to end, and begin a copy of all there is to do."""
        position: int | None = 0
        while position is not None:
            if self._must_settle:
                await self._workers.settled()
                if self.is_cancelled:
                    return
                self._check_snapshot()
                self._take_failure()
                await self.pause_point()
            elif len(self._workers) >= self._options.perf.max_workers:
                await self.rest()
            elif delay := self.limit.delay(self._jobs.clock.now()):
                await self.rest(delay)
            else:
                position = await self._copy_next(position)
        await self._workers.settled()
        self._take_failure()

    @property
    def _must_settle(self) -> bool:
        return (
            self.is_cancelled
            or self.should_pause
            or self._failure is not None
            or self._has_defect
            or self._filter.snapshot_error is not None
        )

    async def _copy_next(self, position: int) -> int | None:
        """Begin the next copy; the answer is where to look on, or None at the disk's end."""
        run = await self._copy.next_run(position, self._chunk_limit)
        if run is None:
            return None
        begin, end = run
        self.limit.account(end - begin, self._jobs.clock.now())
        self._workers.start(self._copy_run(begin, end))
        await asyncio.sleep(0)  # if the copy did not have to wait, others must get their turn
        return end

    @property
    def _chunk_limit(self) -> int:
        """Most bytes of one piece, so that a slow job works in small steps; 0 for no limit."""
        if not self.limit.speed:
            return 0
        return max(round_down(self.limit.quota, self._copy.cluster_size), self._copy.cluster_size)

    async def _copy_run(self, begin: int, end: int) -> None:
        try:
            await self._copy.copy(begin, end - begin)
        except CopyError as error:
            self._failure = self._failure or error
        except Exception:
            # Nobody looks into the task, and copying the range again would fail likewise.
            logger.exception("job %s: a copy failed unexpectedly", self.id)
            self._has_defect = True
        else:
            self._write_back(begin, end)
            if self._options.discard_source:
                await self._discard_source(begin, end)

    async def _discard_source(self, begin: int, end: int) -> None:
        """The snapshot need not keep what is on the target now; if it does, no harm is done."""
        source = self._filter.edges["file"].node
        with suppress(NodeError):
            await source.pdiscard(begin, min(end, source.size) - begin)

    def _write_back(self, begin: int, end: int) -> None:
        """Keep what the target has not made stable small, so that the last flush is short."""
        first, last = self._unstable or (begin, end)
        self._unstable = min(first, begin), max(last, end)
        if self._unstable[1] - self._unstable[0] >= WRITEBACK_STEP:
            first, last = self._unstable
            self._unstable = None
            self.edges["target"].node.begin_writeback(first, last - first)

    def _take_failure(self) -> None:
        """Do about a failed copy what the user wants: pause, go on, or end with an error."""
        if self._has_defect:
            raise JobError("internal error")
        error, self._failure = self._failure, None
        if error is None or self.is_cancelled:
            return
        options = self._options
        policy = options.on_source_error if error.is_read else options.on_target_error
        if self.handle_error(policy, error, is_read=error.is_read) is ErrorAction.REPORT:
            raise _job_error(error)

    def _check_snapshot(self) -> None:
        if self._filter.snapshot_error is not None:
            raise _job_error(self._filter.snapshot_error)

    async def _flush_target(self) -> None:
        """Bring the backup to stable storage: one that is not there has failed."""
        while not self.is_cancelled:
            self._check_snapshot()
            try:
                await self.edges["target"].node.flush()
            except NodeError as error:
                policy = self._options.on_target_error
                if self.handle_error(policy, error, is_read=False) is not ErrorAction.STOP:
                    raise _job_error(error) from error
            else:
                return
            await self.pause_point()

    # The end

    def stop_working(self) -> None:
        """Let guests go that wait for copies nobody wants any more."""
        self._filter.abandon()

    async def abort(self) -> None:
        """The target is of no use: no write has to wait for it any more."""
        self._filter.abandon()

    async def clean(self) -> None:
        """Take the filter out, once nothing of the job is in flight."""
        await self._workers.settled()
        await self._filter.settled()
        async with self._graph.drained(self._filter):
            self.let_go()
            await copy_before_write.remove(self._graph, self._filter)


def _job_error(error: NodeError) -> JobError:
    return JobError(os.strerror(error.errno))
