# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What the filters of jobs have in common: they show the node below, and read from it.

What becomes of writes, and what is asked of the node below, is each filter's own.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, ClassVar, Final

from nbdjobs.nodes.gate import Operation
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.status import BlockStatus
from nbdjobs.protocol.export import FileRange

CHILD: Final = "backing"
"""What such a filter calls the node below it."""


class JobFilter(Node):
    """A filter that a job puts above a disk."""

    is_filter: ClassVar[bool] = True

    @property
    def _below(self) -> Node:
        return self.edges[CHILD].node

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._below.size

    @property
    def filename(self) -> str:
        """Where the content is."""
        return self._below.filename

    @property
    def content_options(self) -> dict[str, object]:
        """Those of the node below."""
        return self._below.content_options

    @property
    def cluster_size(self) -> int:
        """That of the node below."""
        return self._below.cluster_size

    @property
    def filtered(self) -> Node | None:
        """The node below, whose content the filter shows."""
        return self._below

    def is_known_data(self, offset: int, length: int) -> bool:
        """What the node below knows."""
        return self._below.is_known_data(offset, length)

    def pread_now(self, offset: int, buffer: memoryview, data_only: bool) -> bool:
        """Read from below."""
        return self._below.pread_now(offset, buffer, data_only)

    def stored_at(self, offset: int, length: int, data_only: bool) -> FileRange | None:
        """Where the node below stores it."""
        return self._below.stored_at(offset, length, data_only)

    def _pread(self, offset: int, buffer: memoryview) -> Operation:
        return self._below.pread(offset, buffer)

    def _block_status(self, offset: int, length: int) -> Coroutine[Any, Any, BlockStatus]:
        return self._below.block_status(offset, length)
