# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What the NBD server needs to know of a disk: the seam between the wire and the block graph.

The protocol package stands below the block graph, so it names here what it calls, and the graph
fits it (`nbdjobs.nodes.device.Device` is a `Backend`).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

Request = Coroutine[Any, Any, None]
"""A block operation under way; it raises `NodeError` when it fails."""


class Extent(NamedTuple):
    """One run of a metadata context: `length` bytes (at least 1) with the same `flags`."""

    length: int
    flags: int


class FileRange:
    """Bytes of a file that the kernel sends from its page cache: a piece of a reply.

    Attributes:
        fd: Descriptor of the file.
        offset: First byte.
        length: Bytes.
    """

    __slots__ = ("fd", "length", "offset")

    def __init__(self, fd: int, offset: int, length: int):
        self.fd = fd
        self.offset = offset
        self.length = length

    def __len__(self) -> int:
        return self.length


class Backend(Protocol):
    """The operations of the disk behind an export.

    Offsets and lengths are bytes and inside `[0, size)`: the server has checked them. Buffers
    are borrowed until the coroutine returns. Every operation raises `NodeError` when it fails.
    """

    @property
    def size(self) -> int:
        """Bytes of the disk now."""
        ...

    def pread(self, offset: int, buffer: memoryview) -> Request:
        """Fill `buffer` with the content from `offset` on."""
        ...

    def pread_now(self, offset: int, buffer: memoryview, data_only: bool) -> bool:
        """Do a read on the spot, if that needs no wait; most reads of a busy disk need none.

        Args:
            offset: First byte.
            buffer: Filled, if the answer is True; else it holds anything.
            data_only: Leave the read alone if the range may hold holes.

        Returns:
            Whether the read is done. If not, whatever the reason, `pread` has to be called.
        """
        ...

    def stored_at(self, offset: int, length: int, data_only: bool) -> FileRange | None:
        """Tell where the kernel can send a range from at once; it then counts as read.

        The answer is good until the caller gives up control.

        Args:
            offset: First byte.
            length: Bytes, at least 1.
            data_only: Leave the range alone if it may hold holes.

        Returns:
            None if the range has to be read, whatever the reason.
        """
        ...

    def note_hole(self, length: int, duration_s: float) -> None:
        """Take account of a read that was answered by telling of a hole.

        Args:
            length: Bytes of the hole.
            duration_s: Seconds that it took to find out.
        """
        ...

    def pwrite_now(self, offset: int, data: memoryview) -> bool:
        """Do a write on the spot, if that needs no wait; most writes into a page cache need none.

        Args:
            offset: First byte; the range is inside the disk.
            data: What to write, at least 1 byte.

        Returns:
            Whether the write is done. If not, whatever the reason, `pwrite` has to be called;
            some of the data may be written already.
        """
        ...

    def pwrite(self, offset: int, data: memoryview, *, fua: bool = False) -> Request:
        """Write `data` at `offset`; with `fua`, return only when it is on stable storage."""
        ...

    def pwrite_zeroes(
        self,
        offset: int,
        length: int,
        *,
        fua: bool = False,
        may_unmap: bool = True,
        fast_only: bool = False,
    ) -> Request:
        """Make the range read as zeroes.

        Args:
            offset: First byte.
            length: Bytes, at least 1.
            fua: Return only when the zeroes are on stable storage.
            may_unmap: The range may become a hole.
            fast_only: Fail at once with ENOTSUP, changing nothing, unless this is faster than
                writing zero bytes.
        """
        ...

    def pdiscard(self, offset: int, length: int, *, fua: bool = False) -> Request:
        """Tell the disk that the content of the range is no longer wanted."""
        ...

    def flush(self) -> Request:
        """Bring all completed writes to stable storage."""
        ...

    def cache(self, offset: int, length: int) -> Request:
        """Bring the range into a cache, if the disk has one."""
        ...

    def is_known_data(self, offset: int, length: int) -> bool:
        """Whether the range is known to hold no holes; False when that is not known."""
        ...

    def when_all_wait(self, callback: Callable[[], None]) -> None:
        """If requests are held back now, call as soon as all that are begun wait to be let in."""
        ...


class MetaContext(Protocol):
    """A metadata context that an export offers (NBD specification, "Metadata querying")."""

    @property
    def name(self) -> str:
        """Full name, such as `base:allocation`."""
        ...

    def extents(
        self, offset: int, length: int, limit: int
    ) -> Coroutine[Any, Any, Sequence[Extent]]:
        """Describe the range by its first extents.

        Args:
            offset: First byte.
            length: Bytes, at least 1.
            limit: The most extents to return, at least 1.

        Returns:
            Consecutive extents from `offset` on, at least one; they may end before the range
            does, and never after it.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A disk as it is offered to NBD clients under a name.

    Attributes:
        name: What clients ask for; "" is the default export.
        backend: The disk.
        description: A sentence for humans, or "".
        is_writable: Whether clients may change the disk.
        is_rotational: Whether the medium is known to rotate.
        can_multi_conn: Whether a flush on one connection covers what all connections wrote.
        minimum_block_size: Smallest unit of offset and length, a power of two from 1 to 64 KiB.
        preferred_block_size: Unit of efficient requests, a power of two from 512 on.
        maximum_payload: Most bytes of data in one request or reply.
        contexts: Metadata contexts on offer. The one named `base:allocation`, if present,
            also tells the server which parts of a read are holes.
    """

    name: str
    backend: Backend
    description: str = ""
    is_writable: bool = False
    is_rotational: bool = False
    can_multi_conn: bool = True
    minimum_block_size: int = 1
    preferred_block_size: int = 4096
    maximum_payload: int = 32 * 1024 * 1024
    contexts: Sequence[MetaContext] = ()
