# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""CBC: each block is mixed with the encrypted one before it, the first with the vector.

encrypted[n] = AES(plain[n] ^ encrypted[n - 1])
"""

from __future__ import annotations

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from nbdjobs.nodes.crypto.block_cipher import (
    BLOCK,
    SECTOR,
    Aes,
    BlockCipher,
    CipherContext,
    xor_into,
)
from nbdjobs.nodes.crypto.ivgen import IvGenerator


class Cbc(BlockCipher):
    """AES in CBC mode."""

    def __init__(self, key: bytes, ivs: IvGenerator):
        super().__init__(ivs)
        self._aes = Aes(key)
        self._cipher = Cipher(algorithms.AES(key), modes.CBC(bytes(BLOCK)))
        self._out = memoryview(bytearray(SECTOR + BLOCK - 1))

    def _encrypt(self, ivs: bytes, buffer: memoryview) -> None:
        """Go through the sectors one by one: no block can be encrypted before the one before it.

        Setting up the library for a vector costs more than encrypting a sector, so it goes on
        with one chain. The last block before the sector, which comes in with that, is taken out.
        """
        encryptor: CipherContext = self._cipher.encryptor()
        last: bytes | memoryview = bytes(BLOCK)
        for number, begin in enumerate(range(0, len(buffer), SECTOR)):
            sector = buffer[begin : begin + SECTOR]
            iv = ivs[BLOCK * number : BLOCK * (number + 1)]
            mixed = _number(sector[:BLOCK]) ^ _number(iv) ^ _number(last)
            sector[:BLOCK] = mixed.to_bytes(BLOCK, "little")
            encryptor.update_into(sector, self._out)
            sector[:] = self._out[:SECTOR]
            last = sector[-BLOCK:]

    def _decrypt(self, ivs: bytes, buffer: memoryview) -> None:
        before = bytearray(len(buffer))
        before[BLOCK:] = buffer[:-BLOCK]
        words, vectors = memoryview(before).cast("Q"), memoryview(ivs).cast("Q")
        words[:: SECTOR // 8] = vectors[::2]
        words[1 :: SECTOR // 8] = vectors[1::2]
        self._aes.decrypt(buffer)
        xor_into(buffer, before)


def _number(block: bytes | memoryview) -> int:
    return int.from_bytes(block, "little")
