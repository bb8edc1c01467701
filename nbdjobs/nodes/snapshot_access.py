# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`snapshot-access`: the content of a disk at one instant, as a node to read from.

    guest ────▶ copy-before-write ──file──▶ disk        the disk goes on being written,
                 ▲         └───────target──▶ scratch
    backup ──▶ snapshot-access                          and here is what it held

The instant is the one at which the copy-before-write node was put above the disk. A discard here
says that a part is not needed any more: its copy is dropped, and nothing of it is saved from then
on.

Source: QEMU qapi/block-core.json (snapshot-access) and `block/snapshot-access.c` for the behaviour.
"""

from __future__ import annotations

import errno
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from nbdjobs.errors import NodeError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.copy_before_write import CopyBeforeWrite
from nbdjobs.nodes.driver import ChildReference, DriverNode
from nbdjobs.nodes.gate import Operation
from nbdjobs.nodes.graph import Edge, Role
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.options import BlockdevOptions, BlockdevRef
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.point_in_time import PointInTime
from nbdjobs.nodes.status import BlockStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotAccessOptions(BlockdevOptions):
    """Options of the driver (QAPI `BlockdevOptionsGenericFormat`).

    Attributes:
        file: The copy-before-write node.
    """

    file: BlockdevRef


class SnapshotAccess(DriverNode[SnapshotAccessOptions]):
    """The driver `snapshot-access`.

    It has neither `pread_now` nor `stored_at`, on purpose: a read has to freeze its range until it
    has the content, and what the kernel sends out of a page cache later may be new by then.
    """

    driver: ClassVar[str] = "snapshot-access"
    options_type: ClassVar[type[BlockdevOptions]] = SnapshotAccessOptions

    @classmethod
    def children_of(cls, options: SnapshotAccessOptions) -> tuple[ChildReference, ...]:
        """The one child, named in the options."""
        return (ChildReference("file", options.file, Role.DATA),)

    @classmethod
    async def open(
        cls,
        name: str,
        config: NodeConfig,
        options: SnapshotAccessOptions,
        children: Mapping[str, Node],
    ) -> Self:
        """Make the node; whether the child has a snapshot, requests will show, as in QEMU."""
        return cls(name, config)

    @property
    def size(self) -> int:
        """Bytes of the disk at that instant."""
        file = self._file
        return file.snapshot.size if isinstance(file, CopyBeforeWrite) else file.size

    @property
    def filename(self) -> str:
        """Where the disk's content is."""
        return self._file.filename

    @property
    def _file(self) -> Node:
        return self.edges["file"].node

    @property
    def _snapshot(self) -> PointInTime:
        file = self._file
        if not isinstance(file, CopyBeforeWrite):
            raise NodeError(errno.ENOTSUP, f"node '{file.name}' keeps no snapshot")
        return file.snapshot

    def child_permissions(
        self, edge: Edge, needed: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """None: what is read here, the disk's users cannot change."""
        return permissions.NONE, permissions.ALL

    def _pread(self, offset: int, buffer: memoryview) -> Operation:
        return self._snapshot.pread(offset, buffer)

    async def _pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        raise NodeError(errno.ENOTSUP, "a snapshot cannot be written")

    async def _pdiscard(self, offset: int, length: int) -> None:
        file = self._file
        if isinstance(file, CopyBeforeWrite):
            await file.discard_snapshot(offset, length)

    def _block_status(self, offset: int, length: int) -> Coroutine[Any, Any, BlockStatus]:
        return self._snapshot.block_status(offset, length)

    async def cache(self, offset: int, length: int) -> None:
        """Nothing to do, but to say if the range cannot be read at all."""
        self._snapshot.check_readable(offset, offset + length)
