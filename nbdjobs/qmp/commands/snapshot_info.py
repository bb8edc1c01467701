# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What queries tell of internal snapshots.

Source: QEMU qapi/block-core.json (SnapshotInfo).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nbdjobs.errors import CommandError
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.qcow2.node import Qcow2Node
from nbdjobs.nodes.qcow2.snapshots import Snapshot

NO_SNAPSHOTS: Final = "Failed to get a snapshot list: Operation not supported"
_SECOND: Final = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotInfo:
    """A snapshot; when it was taken, and for how long the guest had run."""

    id: str
    name: str
    vm_state_size: int
    date_sec: int
    date_nsec: int
    vm_clock_sec: int
    vm_clock_nsec: int
    icount: int | None = None


def describe_snapshot(snapshot: Snapshot) -> SnapshotInfo:
    """A snapshot as queries show it."""
    return SnapshotInfo(
        id=snapshot.identifier.decode(errors="replace"),
        name=snapshot.name.decode(errors="replace"),
        vm_state_size=snapshot.saved_state_size,
        date_sec=snapshot.date_s,
        date_nsec=snapshot.date_ns,
        vm_clock_sec=snapshot.vm_clock_ns // _SECOND,
        vm_clock_nsec=snapshot.vm_clock_ns % _SECOND,
        icount=snapshot.instruction_count,
    )


def snapshot_store(node: Node) -> Qcow2Node | None:
    """The image that has the snapshots of a node: itself, or the one that all of it is in.

    Raises:
        CommandError: Its data is in a file of its own, so that there can be no snapshots.
    """
    while not isinstance(node, Qcow2Node):
        below = [edge.node for edge in node.edges.values() if edge.is_primary]
        if len(below) != 1:
            return None
        node = below[0]
    if node.header.has_data_file:
        raise CommandError(NO_SNAPSHOTS)
    return node


def list_snapshots(node: Node) -> list[SnapshotInfo] | None:
    """The snapshots that queries show for a node; None if there are none."""
    try:
        store = snapshot_store(node)
    except CommandError:
        return None
    snapshots = () if store is None else store.snapshots
    return [describe_snapshot(each) for each in snapshots] or None
