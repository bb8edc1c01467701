# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What both kinds of commit are: a sweep over a chain that nobody else may change."""

from __future__ import annotations

from nbdjobs.jobs.collection import Jobs
from nbdjobs.jobs.commit_images import CommitOptions
from nbdjobs.jobs.status import JobType
from nbdjobs.jobs.sweep import SweepJob
from nbdjobs.nodes import filters
from nbdjobs.nodes.backing_chain import edges_between, freeze, thaw
from nbdjobs.nodes.graph import Edge, Graph
from nbdjobs.nodes.job_filter import CHILD
from nbdjobs.nodes.node import Node


class ChainCommitJob(SweepJob):
    """A job with a filter on the uppermost image that is committed.

    Attributes:
        was_read_only: The base was not to be written before, and will not be after it, unless
            clients write it then.
        is_filter_in: Whether the filter is in the graph.
    """

    type = JobType.COMMIT
    was_read_only = False
    is_filter_in = False

    def __init__(
        self, jobs: Jobs, graph: Graph, options: CommitOptions, node: Node, top: Node, base: Node
    ):
        super().__init__(jobs, graph, options.job_id, options.job, options.on_error)
        self._top = top
        self._base = base
        self._head = node
        self._frozen: list[Edge] = []

    def freeze_chain(self) -> None:
        """Let nobody change the chain until `let_go`."""
        edges = edges_between(self._head, self._base)
        freeze(edges)
        self._frozen = edges

    def let_go(self) -> None:
        """End all uses of nodes, and of edges between them."""
        thaw(self._frozen)
        self._frozen = []
        super().let_go()

    def undo(self) -> None:
        """Take back what was done for the job, which has not started and will not."""
        self.let_go()
        if self.is_filter_in:
            filters.take_back(self._graph, self._head, child=CHILD)
        self.never_started()
