# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The command that starts a backup."""

from __future__ import annotations

from dataclasses import dataclass, field

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.jobs.backup import (
    BackupOptions,
    BackupPerf,
    BitmapSyncMode,
    SyncMode,
    start_backup,
)
from nbdjobs.jobs.job import JobOptions
from nbdjobs.nodes.copy_before_write import OnCbwError
from nbdjobs.nodes.error_policy import OnError
from nbdjobs.qapi.types import Uint32, member
from nbdjobs.qmp.registry import command


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockdevBackup:
    """Arguments of blockdev-backup (QAPI `BlockdevBackup`)."""

    job_id: str | None = None
    device: str
    sync: SyncMode
    speed: int | None = None
    bitmap: str | None = None
    bitmap_mode: BitmapSyncMode | None = None
    compress: bool | None = None
    on_source_error: OnError | None = None
    on_target_error: OnError | None = None
    on_cbw_error: OnCbwError | None = None
    cbw_timeout: Uint32 | None = None
    auto_finalize: bool | None = None
    auto_dismiss: bool | None = None
    filter_node_name: str | None = None
    x_perf: BackupPerf | None = field(default=None, metadata=member(features=("unstable",)))
    target: str


@command("blockdev-backup")
async def blockdev_backup(daemon: Daemon, arguments: BlockdevBackup) -> None:
    """Start a backup; the point in time has been when this returns."""
    source = daemon.find_device_or_node(arguments.device)
    target = daemon.find_device_or_node(arguments.target)
    is_device = arguments.device in daemon.devices
    await start_backup(
        daemon.jobs,
        daemon.graph,
        source,
        target,
        BackupOptions(
            sync=arguments.sync,
            job_id=arguments.job_id,
            device_name=arguments.device if is_device else "",
            bitmap=arguments.bitmap,
            bitmap_mode=arguments.bitmap_mode,
            compress=bool(arguments.compress),
            filter_node_name=arguments.filter_node_name,
            on_source_error=arguments.on_source_error or OnError.REPORT,
            on_target_error=arguments.on_target_error or OnError.REPORT,
            on_cbw_error=arguments.on_cbw_error or OnCbwError.BREAK_GUEST_WRITE,
            cbw_timeout=arguments.cbw_timeout or 0,
            perf=arguments.x_perf or BackupPerf(),
            job=JobOptions(
                speed=arguments.speed or 0,
                auto_finalize=arguments.auto_finalize is not False,
                auto_dismiss=arguments.auto_dismiss is not False,
            ),
        ),
    )
