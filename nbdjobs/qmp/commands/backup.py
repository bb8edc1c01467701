# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The commands that start a backup: to a node, or to an image that is named by its file."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.errors import CommandError
from nbdjobs.jobs.backup import (
    BackupOptions,
    BackupPerf,
    BitmapSyncMode,
    SyncMode,
    check_source,
    start_backup,
)
from nbdjobs.jobs.job import JobOptions
from nbdjobs.nodes.backing_chain import backing_file_of, backing_of, set_backing, skip_filters
from nbdjobs.nodes.copy_before_write import OnCbwError
from nbdjobs.nodes.error_policy import OnError
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.images import ImagePlace, create_image, open_image
from nbdjobs.nodes.node import Node
from nbdjobs.qapi.types import Uint32, member
from nbdjobs.qmp.registry import command


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupCommon:
    """Arguments of both commands (QAPI `BackupCommon`)."""

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
    discard_source: bool | None = None
    auto_finalize: bool | None = None
    auto_dismiss: bool | None = None
    filter_node_name: str | None = None
    x_perf: BackupPerf | None = field(default=None, metadata=member(features=("unstable",)))


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockdevBackup(BackupCommon):
    """Arguments of blockdev-backup (QAPI `BlockdevBackup`)."""

    target: str


class NewImageMode(StrEnum):
    """Whether the target is made (QAPI `NewImageMode`)."""

    EXISTING = "existing"
    ABSOLUTE_PATHS = "absolute-paths"


@dataclass(frozen=True, slots=True, kw_only=True)
class DriveBackup(BackupCommon):
    """Arguments of drive-backup (QAPI `DriveBackup`).

    Attributes:
        target: File name of the image.
        format: Its format; that of the source for a new one, else found by looking at it.
        mode: Whether it is there already; what an existing file holds is lost if not.
    """

    target: str
    format: str | None = None
    mode: NewImageMode | None = None


@command("blockdev-backup")
async def blockdev_backup(daemon: Daemon, arguments: BlockdevBackup) -> None:
    """Start a backup; the point in time has been when this returns."""
    source = daemon.find_device_or_node(arguments.device)
    target = daemon.find_device_or_node(arguments.target)
    await start_backup(daemon.jobs, daemon.graph, source, target, _options(daemon, arguments))


@command("drive-backup", features=("deprecated",))
async def drive_backup(daemon: Daemon, arguments: DriveBackup) -> None:
    """Start a backup to an image; the point in time has been when this returns.

    A file that was made for it is removed again when the backup cannot start.
    """
    source = daemon.find_device_or_node(arguments.device)
    options = _options(daemon, arguments)
    check_source(daemon.jobs, source, options)
    place = await ImagePlace.find(daemon.graph, arguments.target)
    image_format = arguments.format
    if arguments.mode is not NewImageMode.EXISTING:
        image_format = source.driver if image_format is None else image_format
        below = _below_target(source, arguments.sync)
        backing = None if below is None else backing_file_of(below)
        await create_image(place, image_format, source.size, backing)
    is_above_disk = arguments.sync is SyncMode.NONE
    try:
        target = await open_image(place, image_format, source.config.cache, is_alone=is_above_disk)
        try:
            if is_above_disk:
                await _put_above(daemon.graph, target, source)
            await start_backup(daemon.jobs, daemon.graph, source, target, options)
        except BaseException:
            await daemon.graph.drop_if_unused(target)
            raise
    except BaseException:
        await place.remove()
        raise


def _below_target(source: Node, sync: SyncMode) -> Node | None:
    """What a new target needs below it to show the disk: where what is not copied comes from.

    With sync=none that is the disk itself, with sync=top the disk's own backing image.
    """
    if sync is SyncMode.TOP:
        return backing_of(skip_filters(source))
    return source if sync is SyncMode.NONE else None


async def _put_above(graph: Graph, target: Node, source: Node) -> None:
    """Let a target read from the disk what is not copied to it."""
    if not target.supports_backing:
        raise CommandError(
            f"Driver '{target.driver}' of node '{target.name}' does not support backing files"
        )
    async with graph.drained(target):
        set_backing(graph, target, source)


def _options(daemon: Daemon, arguments: BackupCommon) -> BackupOptions:
    return BackupOptions(
        sync=arguments.sync,
        job_id=arguments.job_id,
        device_name=arguments.device if arguments.device in daemon.devices else "",
        bitmap=arguments.bitmap,
        bitmap_mode=arguments.bitmap_mode,
        compress=bool(arguments.compress),
        filter_node_name=arguments.filter_node_name,
        on_source_error=arguments.on_source_error or OnError.REPORT,
        on_target_error=arguments.on_target_error or OnError.REPORT,
        on_cbw_error=arguments.on_cbw_error or OnCbwError.BREAK_GUEST_WRITE,
        cbw_timeout=arguments.cbw_timeout or 0,
        discard_source=bool(arguments.discard_source),
        perf=arguments.x_perf or BackupPerf(),
        job=JobOptions(
            speed=arguments.speed or 0,
            auto_finalize=arguments.auto_finalize is not False,
            auto_dismiss=arguments.auto_dismiss is not False,
        ),
    )
