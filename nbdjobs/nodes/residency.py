# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Which bytes of a file are in the page cache, told without reading them.

The kernel sends what is there straight from the page cache, but for what is not there it makes
the caller wait for the disk. Asking first costs about 3 us for 64 KiB and 15 to 20 us for 1 MiB.

Source: mincore(2): pages count only when their content is there, not while it is being read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

_PAGE: Final = mmap.PAGESIZE
_MAX_PAGES: Final = 32 * 1024 * 1024 // _PAGE + 1
_MAX_MAPPED: Final = 1 << 44
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

# PyDLL keeps the interpreter lock: giving it up would cost more than the call.
_libc = ctypes.PyDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_mincore = _libc.mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)

# One byte for each page; calls do not overlap, since this is used in the event loop only.
_answer = bytearray(_MAX_PAGES)
_answer_address = ctypes.addressof(ctypes.c_char.from_buffer(_answer))


class Residency:
    """The part of one file that is in the page cache.

    The file is mapped, but no page of the mapping is ever touched, so it takes no memory.

    Attributes:
        size: Bytes mapped.
    """

    def __init__(self, fd: int, size: int):
        """Map `size` bytes; where that is not possible, nothing counts as resident.

        Args:
            fd: Descriptor of the file, not needed afterwards.
            size: Bytes of the file, at least as many as it has.
        """
        self.size = size
        self._address: int | None = None
        if 0 < size <= _MAX_MAPPED and _may_tell(fd):
            address = _mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
            self._address = None if address == _MAP_FAILED else address

    def covers(self, offset: int, length: int) -> bool:
        """Whether the whole range, of at most 32 MiB, is in the page cache and in the file."""
        if self._address is None or offset + length > self.size:
            return False
        first = offset & -_PAGE
        pages = (offset + length - first + _PAGE - 1) // _PAGE
        if _mincore(self._address + first, offset + length - first, _answer_address):
            return False
        return _answer.find(0, 0, pages) < 0

    def close(self) -> None:
        """Forget the file."""
        if self._address is not None:
            _munmap(self._address, self.size)
            self._address = None


NOTHING_RESIDENT: Final = Residency(-1, 0)


def _may_tell(fd: int) -> bool:
    """Whether the kernel tells us: to strangers it says of every page that it is there."""
    status = os.fstat(fd)
    return status.st_uid == os.geteuid() or os.access(f"/proc/self/fd/{fd}", os.W_OK)
