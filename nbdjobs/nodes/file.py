# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`file`: a disk in a regular file.

Reads try the page cache first and go to a thread only when it does not have the data. Writes,
zeroes and the search for holes are made inline while they prove fast (see `pace`). Past the
page cache (`cache.direct`), everything waits for the device and so happens in threads.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from os import RWF_NOWAIT, preadv, pwritev
from time import perf_counter_ns
from typing import ClassVar, Final, Self, TypeVar
from weakref import WeakSet

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes import image_lock, permissions
from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.data_map import DataMap
from nbdjobs.nodes.driver import DriverNode, Reopening
from nbdjobs.nodes.flusher import Flusher
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.image_lock import ImageLock
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.nodes.pace import SLOW_NS, Pace
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.rounding import round_down
from nbdjobs.nodes.status import DATA, HOLE, BlockStatus
from nbdjobs.nodes.storage import FileStorage, Run
from nbdjobs.nodes.syscalls import begin_writeback
from nbdjobs.nodes.tracked import Kind
from nbdjobs.nodes.workers import Workers
from nbdjobs.protocol.export import FileRange
from nbdjobs.qapi.types import features, member

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_INLINE: Final = 1024 * 1024
"""Longer writes would keep the event loop for longer than is fair, even into the page cache."""

READ_IN_THREAD: Final = 512 * 1024
"""Reads from this length on are made in a thread: while it copies out of the page cache, the
event loop sends what was read before, and others get their turn."""

_COPY_REFUSALS: Final = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL})


