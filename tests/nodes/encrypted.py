# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Encrypted volumes for tests, made at once: passwords are hashed as little as can be."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from nbdjobs.nodes.crypto import luks
from nbdjobs.nodes.crypto.algorithms import QCryptoHashAlgorithm
from nbdjobs.nodes.crypto.block_cipher import BlockCipher
from nbdjobs.nodes.crypto.luks import FilledSlot
from nbdjobs.nodes.crypto.spec import CipherSpec

SPEC: Final = CipherSpec.parse("aes", "xts-plain64", 32)


@lru_cache
def new_volume(password: bytes) -> tuple[FilledSlot, BlockCipher]:
    """Header and first key of a volume, and the cipher for its payload."""
    filled = luks.new_volume(SPEC, QCryptoHashAlgorithm.SHA256, password, 0)
    key = luks.find_key(filled.header, filled.header.slots[0], filled.material, password)
    assert key is not None
    return filled, SPEC.cipher(key)


def volume_of_zeroes(size: int, password: bytes) -> bytes:
    """A whole volume whose payload of so many bytes reads as zeroes."""
    filled, cipher = new_volume(password)
    payload = bytearray(size)
    cipher.encrypt(0, memoryview(payload))
    return filled.area() + payload
