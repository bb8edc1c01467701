# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Compressed clusters of an open image: reading them, and finding room for new ones.

Compressed clusters are packed one behind the other, so several share a host cluster, which
counts each of them as a user. The work itself is done in threads, for it takes long.
"""

from __future__ import annotations

import asyncio
import errno
from functools import partial
from typing import Final

from nbdjobs.errors import NodeError
from nbdjobs.nodes.events import DebugEvent
from nbdjobs.nodes.qcow2.compression import compress, decompress
from nbdjobs.nodes.qcow2.constants import OFFSET_MASK, CompressionType
from nbdjobs.nodes.qcow2.files import Files
from nbdjobs.nodes.qcow2.geometry import Geometry
from nbdjobs.nodes.qcow2.refcounts import Refcounts
from nbdjobs.nodes.workers import Workers

_KEPT: Final = 4


class CompressedClusters:
    """The compressed clusters of one image.

    Args:
        geometry: Of the image.
        files: Its nodes.
        refcounts: Gives room.
        kind: How clusters are compressed.
        name: Of the node, for its threads.
    """

    def __init__(
        self,
        geometry: Geometry,
        files: Files,
        refcounts: Refcounts,
        kind: CompressionType,
        name: str,
    ):
        self._geometry = geometry
        self._files = files
        self._refcounts = refcounts
        self._kind = kind
        self._workers = Workers(name)
        self._recent: dict[int, bytes] = {}
        self._packing = asyncio.Lock()
        self._next_byte = 0

    def close(self) -> None:
        """Let the threads go."""
        self._workers.close()

    def forget(self) -> None:
        """Host clusters become free: what they held before counts no more."""
        self._recent.clear()
        self._next_byte = 0

    async def read(self, entry: int) -> bytes:
        """Get the whole cluster that an L2 entry describes.

        Raises:
            NodeError: It cannot be read, or is damaged.
        """
        known = self._recent.get(entry)
        if known is not None:
            return known
        offset, length = self._geometry.unpack_compressed(entry)
        file = self._files.file
        if file.takes_debug_events:
            await file.debug_event(DebugEvent.READ_COMPRESSED)
        data = await self._files.read(offset, length)
        size = self._geometry.cluster_size
        content = await self._workers.run(partial(decompress, self._kind, data, size))
        while len(self._recent) >= _KEPT:
            del self._recent[next(iter(self._recent))]
        self._recent[entry] = content
        return content

    def users(self, entry: int) -> tuple[int, int]:
        """The first host cluster that a compressed cluster uses, and how many they are."""
        offset, length = self._geometry.unpack_compressed(entry)
        first = offset >> self._geometry.cluster_bits
        return first, ((offset + length - 1) >> self._geometry.cluster_bits) - first + 1

    async def write(self, content: memoryview) -> int | None:
        """Compress a whole cluster and write it somewhere.

        Returns:
            The L2 entry for it, which nothing refers to yet; None if it does not get smaller.
        """
        packed = await self._workers.run(partial(compress, self._kind, content))
        if packed is None:
            return None
        async with self._packing:
            offset = await self._find_room(len(packed))
            entry = self._geometry.pack_compressed(offset, len(packed))
        file = self._files.file
        if file.takes_debug_events:
            await file.debug_event(DebugEvent.WRITE_COMPRESSED)
        try:
            await self._files.write(offset, packed)
        except BaseException:
            self._refcounts.release(*self.users(entry))
            raise
        return entry

    async def _find_room(self, length: int) -> int:
        """Choose where so many bytes go, and count a user of the clusters there."""
        offset = await self._begin_of_room(length)
        limit = min(1 << self._geometry.size_shift, OFFSET_MASK)
        if offset + length > limit:
            raise NodeError(errno.EFBIG)
        self._next_byte = offset + length
        return offset

    async def _begin_of_room(self, length: int) -> int:
        bits = self._geometry.cluster_bits
        while True:
            offset = self._next_byte
            room = -offset % self._geometry.cluster_size
            if room >= length and await self._join(offset):
                return offset
            if self._next_byte == offset:
                break
        new, _ = await self._refcounts.allocate(1)
        self._refcounts.claim_virgin(new, 1)
        if room and new == (offset >> bits) + 1 and await self._join(offset):
            return offset
        return new << bits

    async def _join(self, offset: int) -> bool:
        """Become a user of the cluster where the last bytes went, if that is still possible.

        It may have become free since then, and hold anything now: `forget` tells.
        """
        if not offset:
            return False
        cluster = offset >> self._geometry.cluster_bits
        users = await self._refcounts.count(cluster)
        if self._next_byte != offset or not 0 < users < self._geometry.max_refcount:
            return False
        # Nothing waits here: the counter was looked at just now.
        await self._refcounts.add(cluster, 1, 1)
        return True