class OnOffAuto(StrEnum):
    """QAPI `OnOffAuto`."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class AioBackend(StrEnum):
    """QAPI `BlockdevAioOptions`: accepted, and all the same here."""

    THREADS = "threads"
    NATIVE = "native"
    IO_URING = "io_uring"


@features("dynamic-auto-read-only")
@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions(BlockdevOptions):
    """Options of the drivers `file` and `host_device` (QAPI `BlockdevOptionsFile`).

    Attributes:
        filename: Path of the file.
        pr_manager: Name of a persistent reservation manager; there are none.
        locking: Whether to tell other processes what is done to the image; "auto" does where
            the file system can.
        aio: Accepted, with the condition that QEMU puts on "native".
        aio_max_batch: Accepted without effect.
        drop_cache: Accepted without effect, it is about live migration.
        x_check_cache_dropped: Likewise.
    """

    filename: str
    pr_manager: str | None = None
    locking: OnOffAuto = OnOffAuto.AUTO
    aio: AioBackend = AioBackend.THREADS
    aio_max_batch: int = 0
    drop_cache: bool = True
    x_check_cache_dropped: bool = field(
        default=False, metadata=member("x-check-cache-dropped", features=("unstable",))
    )


@dataclass(slots=True)
class DiscardStats:
    """QAPI `BlockStatsSpecificFile`."""

    discard_nb_ok: int = 0
    discard_nb_failed: int = 0
    discard_bytes_ok: int = 0


class FileNode(DriverNode[FileOptions]):
    """The driver `file`.

    Attributes:
        discard_stats: How many discards the storage was asked for, and what came of them.
    """

    driver: ClassVar[str] = "file"
    options_type: ClassVar[type[BlockdevOptions]] = FileOptions
    storage_type: ClassVar[type[FileStorage]] = FileStorage
    _is_writing_back = False
    creates_images: ClassVar[bool] = True
    mutable_options: ClassVar[frozenset[str] | None] = frozenset(
        {"drop-cache", "x-check-cache-dropped"}
    )

    def __init__(
        self,
        name: str,
        config: NodeConfig,
        storage: FileStorage,
        workers: Workers,
        lock: ImageLock | None,
    ):
        super().__init__(name, config, storage.limits)
        self.discard_stats = DiscardStats()
        self._workers = workers
        self._lock = lock
        self._reading, self._writing, self._punching, self._seeking = (Pace() for _ in range(4))
        self._highest_written = 0
        self._flusher = Flusher(lambda: self._in_thread(self._storage.sync))
        self._use(storage)

    @classmethod
    async def open(
        cls, name: str, config: NodeConfig, options: FileOptions, children: Mapping[str, Node]
    ) -> Self:
        """Open the file, and the descriptor for its locks."""
        check_options(cls.driver, options, config)
        workers = Workers(name)
        opened: list[FileStorage] = []
        try:
            # A network file system may take its time even for this.
            await workers.run(lambda: opened.append(cls.storage_type(options.filename, config)))
            lock = _lock_for(opened[0], options.locking)
        except BaseException:
            for storage in opened:
                storage.close()
            workers.close()
            raise
        return cls(name, config, opened[0], workers, lock)

    # Going on with other options

    async def prepare_reopen(
        self, graph: Graph, config: NodeConfig, options: FileOptions
    ) -> Reopening[FileOptions]:
        """Open the file once more, if it has to be open in another way."""
        check_options(self.driver, options, config)
        if storage_mode(config) == storage_mode(self.config):
            return Reopening(self, config, options)
        opened: list[FileStorage] = []
        try:
            await self._workers.run(lambda: opened.append(self._storage.reopen(config)))
            # A hint to write back is in no request's way, but uses the descriptor.
            await self._workers.idle()
        except BaseException:
            for storage in opened:
                storage.close()
            raise
        return _FileReopening(self, config, options, opened[0])

    async def look_anew(self) -> None:
        """Find the size, and know nothing of holes."""
        await self._in_thread(self._storage.look_anew)
        self._data_map = DataMap(self._storage.size)

    def swap(self, storage: FileStorage) -> FileStorage:
        """Go on with another storage of the same file; returns the one used before."""
        before = self._storage
        self._use(storage)
        self.set_limits(storage.limits)
        return before

    def _use(self, storage: FileStorage) -> None:
        self._storage = storage
        self._fd = storage.fd
        self._is_direct = storage.is_direct
        self._tries_page_cache = not storage.is_direct
        # Lost writes are the page cache's: only those that go through it are beyond repair.
        self._flusher.is_failure_final = not storage.is_direct
        self._data_map = DataMap(storage.size)
        self._no_copies_to: WeakSet[FileNode] = WeakSet()

    # What it is

    @property
    def size(self) -> int:
        """Bytes of the file, rounded up to 512."""
        return self._storage.size

    @property
    def filename(self) -> str:
        """Path, as the user gave it."""
        return self._storage.path

    @property
    def content_options(self) -> dict[str, object]:
        """Driver and path."""
        return {"driver": self.driver, "filename": self._storage.path}

    @property
    def file_id(self) -> tuple[int, int]:
        """Device and inode of the file."""
        status = os.fstat(self._storage.fd)
        return status.st_dev, status.st_ino

    @property
    def highest_offset_written(self) -> int:
        """Where the furthest write so far ended; on a device, more need not be provided."""
        return self._highest_written

    @property
    def allocated_size(self) -> int:
        """Bytes of storage that the file takes up."""
        return self._storage.allocated_size

    def is_known_data(self, offset: int, length: int) -> bool:
        """What earlier looks at the file and writes have taught."""
        return self._data_map.knows(offset, length)

    async def cache(self, offset: int, length: int) -> None:
        """Tell the kernel to read the range ahead."""
        if not self._is_direct:
            await self._in_thread(
                partial(os.posix_fadvise, self._fd, offset, length, os.POSIX_FADV_WILLNEED)
            )

    async def close(self) -> None:
        """Close the descriptors; the locks go with the last of them.

        What nobody has flushed is flushed first, as in QEMU: it is the last chance to hear that
        writes were lost.
        """
        try:
            await self.flush()
        except NodeError as error:
            logger.error("%s: flushing failed at the end: %s", self.filename, error)
        await self._flusher.idle()
        self._workers.close()
        self._storage.close()
        if self._lock is not None:
            os.close(self._lock.fd)

    # Permissions

    def check_permissions(self, needed: Permission, shared: Permission) -> None:
        """Open for writing and lock the image as far as the users need it."""
        super().check_permissions(needed, shared)
        if needed & permissions.CHANGES:
            self._storage.make_writable()
        if self._lock is not None:
            self._lock.acquire(needed, shared)

    def apply_permissions(self, needed: Permission, shared: Permission) -> None:
        """Give back the locks and the right to write that nobody needs any more."""
        if self._lock is not None:
            self._lock.settle(needed, shared)
        if not needed & permissions.CHANGES and not self._workers.busy:
            self._storage.make_read_only()

    # Reading and writing

    async def _pread(self, offset: int, buffer: memoryview) -> None:
        done = 0
        if self._tries_page_cache and len(buffer) < READ_IN_THREAD:
            try:
                done = preadv(self._fd, (buffer,), offset, RWF_NOWAIT)
            except BlockingIOError:
                pass
            except OSError as error:
                # The file system does not know the flag; other failures come again below.
                self._tries_page_cache = error.errno != errno.EOPNOTSUPP
            if done == len(buffer):
                return
        read = partial(self._storage.read, offset + done, buffer[done:])
        if self._tries_page_cache:
            await self._in_thread(read, offset)
        else:
            await self._paced(self._reading, read, offset)

    def pread_now(self, offset: int, buffer: memoryview, data_only: bool) -> bool:
        """Read from the page cache if it has all of it."""
        length = len(buffer)
        if (
            not self._tries_page_cache
            or not self._reads_pass
            or length >= READ_IN_THREAD
            or (data_only and not self._data_map.knows(offset, length))
        ):
            return False
        try:
            return preadv(self._fd, (buffer,), offset, RWF_NOWAIT) == length
        except OSError:
            return False  # `pread` meets it again, and knows what to do about it

    def stored_at(self, offset: int, length: int, data_only: bool) -> FileRange | None:
        """Tell of a range that the page cache has all of."""
        if (
            self._is_direct
            or not self._reads_pass
            or (data_only and not self._data_map.knows(offset, length))
            or not self._storage.is_cached(offset, length)
        ):
            return None
        return FileRange(self._fd, offset, length)

    async def _pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        length = len(data)
        done = 0
        if not self._writing.is_fast or self._is_direct or length > MAX_INLINE:
            write = partial(self._storage.write, offset, data)
            await self._paced(self._writing, write, offset, may_be_inline=length <= MAX_INLINE)
        else:
            begun = perf_counter_ns()
            try:
                done = pwritev(self._storage.write_fd, (data,), offset)
            except OSError as error:
                raise NodeError.from_os_error(error, offset=offset) from error
            if perf_counter_ns() - begun > SLOW_NS:
                self._writing.strike()
            if done < length:
                await self._in_thread(partial(self._storage.write, offset + done, data[done:]))
        self._wrote(offset, length)
        if fua:
            await self.flush()

    def pwrite_now(self, offset: int, data: memoryview) -> bool:
        """Write into the page cache, as long as that proves fast."""
        length = len(data)
        if (
            not self._writes_pass
            or not self._writing.is_fast
            or self._is_direct
            or length > MAX_INLINE
        ):
            return False
        begun = perf_counter_ns()
        try:
            done = pwritev(self._storage.write_fd, (data,), offset)
        except OSError:
            return False  # `pwrite` meets it again, and knows what to do about it
        if perf_counter_ns() - begun > SLOW_NS:
            self._writing.strike()
        if done < length:
            return False  # `pwrite` writes all of it once more
        self._wrote(offset, length)
        return True

    def _wrote(self, offset: int, length: int) -> None:
        """Take note of what has been written."""
        self._flusher.wrote()
        end = offset + length
        if end > self._highest_written:
            self._highest_written = end
        if end > self._storage.size:
            self._grew(end)
        if length >= self._data_map.granule:
            self._data_map.add(offset, end)

    async def _pwrite_zeroes(
        self, offset: int, length: int, fua: bool, may_unmap: bool, fast_only: bool
    ) -> None:
        zero = partial(self._storage.zero, offset, length, may_unmap=may_unmap, fast_only=fast_only)
        await self._punch(zero, offset, length)
        self._highest_written = max(self._highest_written, offset + length)
        if fua:
            await self.flush()

    def _grew(self, end: int) -> None:
        """Take note of a write beyond the end, as formats do; a device would have refused it."""
        self._storage.grew(end)
        self._data_map.grow(self._storage.size)

    async def _pdiscard(self, offset: int, length: int) -> None:
        stats = self.discard_stats
        try:
            await self._punch(partial(self._storage.discard, offset, length), offset, length)
        except NodeError:
            stats.discard_nb_failed += 1
            raise
        stats.discard_nb_ok += 1
        stats.discard_bytes_ok += length

    async def _punch(self, call: Callable[[], None], offset: int, length: int) -> None:
        try:
            await self._paced(self._punching, call, offset)
        finally:
            # Afterwards, since a look at the file meanwhile may have seen the old content.
            self._data_map.remove(offset, offset + length)
            self._flusher.wrote()

    async def _truncate(self, size: int) -> None:
        await self._in_thread(partial(self._storage.truncate, size))
        self._data_map = DataMap(self._storage.size)
        self._flusher.wrote()

    async def _flush(self) -> None:
        await self._flusher.flush()

    def begin_writeback(self, offset: int, length: int) -> None:
        """Let the kernel begin to write out what is in its page cache."""
        if self._is_direct or self._is_writing_back or self.config.cache.is_no_flush:
            return
        self._is_writing_back = True
        self._workers.post(partial(self._write_back, offset, length))

    def _write_back(self, offset: int, length: int) -> None:
        try:
            begin_writeback(self._storage.write_fd, offset, length)
        finally:
            self._is_writing_back = False

    # Holes

    async def _block_status(self, offset: int, length: int) -> BlockStatus:
        run = await self._paced(self._seeking, partial(self._look, offset), offset)
        return BlockStatus(min(run.end - offset, length), HOLE if run.is_hole else DATA)

    def _look(self, offset: int) -> Run:
        """Find the run at `offset`; of data, learn as much as the file system tells."""
        run = self._storage.run_at(offset)
        if not run.is_hole:
            begin = round_down(offset, self._data_map.granule)
            before = self._storage.run_at(begin) if begin < offset else run
            is_joined = not before.is_hole and before.end >= run.end
            self._data_map.add(begin if is_joined else offset, run.end)
        return run

    # Copying inside the kernel

    async def copy_range(self, offset: int, target: Node, target_offset: int, length: int) -> None:
        """Let the kernel copy to another file; a pair that it refuses is not tried again."""
        file, file_offset = target.storage_at(target_offset)
        if not isinstance(file, FileNode) or file in self._no_copies_to or file.write_threshold:
            raise NodeError(errno.ENOTSUP)
        alignment = max(self.limits.request_alignment, file.limits.request_alignment)
        if (offset | file_offset | length) % alignment:
            raise NodeError(errno.ENOTSUP)
        if file.limits.request_alignment == 1:
            await self._copy(offset, file, file_offset, length)
            return
        async with file.tracked.request(file_offset, length, Kind.WRITE, is_serialising=False):
            await self._copy(offset, file, file_offset, length)

    async def _copy(self, offset: int, target: FileNode, target_offset: int, length: int) -> None:
        copy = partial(self._storage.copy_to, offset, target._storage, target_offset, length)
        try:
            is_complete = await self._in_thread(copy, offset)
        except NodeError as error:
            if error.errno not in _COPY_REFUSALS:
                raise
            self._no_copies_to.add(target)
            raise NodeError(errno.ENOTSUP) from error
        finally:
            # The kernel may have copied holes as holes.
            target._data_map.remove(target_offset, target_offset + length)
            target._flusher.wrote()
        target._highest_written = max(target._highest_written, target_offset + length)
        if not is_complete:  # the source ends before the range does
            raise NodeError(errno.ENOTSUP)

    # Where calls are made

    async def _in_thread(self, call: Callable[[], T], offset: int | None = None) -> T:
        try:
            return await self._workers.run(call)
        except OSError as error:
            raise NodeError.from_os_error(error, offset=offset) from error

    async def _paced(
        self, pace: Pace, call: Callable[[], T], offset: int, *, may_be_inline: bool = True
    ) -> T:
        if may_be_inline and not self._is_direct and pace.may_run_inline():
            try:
                return pace.watch(call)
            except OSError as error:
                raise NodeError.from_os_error(error, offset=offset) from error
        try:
            return await self._in_thread(call, offset)
        finally:
            pace.thread_returned()


class _FileReopening(Reopening[FileOptions]):
    _node: FileNode

    def __init__(
        self, node: FileNode, config: NodeConfig, options: FileOptions, storage: FileStorage
    ):
        super().__init__(node, config, options)
        self._unused = storage
        self._is_swapped = False

    def commit(self) -> None:
        super().commit()
        self._swap()

    def abort(self) -> None:
        super().abort()
        if self._is_swapped:
            self._swap()

    def _swap(self) -> None:
        self._unused = self._node.swap(self._unused)
        self._is_swapped = not self._is_swapped

    async def finish(self) -> None:
        await super().finish()
        self._unused.close()


def storage_mode(config: NodeConfig) -> tuple[bool, bool, bool]:
    """What of a node's options decides how its file is open."""
    return config.is_read_only, config.is_auto_read_only, config.cache.is_direct


def check_options(driver: str, options: FileOptions, config: NodeConfig) -> None:
    """Refuse options that cannot be or do not go together, before anything is opened.

    Raises:
        CommandError: In QEMU's words.
    """
    if not options.filename:
        raise CommandError(f"The '{driver}' block driver requires a file name")
    if options.aio is AioBackend.NATIVE and not config.cache.is_direct:
        raise CommandError(
            "aio=native was specified, but it requires cache.direct=on, which was not specified."
        )
    if options.pr_manager is not None:
        raise CommandError(f"No persistent reservation manager with id '{options.pr_manager}'")


def _lock_for(storage: FileStorage, locking: OnOffAuto) -> ImageLock | None:
    if locking is OnOffAuto.OFF:
        return None
    try:
        fd = storage.open_for_locks()
    except OSError as error:
        raise CommandError(f"Could not open '{storage.path}': {error.strerror}") from error
    if locking is OnOffAuto.AUTO and not image_lock.is_supported(fd):
        os.close(fd)
        return None
    return ImageLock(fd)
