# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Initialization vectors: 16 bytes for each sector, made from its number.

Source: the Linux kernel's dm-crypt, which gave them their names.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from nbdjobs.errors import CommandError
from nbdjobs.nodes.crypto.algorithms import AES_KEYS, digest, hash_named

IvGenerator = Callable[[int, int], bytes]
"""Takes the number of the first sector and how many there are; returns their vectors in a row."""

LENGTH = 16


def plain64(first: int, count: int) -> bytes:
    """The numbers themselves, little-endian."""
    words = array("Q", bytes(LENGTH * count))
    words[::2] = array("Q", range(first, first + count))
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def plain(first: int, count: int) -> bytes:
    """The lower 32 bits of the numbers, so that they come again after 2 TiB."""
    parts = []
    while count:
        within = first & 0xFFFF_FFFF
        length = min(count, (1 << 32) - within)
        parts.append(plain64(within, length))
        first, count = first + length, count - length
    return b"".join(parts)


def essiv(key: bytes, hash_name: str) -> IvGenerator:
    """The numbers encrypted with a hash of the key, so that nobody else can foretell them.

    Raises:
        CommandError: The hash makes no key for AES, in QEMU's words.
    """
    salt = digest(hash_named(hash_name), key)
    if len(salt) not in AES_KEYS.values():
        raise CommandError(f"No AES cipher with key size {len(salt)} available")
    encryptor = Cipher(algorithms.AES(salt), modes.ECB()).encryptor()

    def generate(first: int, count: int) -> bytes:
        return encryptor.update(plain64(first, count))

    return generate
