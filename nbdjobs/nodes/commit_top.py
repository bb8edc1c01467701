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
from typing import ClassVar

from nbdjobs.errors import NodeError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.graph import Edge
from nbdjobs.nodes.job_filter import JobFilter
from nbdjobs.nodes.permissions import Permission


class CommitTop(JobFilter):
    """The filter; nobody can write through it."""

    driver: ClassVar[str] = "commit_top"

    def child_permissions(
        self, edge: Edge, needed: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """None, and everything."""
        return permissions.NONE, permissions.ALL

    async def _pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        raise NodeError(errno.EPERM, "an image that is being committed cannot be written")
