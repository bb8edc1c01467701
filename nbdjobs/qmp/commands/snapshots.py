# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The commands for internal snapshots.

Source: QEMU `blockdev.c` (internal_snapshot_prepare, qmp_blockdev_snapshot_delete_internal_sync)
for the order of checks and their texts.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.op_blockers import BlockOp
from nbdjobs.nodes.qcow2.node import Qcow2Node
from nbdjobs.nodes.qcow2.snapshots import Snapshot
from nbdjobs.qmp.commands.snapshot_info import (
    NO_SNAPSHOTS,
    SnapshotInfo,
    describe_snapshot,
    snapshot_store,
)
from nbdjobs.qmp.registry import command


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockdevSnapshotInternal:
    """Arguments of blockdev-snapshot-internal-sync."""

    device: str
    name: str


@command("blockdev-snapshot-internal-sync")
async def blockdev_snapshot_internal_sync(
    daemon: Daemon, arguments: BlockdevSnapshotInternal
) -> None:
    """Take a snapshot inside the image, of the disk as it is at one instant."""
    device, name = arguments.device, arguments.name
    node = _root_node(daemon, device)
    async with _held(daemon, node, BlockOp.INTERNAL_SNAPSHOT):
        if node.is_read_only:
            raise CommandError(f"Device '{device}' is read only")
        store = snapshot_store(node)
        if store is None:
            raise CommandError(
                f"Block format '{node.driver}' used by device '{device}' does not support internal"
                " snapshots"
            )
        if not name:
            raise CommandError("Name is empty")
        if _find(store, None, name) is not None:
            raise CommandError(f"Snapshot with name '{name}' already exists on device '{device}'")
        try:
            store.check_active()
            await store.take_snapshot(name, time.time_ns())
        except NodeError as error:
            raise CommandError(
                f"Failed to create snapshot '{name}' on device '{device}': {error}"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockdevSnapshotDeleteInternal:
    """Arguments of blockdev-snapshot-delete-internal-sync; one of the last two, or both."""

    device: str
    id: str | None = None
    name: str | None = None


@command("blockdev-snapshot-delete-internal-sync")
async def blockdev_snapshot_delete_internal_sync(
    daemon: Daemon, arguments: BlockdevSnapshotDeleteInternal
) -> SnapshotInfo:
    """Delete a snapshot inside the image; answers what it was."""
    device, wanted_id, name = arguments.device, arguments.id, arguments.name
    node = _root_node(daemon, device)
    if wanted_id is None and name is None:
        raise CommandError("Name or id must be provided")
    async with _held(daemon, node, BlockOp.INTERNAL_SNAPSHOT_DELETE):
        store = snapshot_store(node)
        if store is None:
            raise CommandError(NO_SNAPSHOTS)
        found = _find(store, wanted_id, name)
        if found is None:
            raise CommandError(
                f"Snapshot with id '{_or_null(wanted_id)}' and name '{_or_null(name)}' does not"
                f" exist on device '{device}'"
            )
        if node.is_read_only:
            raise CommandError(f"Device '{device}' is read only")
        try:
            store.check_active()
            await store.delete_snapshot(found)
        except NodeError as error:
            raise CommandError(
                f"Failed to delete the snapshot '{found.name.decode(errors='replace')}': {error}"
            ) from error
        return describe_snapshot(found)


def _root_node(daemon: Daemon, name: str) -> Node:
    """A node that no other node uses, as only then all of its users are held here."""
    node = daemon.find_device_or_node(name)
    if any(isinstance(edge.parent, Node) for edge in node.parents):
        raise CommandError("Need a root block node")
    return node


@asynccontextmanager
async def _held(daemon: Daemon, node: Node, operation: BlockOp) -> AsyncIterator[None]:
    """While inside, no request is in flight on the node, and no other command changes it."""
    node.op_blockers.check(operation)
    async with daemon.graph.node_changes:
        daemon.graph.check_present(node)
        async with daemon.graph.drained(node):
            node.op_blockers.check(operation)
            yield


def _find(store: Qcow2Node, wanted_id: str | None, name: str | None) -> Snapshot | None:
    """The first snapshot with that id, if given, and that name, if given."""
    for snapshot in store.snapshots:
        has_id = wanted_id is None or snapshot.identifier == wanted_id.encode()
        has_name = name is None or snapshot.name == name.encode()
        if has_id and has_name:
            return snapshot
    return None


def _or_null(word: str | None) -> str:
    return "null" if word is None else word
