# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Image locks: what one process does to an image file, told to the others.

Bit n of the permissions is a byte of the file. A shared lock on byte 100 + n says "I need it",
one on byte 200 + n says "I do not let others have it". Whoever wants a permission asks whether
anyone holds the opposite byte. The locks are of the open-file-description kind: two nodes of
one process exclude each other like two processes.

Source: QEMU `block/file-posix.c` (raw_check_lock_bytes and its constants) for the protocol.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final

from nbdjobs.errors import CommandError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.permissions import Permission

NEEDED_BASE: Final = 100
UNSHARED_BASE: Final = 200

_FLOCK: Final = struct.Struct("@hhqqi4x")
"""struct flock: type, whence, start, length, process."""


class ImageLock:
    """The locks that one node holds; closing the descriptor drops them all.

    Attributes:
        fd: Descriptor whose description owns the locks; nothing else may lock through it.
    """

    def __init__(self, fd: int):
        self.fd = fd
        self._needed = permissions.NONE
        self._unshared = permissions.NONE

    def acquire(self, needed: Permission, shared: Permission) -> None:
        """Take what is missing for these permissions, keeping what is held.

        Only what is new is compared with what others hold. Those who come later see the bytes
        held here and give way, but they lock their own before they look: a permission that was
        granted must not be lost to one who is just trying.

        Raises:
            CommandError: Another user of the image is in the way. What was taken on the way is
                given back by `settle`.
        """
        new_needed = needed & ~self._needed
        new_unshared = permissions.ALL & ~shared & ~self._unshared
        for permission in new_needed:
            self._lock(NEEDED_BASE + _bit(permission))
            self._needed |= permission
        for permission in new_unshared:
            self._lock(UNSHARED_BASE + _bit(permission))
            self._unshared |= permission
        for permission in new_needed:
            if self._is_held_by_others(UNSHARED_BASE + _bit(permission)):
                word = permissions.describe(permission)
                raise CommandError(f'Failed to get "{word}" lock')
        for permission in new_unshared:
            if self._is_held_by_others(NEEDED_BASE + _bit(permission)):
                word = permissions.describe(permission)
                raise CommandError(f'Failed to get shared "{word}" lock')

    def settle(self, needed: Permission, shared: Permission) -> None:
        """Give back all that these permissions do not ask for."""
        unshared = permissions.ALL & ~shared
        for permission in self._needed & ~needed:
            self._unlock(NEEDED_BASE + _bit(permission))
        for permission in self._unshared & ~unshared:
            self._unlock(UNSHARED_BASE + _bit(permission))
        self._needed &= needed
        self._unshared &= unshared

    def _lock(self, byte: int) -> None:
        try:
            self._control(fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
        except OSError as error:
            raise CommandError(f"Failed to lock byte {byte}") from error

    def _unlock(self, byte: int) -> None:
        self._control(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, byte)

    def _is_held_by_others(self, byte: int) -> bool:
        return self._control(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK

    def _control(self, command: int, kind: int, byte: int) -> int:
        """Issue one lock command on one byte; returns the lock type it leaves in the struct."""
        request = _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
        answer: int = _FLOCK.unpack(fcntl.fcntl(self.fd, command, request))[0]
        return answer


def is_supported(fd: int) -> bool:
    """Whether the file system of the open file has these locks."""
    request = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 1, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            return False
        raise
    return True


def _bit(permission: Permission) -> int:
    return permission.bit_length() - 1
