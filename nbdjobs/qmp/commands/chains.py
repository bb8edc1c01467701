# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Commands about chains of images: snapshots by overlays, stream, commit, names of backing files.

Source: QEMU qapi/block-core.json, and `blockdev.c` for the order of refusals and their texts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.errors import CommandError, ErrorClass, NodeError
from nbdjobs.jobs.active_commit import start_active_commit
from nbdjobs.jobs.commit import start_commit
from nbdjobs.jobs.commit_images import CommitOptions, check_images
from nbdjobs.jobs.job import JobOptions
from nbdjobs.jobs.stream import StreamOptions, start_stream
from nbdjobs.nodes.backing_chain import (
    backing_of,
    chain_from,
    contains,
    find_image,
    last_image,
    skip_filters,
)
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.error_policy import OnError
from nbdjobs.nodes.graph import cumulative_permissions
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.op_blockers import BlockOp
from nbdjobs.nodes.overlays import DEFAULT_FORMAT, snapshot_to_file, take_snapshot
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.reopening import set_read_only
from nbdjobs.qapi.types import member
from nbdjobs.qmp.commands.backup import NewImageMode
from nbdjobs.qmp.registry import command


@dataclass(frozen=True, slots=True, kw_only=True)
class _ChainJob:
    """What both jobs can be told."""

    job_id: str | None = None
    device: str
    backing_file: str | None = None
    speed: int | None = None
    on_error: OnError | None = None
    filter_node_name: str | None = None
    auto_finalize: bool | None = None
    auto_dismiss: bool | None = None

    def chosen_job_id(self, daemon: Daemon) -> str:
        """The job's name, which may not be one that is allowed."""
        if self.job_id is not None:
            return self.job_id
        return self.device if self.device in daemon.devices else ""

    @property
    def job_options(self) -> JobOptions:
        """What all jobs can be told."""
        return JobOptions(
            speed=self.speed or 0,
            auto_finalize=self.auto_finalize is not False,
            auto_dismiss=self.auto_dismiss is not False,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStream(_ChainJob):
    """Arguments of block-stream.

    Attributes:
        base: File name of the image that is to be the backing file afterwards.
        base_node: The same by its node's name.
        bottom: Name of the last node to copy from, instead.
    """

    base: str | None = None
    base_node: str | None = None
    bottom: str | None = None


@command("block-stream")
async def block_stream(daemon: Daemon, arguments: BlockStream) -> None:
    """Start to copy what an image has from below into it."""
    _check_exclusive(arguments)
    top = daemon.find_device_or_node(arguments.device)
    base = _stream_base(daemon, arguments, top)
    bottom = _stream_bottom(daemon, arguments, top)
    _check_stream(top, base, bottom)
    if base is None and arguments.backing_file is not None:
        raise CommandError("backing file specified, but streaming the entire chain")
    options = StreamOptions(
        job_id=arguments.chosen_job_id(daemon),
        backing_file=arguments.backing_file,
        filter_node_name=arguments.filter_node_name,
        on_error=arguments.on_error or OnError.REPORT,
        job=arguments.job_options,
    )
    await start_stream(daemon.jobs, daemon.graph, top, base, bottom, options)


def _check_exclusive(arguments: BlockStream) -> None:
    given = {"base": arguments.base, "base-node": arguments.base_node, "bottom": arguments.bottom}
    for one, other in (("base", "base-node"), ("base", "bottom"), ("bottom", "base-node")):
        if given[one] is not None and given[other] is not None:
            raise CommandError(f"'{one}' and '{other}' cannot be specified at the same time")


def _stream_base(daemon: Daemon, arguments: BlockStream, top: Node) -> Node | None:
    if arguments.base is not None:
        return _image_below(top, arguments.base)
    if arguments.base_node is None:
        return None
    base = _node(daemon, arguments.base_node)
    if base is top or not contains(top, base):
        raise CommandError(
            f"Node '{arguments.base_node}' is not a backing image of '{arguments.device}'"
        )
    return base


def _stream_bottom(daemon: Daemon, arguments: BlockStream, top: Node) -> Node | None:
    if arguments.bottom is None:
        return None
    bottom = _node(daemon, arguments.bottom)
    if bottom.is_filter:
        raise CommandError(
            f"Node '{arguments.bottom}' is a filter, use a non-filter node as 'bottom'"
        )
    if not contains(top, bottom):
        raise CommandError(
            f"Node '{arguments.bottom}' is not in a chain starting from '{arguments.device}'"
        )
    return bottom


def _check_stream(top: Node, base: Node | None, bottom: Node | None) -> None:
    for node in chain_from(top):
        if node is base:
            return
        node.op_blockers.check(BlockOp.STREAM)
        if node is bottom:
            return


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCommit(_ChainJob):
    """Arguments of block-commit.

    Attributes:
        base_node: Name of the node to commit to; the last of the chain if not given.
        base: The same by its image's file name.
        top_node: Name of the uppermost node to commit; the active one if not given.
        top: The same by its image's file name.
    """

    base_node: str | None = None
    base: str | None = field(default=None, metadata=member(features=("deprecated",)))
    top_node: str | None = None
    top: str | None = field(default=None, metadata=member(features=("deprecated",)))


@command("block-commit")
async def block_commit(daemon: Daemon, arguments: BlockCommit) -> None:
    """Start to bring the content of images into an image below them."""
    active = _commit_root(daemon, arguments.device)
    active.op_blockers.check(BlockOp.COMMIT)
    top = _commit_top(daemon, arguments, active)
    base = _commit_base(daemon, arguments, top)
    check_images(top, base)
    options = CommitOptions(
        job_id=arguments.chosen_job_id(daemon),
        backing_file=arguments.backing_file,
        filter_node_name=arguments.filter_node_name,
        on_error=arguments.on_error or OnError.REPORT,
        job=arguments.job_options,
    )
    is_active = skip_filters(top) is skip_filters(active)
    has_writer = bool(cumulative_permissions(top)[0] & Permission.WRITE)
    if not is_active and not has_writer:
        await start_commit(daemon.jobs, daemon.graph, active, top, base, options)
        return
    if arguments.backing_file is not None:
        why = "is the active layer" if is_active else "has a writer on it"
        raise CommandError(f"'backing-file' specified, but 'top' {why}")
    await start_active_commit(daemon.jobs, daemon.graph, top, base, options)


def _commit_root(daemon: Daemon, name: str) -> Node:
    try:
        node = daemon.find_device_or_node(name)
    except CommandError:
        # Managers tell by this class whether the command is there at all.
        raise CommandError(f"Device '{name}' not found", ErrorClass.DEVICE_NOT_FOUND) from None
    _check_root(node)
    return node


def _check_root(node: Node) -> None:
    if any(not isinstance(edge.parent, Device) for edge in node.parents):
        raise CommandError("Need a root block node")


def _commit_top(daemon: Daemon, arguments: BlockCommit, active: Node) -> Node:
    if arguments.top_node is not None:
        if arguments.top is not None:
            raise CommandError("'top-node' and 'top' are mutually exclusive")
        top = _node(daemon, arguments.top_node)
        if not contains(active, top):
            raise CommandError(f"'{arguments.top_node}' is not in this backing file chain")
        return top
    if arguments.top is None or arguments.top == active.filename:
        return active
    found = find_image(active, arguments.top)
    if found is None:
        raise CommandError(f"Top image file {arguments.top} not found")
    return found


def _commit_base(daemon: Daemon, arguments: BlockCommit, top: Node) -> Node:
    if arguments.base_node is not None:
        if arguments.base is not None:
            raise CommandError("'base-node' and 'base' are mutually exclusive")
        base = _node(daemon, arguments.base_node)
        if not contains(top, base):
            raise CommandError(f"'{arguments.base_node}' is not in this backing file chain")
        return base
    if arguments.base is not None:
        return _image_below(top, arguments.base)
    return last_image(top)


def _image_below(top: Node, name: str) -> Node:
    found = find_image(top, name)
    if found is None:
        raise CommandError(f"Can't find '{name}' in the backing chain")
    return found


def _node(daemon: Daemon, name: str) -> Node:
    node = daemon.graph.nodes.get(name)
    if node is None:
        raise CommandError(f"Cannot find device='' nor node-name='{name}'")
    return node


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeBackingFile:
    """Arguments of change-backing-file."""

    device: str
    image_node_name: str
    backing_file: str


@command("change-backing-file")
async def change_backing_file(daemon: Daemon, arguments: ChangeBackingFile) -> None:
    """Write into an image what its backing file is called; nodes stay as they are."""
    graph, name = daemon.graph, arguments.backing_file
    root = daemon.find_device_or_node(arguments.device)
    _check_root(root)
    image = _node(daemon, arguments.image_node_name)
    async with graph.node_changes:
        graph.check_present(image)
        below = backing_of(image)
        if below is None:
            raise CommandError(
                "not allowing backing file change on an image without a backing file"
            )
        image.op_blockers.check(BlockOp.CHANGE)
        if not contains(root, image):
            raise CommandError(f"'{arguments.device}' and image file are not in the same chain")
        was_read_only = image.is_read_only
        if was_read_only:
            await set_read_only(graph, image, is_read_only=False)
        try:
            async with graph.drained(image):
                driver = skip_filters(below).driver
                await image.change_backing_file(name or None, driver)
        except NodeError as error:
            raise CommandError(
                f"Could not change backing file to '{name}': {os.strerror(error.errno)}"
            ) from error
        finally:
            if was_read_only:
                await set_read_only(graph, image, is_read_only=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockdevSnapshot:
    """Arguments of blockdev-snapshot."""

    node: str
    overlay: str


@command("blockdev-snapshot", features=("allow-write-only-overlay",))
async def blockdev_snapshot(daemon: Daemon, arguments: BlockdevSnapshot) -> None:
    """Let the users of a node go on with an overlay of it."""
    node = daemon.find_device_or_node(arguments.node)
    overlay = daemon.find_device_or_node(arguments.overlay)
    await take_snapshot(daemon.graph, node, overlay)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockdevSnapshotSync:
    """Arguments of blockdev-snapshot-sync.

    Attributes:
        device: Name of the device to take a snapshot of.
        node_name: Name of the node, instead.
        snapshot_file: File name of the overlay.
        snapshot_node_name: Its node's name.
        format: Its format, qcow2 by default.
        mode: Whether it is there already.
    """

    device: str | None = None
    node_name: str | None = None
    snapshot_file: str
    snapshot_node_name: str | None = None
    format: str | None = None
    mode: NewImageMode | None = None


@command("blockdev-snapshot-sync")
async def blockdev_snapshot_sync(daemon: Daemon, arguments: BlockdevSnapshotSync) -> None:
    """Let the users of a node go on with an overlay that is named by its file."""
    name = arguments.snapshot_node_name
    node = _named(daemon, arguments.device, arguments.node_name)
    if arguments.node_name is not None and name is None:
        raise CommandError("New overlay node-name missing")
    if name is not None and name in daemon.graph.nodes:
        raise CommandError("New overlay node-name already in use")
    await snapshot_to_file(
        daemon.graph,
        node,
        arguments.snapshot_file,
        image_format=arguments.format or DEFAULT_FORMAT,
        name=name,
        is_new=arguments.mode is not NewImageMode.EXISTING,
    )


def _named(daemon: Daemon, device: str | None, node_name: str | None) -> Node:
    if device is not None and device in daemon.devices:
        return daemon.devices[device].node
    if node_name is not None and node_name in daemon.graph.nodes:
        return daemon.graph.nodes[node_name]
    raise CommandError(f"Cannot find device='{device or ''}' nor node-name='{node_name or ''}'")
