# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What reaches the file in which order, so that a crash at any instant only leaks clusters.

Guest data and the content of new L2 tables are written at once, to clusters that nothing on
stable storage refers to. Changes of refcounts and of the mapping collect in memory. A commit
writes them in two steps, with a flush as the barrier after each:

    1. refcounts; and with the flush, the guest data and new tables written before
    2. changed parts of L2 tables, and of the L1 table

Whatever part of a step survives a crash, no entry refers to a cluster that is not counted, or
whose content is not there; and a new table is empty or a copy until its entries come.

Step 2 writes what the tables said when the commit began. An entry that came later may be about
data that the flush of step 1 did not cover, so it waits for the next commit.

What commits make free is counted off only afterwards (`reclaim`), so refcounts are never too low.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Final

from nbdjobs.errors import NodeError
from nbdjobs.nodes.flusher import Flusher
from nbdjobs.nodes.qcow2.constants import ENTRY_SIZE
from nbdjobs.nodes.qcow2.errors import CorruptionError
from nbdjobs.nodes.qcow2.files import Files, bytes_of
from nbdjobs.nodes.qcow2.header_file import HeaderFile
from nbdjobs.nodes.qcow2.reclaim import Freed, Reclaim
from nbdjobs.nodes.qcow2.refcounts import Refcounts
from nbdjobs.nodes.qcow2.tables import Tables

logger = logging.getLogger(__name__)

_LONGEST_WRITE: Final = 1024 * 1024


class Committer:
    """Brings the metadata of one image to stable storage.

    Args:
        files: The image's nodes.
        header: Where the L1 table's place is written down.
        refcounts: What is written first.
        tables: What is written then.
        reclaim: Learns what is stable.
        cluster_bits: Size of a cluster, as a power of two.
        on_freed: Called before clusters become free.
        is_lazy: Refcounts are not written: the image is marked as dirty.
    """

    def __init__(
        self,
        files: Files,
        header: HeaderFile,
        refcounts: Refcounts,
        tables: Tables,
        reclaim: Reclaim,
        *,
        cluster_bits: int,
        on_freed: Callable[[], None],
        is_lazy: bool,
    ):
        self._files = files
        self._header = header
        self._refcounts = refcounts
        self._tables = tables
        self._reclaim = reclaim
        self._cluster_bits = cluster_bits
        self._on_freed = on_freed
        self._is_lazy = is_lazy
        self._flusher = Flusher(self._commit, is_failure_final=False)
        self.changed = self._flusher.wrote

    async def run(self) -> None:
        """Make all changes of metadata so far stable, and the guest data that they are about.

        Cancelling leaves a commit under way alone.

        Raises:
            NodeError: It failed; the changes are kept for another try.
        """
        await self._flusher.flush()

    async def idle(self) -> None:
        """Wait until no commit is under way."""
        await self._flusher.idle()

    async def _commit(self) -> None:
        tables = self._tables
        freed = self._reclaim.begin_commit()
        slices, tables.dirty = tables.dirty, {}
        sectors, tables.dirty_l1 = tables.dirty_l1, set()
        writes = []
        for number, slice_ in slices.items():
            slice_.is_dirty, slice_.is_pinned = False, True
            writes.append((tables.slice_offset(number), bytes_of(slice_.words)))
        l1_offset = self._header.header.l1_offset
        writes += [(l1_offset + first * ENTRY_SIZE, tables.l1_sector(first)) for first in sectors]
        try:
            await self._write(sorted(writes))
        except BaseException:
            for number, slice_ in slices.items():
                slice_.is_dirty = True
                tables.dirty[number] = slice_
            tables.dirty_l1 |= sectors
            self._reclaim.commit_failed(freed)
            raise
        finally:
            for slice_ in slices.values():
                slice_.is_pinned = False
        self._reclaim.committed(freed)
        await self.reclaim()

    async def _write(self, writes: list[tuple[int, bytes]]) -> None:
        if not self._is_lazy:
            await self._refcounts.write_back()
        await self._files.flush()
        for offset, data in _merged(writes):
            await self._files.write(offset, data)
        await self._files.file.flush()

    async def reclaim(self) -> None:
        """Count off what nothing refers to any more, and let the storage discard it."""
        await self.count_off(self._reclaim.ready())

    async def count_off(self, freed: list[Freed]) -> None:
        """Likewise for references that are not on stable storage, and that no request knows."""
        if freed:
            self._on_freed()
        for each in freed:
            try:
                await self._count_off(each)
            except (NodeError, CorruptionError) as error:
                # It only occupies space, and a check finds it.
                logger.warning("clusters could not be made free: %s", error)

    async def _count_off(self, freed: Freed) -> None:
        for first, count in await self._runs_to_discard(freed):
            # Before they are counted off: afterwards they may be in use again.
            await self._files.file.pdiscard(
                first << self._cluster_bits, count << self._cluster_bits
            )
        await self._refcounts.add(freed.first, freed.clusters, -1)

    async def _runs_to_discard(self, freed: Freed) -> list[tuple[int, int]]:
        """Those of the clusters that nobody else uses, where they follow each other."""
        runs: list[tuple[int, int]] = []
        if not freed.may_discard:
            return runs
        for cluster in range(freed.first, freed.first + freed.clusters):
            if await self._refcounts.count(cluster) != 1:
                continue
            if runs and sum(runs[-1]) == cluster:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((cluster, 1))
        return runs


def _merged(writes: list[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Join writes that follow each other; they come sorted."""
    pending: list[bytes] = []
    begin = end = 0
    for offset, data in writes:
        if pending and (offset != end or end - begin >= _LONGEST_WRITE):
            yield begin, b"".join(pending)
            pending = []
        if not pending:
            begin = end = offset
        pending.append(data)
        end += len(data)
    if pending:
        yield begin, b"".join(pending)
