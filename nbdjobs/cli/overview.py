# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What a server has, put together from its answers: exports, jobs, nodes and who uses which. Pure.

    ● server
    ├── export disk ──▶ node ──file──▶ node
    ├── job backup ───▶ main node, target
    └── nodes that nobody uses

The edges come from `x-debug-query-block-graph`. A server without that command says nothing about
edges; then exports still lead to their nodes, and the other nodes stand side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from rich.text import Text
from rich.tree import Tree

from nbdjobs.cli.client_view import ClientState, ExportState
from nbdjobs.cli.job_table import JobRow
from nbdjobs.cli.session import BlockNode
from nbdjobs.cli.units import format_size

#: How the graph calls a node, as opposed to a user outside of it (QAPI XDbgBlockGraphNodeType).
DRIVER: Final = "block-driver"
JOB: Final = "block-job"


@dataclass(frozen=True, slots=True)
class Child:
    """An edge: what the parent calls the child, and the child's node name."""

    name: str
    node: str


@dataclass(frozen=True, slots=True)
class Edges:
    """Who uses which node.

    Attributes:
        of_nodes: Children by the parent's node name.
        of_jobs: Nodes that a job uses, by its id.
    """

    of_nodes: Mapping[str, tuple[Child, ...]]
    of_jobs: Mapping[str, tuple[Child, ...]]

    @classmethod
    def from_qmp(cls, graph: Mapping[str, Any] | None) -> Edges:
        """Read the answer of `x-debug-query-block-graph`; None is a server without it."""
        if graph is None:
            return cls({}, {})
        users = {user["id"]: user for user in graph["nodes"]}
        of_nodes: dict[str, tuple[Child, ...]] = {}
        of_jobs: dict[str, tuple[Child, ...]] = {}
        for edge in graph["edges"]:
            parent, child = users[edge["parent"]], users[edge["child"]]
            table = {DRIVER: of_nodes, JOB: of_jobs}.get(parent["type"])
            if table is not None:  # exports are asked for by a command of their own
                found = Child(edge["name"], child["name"])
                table[parent["name"]] = (*table.get(parent["name"], ()), found)
        return cls(of_nodes, of_jobs)


@dataclass(frozen=True, slots=True)
class Overview:
    """All that a server has.

    Attributes:
        server: What it calls itself.
        exports: Entries of `query-block-exports`.
        jobs: Its jobs.
        nodes: Its nodes by name.
        edges: Who uses which of them.
        clients: What holds up its clients.
    """

    server: str
    exports: Sequence[Mapping[str, Any]]
    jobs: Sequence[JobRow]
    nodes: Mapping[str, BlockNode]
    edges: Edges
    clients: ClientState = field(default_factory=ClientState)

    def to_json(self) -> dict[str, object]:
        """Everything for programs."""
        return {
            "server": self.server,
            "status": self.clients.status,
            "exports": [self._export_json(export) for export in self.exports],
            "jobs": [
                {
                    **job.to_json(),
                    "nodes": [
                        {"name": used.name, "node-name": used.node}
                        for used in self.edges.of_jobs.get(job.id, ())
                    ],
                }
                for job in self.jobs
            ],
            "nodes": [
                _node_json(node, self.edges.of_nodes.get(node.name, ()))
                for node in self.nodes.values()
            ],
        }

    def _export_json(self, export: Mapping[str, Any]) -> dict[str, object]:
        state = self.clients.export(export["id"])
        return {**export, "io-status": state.io_status, "limits": {**state.limits}}


def _node_json(node: BlockNode, children: Sequence[Child]) -> dict[str, object]:
    return {
        "node-name": node.name,
        "driver": node.driver,
        "size": node.size,
        "allocated": node.allocated,
        "filename": node.filename,
        "read-only": node.is_read_only,
        "children": [{"name": child.name, "node-name": child.node} for child in children],
    }


def name_of_server(version: Mapping[str, Any]) -> str:
    """Who answers, from `query-version`: its package, or else QEMU with its version."""
    qemu = version["qemu"]
    number = f"{qemu['major']}.{qemu['minor']}.{qemu['micro']}"
    package = version["package"].strip()
    return package if package.startswith("nbdjobs") else f"QEMU {number} {package}".rstrip()


def draw(overview: Overview) -> Tree:
    """Draw everything as one tree."""
    return _Drawing(overview).draw()


class _Drawing:
    """A tree in the making; a node with several users is drawn in full below the first one."""

    def __init__(self, overview: Overview):
        self._overview = overview
        self._drawn: set[str] = set()

    def draw(self) -> Tree:
        clients = self._overview.clients
        remark = clients.describe()
        root = Tree(Text(f"{self._overview.server}{f' ({remark})' if remark else ''}"))
        for export in self._overview.exports:
            branch = root.add(Text(_describe_export(export, clients.export(export["id"]))))
            self._add(branch, Child("", export["node-name"]))
        for job in self._overview.jobs:
            branch = root.add(Text(_describe_job(job)))
            for child in _distinct(self._overview.edges.of_jobs.get(job.id, ())):
                self._add(branch, child)
        self._add_unused(root)
        return root

    def _add(self, branch: Tree, child: Child) -> None:
        label = f"{child.name} ▸ " if child.name else ""
        node = self._overview.nodes.get(child.node)
        if node is None:  # gone between two questions
            branch.add(Text(f"{label}{child.node}"))
        elif node.name in self._drawn:
            branch.add(Text(f"{label}{node.name} (see above)"))
        else:
            self._drawn.add(node.name)
            children = self._overview.edges.of_nodes.get(node.name, ())
            twig = branch.add(Text(label + _describe_node(node, is_leaf=not children)))
            for below in children:
                self._add(twig, below)

    def _add_unused(self, root: Tree) -> None:
        names = list(self._unused())
        if names:
            branch = root.add(Text("not used by an export or job"))
            for name in names:
                self._add(branch, Child("", name))

    def _unused(self) -> Iterator[str]:
        """Nodes that nothing drawn so far leads to, but for those below others of them."""
        edges = self._overview.edges.of_nodes
        children = {child.node for below in edges.values() for child in below}
        for name in self._overview.nodes:
            if name not in self._drawn and name not in children:
                yield name


def _distinct(children: Iterable[Child]) -> list[Child]:
    """One edge per node: a job holds some nodes by several edges, to keep others away."""
    first: dict[str, Child] = {}
    for child in children:
        first.setdefault(child.node, child)
    return list(first.values())


def _describe_node(node: BlockNode, *, is_leaf: bool) -> str:
    parts = [f"{node.name}: {node.driver}", format_size(node.size)]
    if node.is_read_only:
        parts.append("read-only")
    # The others repeat the name of a child, or have one made up from options: "json:{...}".
    if is_leaf and node.filename and not node.filename.startswith("json:"):
        parts.append(node.filename)
    return ", ".join(parts)


def _describe_export(export: Mapping[str, Any], state: ExportState) -> str:
    parts = [export["type"]]
    if export["shutting-down"]:
        parts.append("shutting down")
    parts += state.describe(export["id"])
    return f"export {export['id']} ({', '.join(parts)})"


def _describe_job(job: JobRow) -> str:
    parts = [job.type, job.status, f"{job.percent:.0f} %"]
    if job.error is not None:
        parts.append(job.error)
    return f"job {job.id} ({', '.join(parts)})"
