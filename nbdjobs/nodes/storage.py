# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""An open file or block device, and what it can do. Every method is a plain call that may wait.

`FileStorage` and `DeviceStorage` differ in what may be opened, how large it is, and how it
forgets content; `file.FileNode` decides where and when these methods are called.

Source: QEMU `block/file-posix.c` for which calls are tried in which order, and error texts.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import ClassVar, Final, NamedTuple, Self

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes import syscalls
from nbdjobs.nodes.bounce import BOUNCE, BounceBuffers
from nbdjobs.nodes.config import SECTOR, Limits, NodeConfig
from nbdjobs.nodes.residency import NOTHING_RESIDENT, Residency
from nbdjobs.nodes.rounding import round_up
from nbdjobs.nodes.syscalls import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    fallocate,
)

_PUNCH: Final = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_REFUSALS: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.ENODEV})
_TRIAL_ALIGNMENTS: Final = (1, 512, 1024, 2048, 4096)
_MAX_COPY: Final = 64 * 1024 * 1024


class Run(NamedTuple):
    """Bytes up to `end` that are all data, or all a hole."""

    end: int
    is_hole: bool


class FileStorage:
    """A regular file.

    Attributes:
        path: As the user gave it.
        fd: For reads.
        write_fd: For writes; -1 while it is open for reads only.
        size: Bytes, a multiple of 512.
        limits: What one request can take.
        is_direct: It is read and written past the page cache.
    """

    driver: ClassVar[str] = "file"

    def __init__(self, path: str, config: NodeConfig):
        """Open what is at `path`.

        Raises:
            CommandError: That is not possible, or it is not of the right kind.
        """
        self.path = path
        self.fd = self.write_fd = -1
        self.is_direct = config.cache.is_direct
        self._is_auto = config.is_auto_read_only and not config.is_read_only
        self._refused: set[int] = set()
        self._length = 0
        self._residency = NOTHING_RESIDENT
        self._bounce = BounceBuffers()
        try:
            self.fd = self._open(is_writable=not (config.is_read_only or self._is_auto))
            if not (config.is_read_only or self._is_auto):
                self.write_fd = self.fd
            self._check_kind(os.fstat(self.fd).st_mode)
            self._check_writable()
            self.size = self._find_size()
            self.limits = self._find_limits()
            self._residency = self._find_residency()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all descriptors."""
        self._residency.close()
        for fd in {self.fd, self.write_fd} - {-1}:
            os.close(fd)
        self.fd = self.write_fd = -1

    def reopen(self, config: NodeConfig) -> Self:
        """Open the same once more, to be used instead.

        Raises:
            CommandError: That is not possible, or something else has this path by now: the locks
                and all that is known are about what was opened first.
        """
        storage = type(self)(self.path, config)
        old, new = os.fstat(self.fd), os.fstat(storage.fd)
        if (old.st_dev, old.st_ino) != (new.st_dev, new.st_ino):
            storage.close()
            raise CommandError(f"Could not open '{self.path}': it is another file by now")
        return storage

    def look_anew(self) -> None:
        """Find the size that others have left; `CommandError` if that fails."""
        self.size = self._find_size()

    def open_for_locks(self) -> int:
        """Another descriptor of the same file, whose description owns the image locks."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    # Opening

    def make_writable(self) -> None:
        """Open for writing what was opened for reads only, because a writer comes.

        Raises:
            CommandError: It cannot be written.
        """
        if self.write_fd >= 0:
            return
        self.write_fd = self._open(is_writable=True)
        try:
            self._check_writable()
        except BaseException:
            self.make_read_only()
            raise

    def make_read_only(self) -> None:
        """Take back `make_writable`; no write may be under way."""
        if self._is_auto and self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1

    def _open(self, *, is_writable: bool) -> int:
        # Without O_NONBLOCK, opening a pipe by mistake would wait for somebody at its other end.
        flags = os.O_RDWR if is_writable else os.O_RDONLY
        flags |= os.O_CLOEXEC | os.O_NONBLOCK | (os.O_DIRECT if self.is_direct else 0)
        try:
            return os.open(self.path, flags)
        except OSError as error:
            reason = error.strerror
            if error.errno == errno.EINVAL and self.is_direct:
                reason = "filesystem does not support O_DIRECT"
            raise CommandError(f"Could not open '{self.path}': {reason}") from error
        except ValueError as error:  # a zero byte in the name
            raise CommandError(f"Could not open '{self.path}': {error}") from error

    def _check_kind(self, mode: int) -> None:
        if not stat.S_ISREG(mode):
            raise CommandError(
                f"'{self.driver}' driver requires '{self.path}' to be a regular file"
            )

    def _check_writable(self) -> None:
        """Refuse storage that opens for writing and then fails every write."""

    def _find_size(self) -> int:
        try:
            self._length = os.lseek(self.fd, 0, os.SEEK_END)
            return round_up(self._length, SECTOR)
        except OSError as error:
            raise CommandError(f"Could not refresh total sector count: {error.strerror}") from error

    def _find_limits(self) -> Limits:
        return Limits(request_alignment=self._find_alignment())

    def _find_alignment(self) -> int:
        if not self.is_direct:
            return 1
        return syscalls.direct_io_alignment(self.fd) or self._try_alignments()

    def _try_alignments(self) -> int:
        """The smallest unit that a read of the file's beginning accepts.

        One that accepts even single bytes has not touched the device: the file begins with a
        hole, or is empty. Then only the largest unit that fits is safe.
        """
        safe = _TRIAL_ALIGNMENTS[-1] if self.size % _TRIAL_ALIGNMENTS[-1] == 0 else SECTOR
        with self._bounce.borrow() as buffer:
            for alignment in _TRIAL_ALIGNMENTS:
                try:
                    os.preadv(self.fd, (buffer[:alignment],), 0)
                except OSError:
                    continue
                return alignment if alignment > 1 else safe
        raise CommandError("Could not find working O_DIRECT alignment")

    # Reading and writing

    @property
    def allocated_size(self) -> int:
        """Bytes of storage that it takes up."""
        return os.fstat(self.fd).st_blocks * 512

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`; what lies beyond the end of the file is zeroes."""
        done = 0
        while done < len(buffer):
            count = self._read_some(offset + done, buffer[done:])
            done += count
            # A direct read that stops inside a unit has met the end: the next would be refused.
            if not count or count % self.limits.request_alignment:
                self._check_end(offset + done)
                buffer[done:] = bytes(len(buffer) - done)
                return

    def _check_end(self, offset: int) -> None:
        """Refuse to take for zeroes what somebody else has cut off from the file.

        Raises:
            OSError: The file ends at `offset`, and was longer when it was opened.
        """
        if offset < self._length:
            raise OSError(errno.EIO, f"'{self.path}' has been truncated")

    def is_cached(self, offset: int, length: int) -> bool:
        """Whether the page cache has all of a range, so that nobody waits for the storage."""
        is_in_file = offset + length <= (self._length or self.size)
        return is_in_file and self._residency.covers(offset, length)

    def grew(self, end: int) -> None:
        """Take note that a write has made a file longer."""
        self._length = end
        self.size = round_up(end, SECTOR)
        if end > self._residency.size and not self.is_direct:
            # More than is needed now, so that this does not come again soon.
            self._residency.close()
            self._residency = Residency(self.fd, 2 * end)

    def _find_residency(self) -> Residency:
        if self.is_direct:
            return NOTHING_RESIDENT
        # Not the end of a last sector that the file does not have.
        return Residency(self.fd, self._length or self.size)

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data`; the file grows if it has to."""
        done = 0
        while done < len(data):
            done += self._write_some(offset + done, data[done:])

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        try:
            return os.preadv(self.fd, (buffer,), offset)
        except OSError as error:
            if not self.is_direct or error.errno != errno.EINVAL:
                raise
        # Some devices take only aligned memory: that is what the refusal means.
        with self._bounce.borrow() as bounce:
            count = os.preadv(self.fd, (bounce[: min(len(buffer), BOUNCE)],), offset)
            buffer[:count] = bounce[:count]
        return count

    def _write_some(self, offset: int, data: memoryview) -> int:
        try:
            return os.pwritev(self.write_fd, (data,), offset)
        except OSError as error:
            if not self.is_direct or error.errno != errno.EINVAL:
                raise
        with self._bounce.borrow() as bounce:
            length = min(len(data), BOUNCE)
            bounce[:length] = data[:length]
            return os.pwritev(self.write_fd, (bounce[:length],), offset)

    def truncate(self, size: int) -> None:
        """Make the file `size` bytes long; `CommandError` if that fails."""
        try:
            os.ftruncate(self.write_fd, size)
        except OSError as error:
            raise CommandError(f"Could not resize file: {error.strerror}") from error
        self.size = self._find_size()
        self._residency.close()
        self._residency = self._find_residency()

    def sync(self) -> None:
        """Bring all completed writes to stable storage."""
        os.fdatasync(self.fd)

    # Holes

    def zero(self, offset: int, length: int, *, may_unmap: bool, fast_only: bool) -> None:
        """Make a range read as zeroes without writing them.

        Raises:
            NodeError: ENOTSUP, because the storage cannot.
        """
        if may_unmap and self._fallocate(_PUNCH, offset, length):
            return
        if self._fallocate(FALLOC_FL_ZERO_RANGE, offset, length):
            return
        # A hole that is then allocated again reads as zeroes and keeps its space.
        if self._fallocate(_PUNCH, offset, length) and self._fallocate(0, offset, length):
            return
        raise NodeError(errno.ENOTSUP)

    def discard(self, offset: int, length: int) -> None:
        """Drop the content of a range; `NodeError` ENOTSUP where the storage cannot."""
        if not self._fallocate(_PUNCH, offset, length):
            raise NodeError(errno.ENOTSUP)

    def run_at(self, offset: int) -> Run:
        """The run that begins at `offset`, up to its real end."""
        try:
            data = os.lseek(self.fd, offset, os.SEEK_DATA)
            if data > offset:
                return Run(min(data, self.size), is_hole=True)
            return Run(self._end_of_data(os.lseek(self.fd, offset, os.SEEK_HOLE)), is_hole=False)
        except OSError as error:
            if error.errno != errno.ENXIO:  # the file system knows no holes
                return Run(self.size, is_hole=False)
        # No data from here to the end.
        self._check_end(os.lseek(self.fd, 0, os.SEEK_END))
        return Run(self.size, is_hole=True)

    def _end_of_data(self, hole: int) -> int:
        """A file that ends inside a sector has data up to that sector's end."""
        return min(round_up(hole, SECTOR), self.size)

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """Whether the storage did it; one that says it never can is not asked again."""
        if mode in self._refused:
            return False
        try:
            fallocate(self.write_fd, mode, offset, length)
        except OSError as error:
            if error.errno in _REFUSALS:
                self._refused.add(mode)
            elif error.errno != errno.EINVAL:
                raise
            return False
        return True

    def copy_to(self, offset: int, target: Self, target_offset: int, length: int) -> bool:
        """Let the kernel copy a range; returns whether it copied all of it."""
        while length:
            count = os.copy_file_range(
                self.fd, target.write_fd, min(length, _MAX_COPY), offset, target_offset
            )
            if not count:
                return False
            offset, target_offset, length = offset + count, target_offset + count, length - count
        return True


