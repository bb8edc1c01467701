# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Nodes: the elements of the block graph.

A request comes in at a root (`device.Device` for exports, the job for jobs), which checks the
bounds and can hold it back. From there it passes from node to node, through the gate in front of
each of them (`gate.Gate`). Here is what a node is besides: its place in the graph, what it tells
about itself, and what it needs of others.
"""

from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING, ClassVar, Final

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.config import MAX_SIZE, NO_LIMITS, Limits, NodeConfig
from nbdjobs.nodes.events import DebugEvent
from nbdjobs.nodes.gate import Gate
from nbdjobs.nodes.op_blockers import OpBlockers
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.status import Status

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nbdjobs.nodes.graph import Edge

JSON: Final = "json:"
_ALLOCATED_BIT: Final = int(Status.ALLOCATED)


class Node(Gate):
    """One element of the block graph.

    Attributes:
        name: Unique in the graph; names that begin with "#" are given by the graph.
        edges: The nodes this one uses, by edge name ("file", "target", ...).
        parents: The uses of this node.
        op_blockers: Commands that uses of this node rule out.
        is_owned_by_user: Added by name; kept until it is deleted by name.
        inline_parent: The node in whose options this one was described, as far as it still is.
        was_writable: Its users may still write, and a change under way makes it read-only.
    """

    driver: ClassVar[str]
    """Name of the driver, as in `blockdev-add`."""

    is_filter: ClassVar[bool] = False
    """Whether the node shows the content of one child, unchanged."""

    is_format: ClassVar[bool] = False
    """Whether the driver interprets a child instead of storing bytes itself."""

    is_encrypted: bool = False
    """Whether what the driver stores is encrypted."""

    supports_compressed_writes: ClassVar[bool] = False

    supports_backing: ClassVar[bool] = False
    """Whether it can show the content of a backing node where it has none."""

    takes_debug_events: ClassVar[bool] = False
    """Whether users of this node should tell it by `debug_event` what they are about to do."""

    # What few nodes have is set where it is needed: objects with more than 30 attributes of their
    # own are slower to read, and every request reads some.
    inline_parent: Node | None = None
    was_writable: bool = False

    def __init__(self, name: str, config: NodeConfig, limits: Limits = NO_LIMITS):
        super().__init__(config, limits)
        self.name = name
        self.edges: dict[str, Edge] = {}
        self.parents: list[Edge] = []
        self.op_blockers = OpBlockers(name)
        self.is_owned_by_user = False

    # What it is

    @property
    def filename(self) -> str:
        """Where the content is, as a human would name it."""
        return ""

    @property
    def content_options(self) -> dict[str, object]:
        """The options that decide what the content is, named as in QAPI."""
        children = {
            name: edge.node.content_options for name, edge in self.edges.items() if edge.is_primary
        }
        return {"driver": self.driver, **children}

    @property
    def has_plain_filename(self) -> bool:
        """Whether `filename` is more than the options written out."""
        return not self.filename.startswith(JSON)

    @property
    def names_its_backing(self) -> bool:
        """Whether opening the image by its name opens the backing node that it has now, too."""
        return True

    @property
    def json_filename(self) -> str:
        """Those options as the name of what no path can name."""
        return JSON + json.dumps(self.content_options)

    @property
    def is_read_only(self) -> bool:
        """Whether writes are refused."""
        return self.config.is_read_only

    @property
    def cluster_size(self) -> int:
        """Bytes that are allocated together, or 0 where that has no meaning."""
        return 0

    @property
    def allocated_size(self) -> int | None:
        """Bytes that the content takes up in storage, or None where nobody knows."""
        return total_size(edge.node.allocated_size for edge in self.edges.values())

    @property
    def filtered(self) -> Node | None:
        """The node whose content this one shows, if it is a filter."""
        return None

    @property
    def highest_offset_written(self) -> int:
        """Where the furthest write so far ended, as far as that is known: at storage."""
        shown = next((edge.node for edge in self.edges.values() if edge.is_primary), None)
        return shown.highest_offset_written if self.is_filter and shown is not None else 0

    @property
    def is_rotational(self) -> bool:
        """Whether the content is on a spinning disk, where seeking is slow."""
        return any(edge.node.is_rotational for edge in self.edges.values() if edge.is_primary)

    def describe(self) -> str:
        """What error messages call this node as a user of other nodes."""
        return f"node '{self.name}'"

    # What users of it need of its children

    def child_permissions(
        self, edge: Edge, needed: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """What this node needs of the child on `edge`, and shares, given what its own users do.

        Args:
            edge: The edge to the child.
            needed: All that the users of this node need.
            shared: What all users of this node let others do.
        """
        return needed, shared

    def check_permissions(self, needed: Permission, shared: Permission) -> None:
        """Refuse permissions that this node cannot give, by raising `CommandError`.

        What it acquires here stays acquired until `apply_permissions` says what counts.
        """
        if needed & permissions.CHANGES and not self.is_active:
            words = permissions.describe(needed & permissions.CHANGES)
            raise CommandError(f"Permission '{words}' unavailable on inactive node")
        if needed & permissions.WRITES and self.is_read_only:
            if self.was_writable:
                raise CommandError(
                    f"Read-only block node '{self.name}' cannot support read-write users"
                )
            raise CommandError("Block node is read-only")
        # A write to the last, incomplete block would have to go beyond the end.
        cannot_grow = Permission.WRITE in needed and Permission.RESIZE not in needed
        if cannot_grow and self.size % self.limits.request_alignment:
            raise CommandError(
                "Cannot get 'write' permission without 'resize': Image size is not a multiple of"
                " request alignment"
            )

    def apply_permissions(self, needed: Permission, shared: Permission) -> None:
        """Take note of what users need and share from now on."""

    # What is not a request to the driver

    def begin_writeback(self, offset: int, length: int) -> None:
        """Let the storage begin to make completed writes stable, without waiting for it.

        A hint: who has written much and will flush later has less to wait for then.
        """

    async def cache(self, offset: int, length: int) -> None:
        """Bring the range into a cache, if there is one."""
        for edge in self.edges.values():
            if edge.is_primary:
                await edge.node.cache(offset, length)

    def is_known_data(self, offset: int, length: int) -> bool:
        """Whether the range is known, without waiting, to hold no holes."""
        return False

    async def allocation(self, offset: int, length: int) -> tuple[bool, int]:
        """Whether this node itself determines the content of a range, not a backing node.

        Returns:
            The answer for the first run of the range, and that run's length.
        """
        found, status = await self.block_status(offset, length)
        return bool(int(status) & _ALLOCATED_BIT), found

    async def change_backing_file(self, name: str | None, driver: str | None) -> None:
        """Write into the image what its backing file is called; the graph stays as it is.

        Args:
            name: The file's name, or None for no backing file.
            driver: Its format; None to leave that open.

        Raises:
            NodeError: It cannot be written; ENOTSUP where images have no backing files.
        """
        raise NodeError(errno.ENOTSUP)

    async def copy_range(self, offset: int, target: Node, target_offset: int, length: int) -> None:
        """Let the storage itself copy a range to another node.

        Raises:
            NodeError: ENOTSUP where the two nodes cannot do that; the caller reads and writes.
        """
        raise NodeError(errno.ENOTSUP)

    async def pwrite_compressed(self, offset: int, data: memoryview) -> None:
        """Write clusters compressed, where `supports_compressed_writes` says so.

        Args:
            offset: A multiple of the cluster size.
            data: Whole clusters, but for the last one of the disk.
        """
        raise NodeError(errno.ENOTSUP)

    async def truncate(self, size: int) -> None:
        """Make the node `size` bytes long; what is new reads as zeroes, where the storage can.

        To be called with the permission to resize, inside a drained section.

        Raises:
            CommandError: That is not possible, in QEMU's words.
        """
        if size > MAX_SIZE:
            raise CommandError(f"offset({size}) exceeds maximum({MAX_SIZE})")
        if self.is_read_only:
            raise CommandError("Image is read-only")
        await self._truncate(size)

    async def _truncate(self, size: int) -> None:
        """Change the size; filters let their child do it."""
        if self.filtered is None:
            raise CommandError("Image format driver does not support resize")
        await self.filtered.truncate(size)

    # While the graph changes

    def begin_drain(self) -> None:
        """Keep no request waiting that could go on, until as many `end_drain` have come.

        Whoever sent them is held back, and the graph waits for them to end.
        """

    def end_drain(self) -> None:
        """Take back one `begin_drain`."""

    def begin_shutdown(self) -> None:
        """Keep no request waiting any more, whatever for: the node is about to be closed."""
        self.begin_drain()

    async def settled(self) -> None:
        """Wait until no request is in flight that the node sent by itself, for nobody above it.

        Comes while all above the node is held back, so that no new one begins.
        """

    async def hand_over(self) -> None:
        """Bring everything to storage, as another process goes on from there; no request is here.

        Raises:
            NodeError: It cannot be written.
        """
        await self.flush()

    async def look_anew(self) -> None:
        """Forget what another process may have changed while the node was inactive.

        Raises:
            CommandError: What is there now cannot be used.
        """

    def storage_at(self, offset: int) -> tuple[Node, int]:
        """The node that stores the byte, and where: itself, unless it only passes requests on."""
        return self, offset

    async def debug_event(self, event: DebugEvent) -> None:
        """Take note of what a user of this node is about to do (see `takes_debug_events`).

        It may hold the user for a while, who has its request in flight.
        """

    async def close(self) -> None:
        """Let go of what the node holds; no request is in flight, no parent is left."""


def total_size(sizes: Iterable[int | None]) -> int | None:
    """The sum, which nobody knows if one of them is not known."""
    known = 0
    for size in sizes:
        if size is None:
            return None
        known += size
    return known
