# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Keys made from passwords, slowly on purpose: PBKDF2.

These functions take their time without holding the interpreter, so they belong into a thread.

Source: the LUKS on-disk format; how iterations are counted is QEMU's, from its storage daemon.
"""

from __future__ import annotations

import time
from typing import Final

from cryptography.hazmat.primitives.hashes import HashAlgorithm
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

from nbdjobs.errors import CommandError

MIN_ITERATIONS: Final = 1000

MAX_ITERATIONS: Final = 1 << 28
"""More of them, minutes of work, are no protection but an attack of who made the image."""

_FIRST_TRY: Final = 1 << 13
_LONG_ENOUGH_S: Final = 0.05
_UINT32_MAX: Final = (1 << 32) - 1


def derive(
    algorithm: HashAlgorithm, password: bytes, salt: bytes, iterations: int, length: int
) -> bytes:
    """The key of `length` bytes that belongs to a password."""
    return PBKDF2HMAC(algorithm, length, salt, iterations).derive(password)


def iterations_for(
    algorithm: HashAlgorithm, password: bytes, salt: bytes, length: int, milliseconds: int
) -> int:
    """How many iterations this machine does in some time, but at least `MIN_ITERATIONS`.

    Only the time of this thread counts: a busy machine must not make for weak keys.

    Raises:
        CommandError: There would be more than the format can tell.
    """
    if not 0 <= milliseconds <= _UINT32_MAX:
        raise CommandError(f"PBKDF time of {milliseconds} ms is out of range")
    count, taken = _FIRST_TRY, 0.0
    while milliseconds and taken < _LONG_ENOUGH_S:
        count *= 2
        begin = time.thread_time()
        derive(algorithm, password, salt, count, length)
        taken = time.thread_time() - begin
    wanted = int(count * milliseconds / 1000 / taken) if milliseconds else 0
    if wanted > MAX_ITERATIONS:
        raise _too_many(wanted)
    return max(wanted, MIN_ITERATIONS)


def _too_many(iterations: int) -> CommandError:
    return CommandError(f"PBKDF iterations {iterations} larger than {MAX_ITERATIONS}")