class DeviceStorage(FileStorage):
    """A block device, or a character device that can seek.

    Attributes:
        is_rotational: It is a spinning disk.
    """

    driver: ClassVar[str] = "host_device"

    is_rotational = False

    def _check_kind(self, mode: int) -> None:
        if not (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)):
            raise CommandError(
                f"'{self.driver}' driver requires '{self.path}' to be either a character or block"
                " device"
            )
        self._is_block = stat.S_ISBLK(mode)

    def _check_writable(self) -> None:
        if (
            self.write_fd < 0
            or not self._is_block
            or not syscalls.is_device_read_only(self.write_fd)
        ):
            return
        raise CommandError(f"The device is not writable: {os.strerror(errno.EACCES)}")

    def _find_size(self) -> int:
        return syscalls.device_size(self.fd) if self._is_block else super()._find_size()

    def _find_limits(self) -> Limits:
        if not self._is_block:
            return super()._find_limits()
        self.is_rotational = bool(syscalls.queue_limit(self.fd, "rotational"))
        sector = syscalls.device_sector(self.fd)
        # Longer requests are split by the kernel, and splitting them here has its price: the
        # largest request matters only where each of ours becomes one of the device's.
        most = syscalls.queue_limit(self.fd, "max_sectors_kb") * 1024 if self.is_direct else 0
        return Limits(
            request_alignment=sector if self.is_direct else 1,
            max_transfer=most,
            opt_transfer=syscalls.queue_limit(self.fd, "optimal_io_size"),
            min_io=syscalls.queue_limit(self.fd, "minimum_io_size"),
            pdiscard_alignment=max(syscalls.queue_limit(self.fd, "discard_granularity"), sector),
            pwrite_zeroes_alignment=sector,
        )

    def truncate(self, size: int) -> None:
        """Devices do not change: one may be larger than wanted, but not smaller."""
        if size > self.size:
            raise CommandError("Cannot grow device files")

    def zero(self, offset: int, length: int, *, may_unmap: bool, fast_only: bool) -> None:
        """Zero a range; punching is fast, what the kernel does else need not be."""
        if not self._is_block:
            raise NodeError(errno.ENOTSUP)
        if may_unmap and self._fallocate(_PUNCH, offset, length):
            return
        # The kernel writes the zeroes itself where the device cannot: that need not be fast.
        if fast_only:
            raise NodeError(errno.ENOTSUP)
        try:
            syscalls.device_zero(self.write_fd, offset, length)
        except OSError as error:
            raise _refusal_or(error) from error

    def discard(self, offset: int, length: int) -> None:
        """Discard a range; `NodeError` ENOTSUP where the device cannot."""
        if not self._is_block:
            raise NodeError(errno.ENOTSUP)
        try:
            syscalls.device_discard(self.write_fd, offset, length)
        except OSError as error:
            raise _refusal_or(error) from error

    def run_at(self, offset: int) -> Run:
        """Devices know no holes: everything is data."""
        return Run(self.size, is_hole=False)


def _refusal_or(error: OSError) -> NodeError:
    if error.errno in _REFUSALS:
        return NodeError(errno.ENOTSUP)
    return NodeError.from_os_error(error)
