# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The command that shows the graph: nodes, who uses them, and with which permissions.

Source: QEMU qapi/block-core.json (XDbgBlockGraph).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.jobs.block_job import BlockJob
from nbdjobs.nodes import permissions
from nbdjobs.nodes.blkdebug import PermissionName
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.graph import Edge, Parent
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.permissions import Permission
from nbdjobs.qmp.registry import command


class XDbgBlockGraphNodeType(StrEnum):
    """What is a point of the graph."""

    BLOCK_BACKEND = "block-backend"
    """A device: an export has one, without a name."""

    BLOCK_JOB = "block-job"
    BLOCK_DRIVER = "block-driver"
    """A node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class XDbgBlockGraphNode:
    """A point of the graph."""

    id: int
    type: XDbgBlockGraphNodeType
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class XDbgBlockGraphEdge:
    """One use of a node."""

    parent: int
    child: int
    name: str
    perm: list[PermissionName]
    shared_perm: list[PermissionName]


@dataclass(frozen=True, slots=True, kw_only=True)
class XDbgBlockGraph:
    """The graph."""

    nodes: list[XDbgBlockGraphNode]
    edges: list[XDbgBlockGraphEdge]


@command("x-debug-query-block-graph", features=("unstable",))
def x_debug_query_block_graph(daemon: Daemon) -> XDbgBlockGraph:
    """The graph, the newest first, as QEMU lists it."""
    points = list(_points(daemon))
    # A point has its number from when it is first met, as a parent or as a child.
    numbers: dict[Parent, int] = {}
    for point in points:
        for met in (point, *(edge.node for edge in _uses(point))):
            numbers.setdefault(met, len(numbers) + 1)
    nodes = [_describe(point, numbers[point]) for point in points]
    edges = [_describe_edge(edge, numbers) for point in points for edge in _uses(point)]
    return XDbgBlockGraph(nodes=nodes[::-1], edges=edges[::-1])


def _points(daemon: Daemon) -> Iterator[Parent]:
    """Devices, oldest first, then jobs, newest first, then nodes, oldest first."""
    yield from daemon.devices.values()
    yield from reversed([export.device for export in daemon.exports])
    yield from reversed([job for job in daemon.jobs if isinstance(job, BlockJob)])
    yield from daemon.graph.nodes.values()


def _uses(point: Parent) -> list[Edge]:
    """Newest first, as QEMU keeps them."""
    return list(point.edges.values())[::-1]


def _describe(point: Parent, number: int) -> XDbgBlockGraphNode:
    kind = XDbgBlockGraphNodeType.BLOCK_DRIVER
    name = point.name if isinstance(point, Node | Device) else ""
    if isinstance(point, Device):
        kind = XDbgBlockGraphNodeType.BLOCK_BACKEND
    elif isinstance(point, BlockJob):
        kind, name = XDbgBlockGraphNodeType.BLOCK_JOB, point.id
    return XDbgBlockGraphNode(id=number, type=kind, name=name)


def _describe_edge(edge: Edge, numbers: dict[Parent, int]) -> XDbgBlockGraphEdge:
    return XDbgBlockGraphEdge(
        parent=numbers[edge.parent],
        child=numbers[edge.node],
        name=edge.name,
        perm=_names(edge.needed),
        shared_perm=_names(edge.shared),
    )


def _names(given: Permission) -> list[PermissionName]:
    return [PermissionName(name) for name in permissions.qapi_names(given)]
