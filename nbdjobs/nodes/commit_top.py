# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A filter above images that are being committed: it asks nothing of what is below.

While a commit is under way, the images below do not each show a disk by themselves any more; only
what the filter's users see is consistent. They are told so by permissions: the job lets nobody
else read these images, and the filter needs no permission to.

Source: QEMU `block/commit.c` (commit_top) for the behaviour.
"""

from __future__ import annotations

import errno
from collections.abc import Coroutine
from typing import Any, ClassVar

from nbdjobs.errors import NodeError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.gate import Operation
from nbdjobs.nodes.graph import Edge
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.status import BlockStatus
from nbdjobs.protocol.export import FileRange

CHILD = "backing"
"""What the filter calls the node below it."""


class CommitTop(Node):
    """The filter; nobody can write through it."""

    driver: ClassVar[str] = "commit_top"
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

    def child_permissions(
        self, edge: Edge, needed: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """None, and everything."""
        return permissions.NONE, permissions.ALL

    def pread_now(self, offset: int, buffer: memoryview, data_only: bool) -> bool:
        """Read from below."""
        return self._below.pread_now(offset, buffer, data_only)

    def stored_at(self, offset: int, length: int, data_only: bool) -> FileRange | None:
        """Where the node below stores it."""
        return self._below.stored_at(offset, length, data_only)

    def _pread(self, offset: int, buffer: memoryview) -> Operation:
        return self._below.pread(offset, buffer)

    async def _pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        raise NodeError(errno.EPERM, "an image that is being committed cannot be written")

    def _block_status(self, offset: int, length: int) -> Coroutine[Any, Any, BlockStatus]:
        return self._below.block_status(offset, length)

    def is_known_data(self, offset: int, length: int) -> bool:
        """What the node below knows."""
        return self._below.is_known_data(offset, length)
