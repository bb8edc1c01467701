# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Ciphers for disks: each sector of 512 bytes by itself, with its own initialization vector.

A request is worked on in chunks, and within a chunk all sectors at once: a call into the library
costs more than what it does to a few hundred bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Final, Protocol

from bitarray import bitarray
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from nbdjobs.nodes.crypto.ivgen import IvGenerator

SECTOR: Final = 512
BLOCK: Final = 16

CHUNK: Final = 128 * 1024
"""Bytes worked on at once: with what is made beside them they stay in the processor's cache."""


class BlockCipher(ABC):
    """Encrypts and decrypts sectors in place."""

    def __init__(self, ivs: IvGenerator):
        self._ivs = ivs

    def encrypt(self, offset: int, buffer: memoryview) -> None:
        """Encrypt whole sectors.

        Args:
            offset: Where on the disk they are, which decides their vectors; a multiple of 512.
            buffer: Their content, writable; its length is a multiple of 512.
        """
        assert not (offset | len(buffer)) % SECTOR
        for begin in range(0, len(buffer), CHUNK):
            part = buffer[begin : begin + CHUNK]
            self._encrypt(self._ivs((offset + begin) // SECTOR, len(part) // SECTOR), part)

    def decrypt(self, offset: int, buffer: memoryview) -> None:
        """Decrypt whole sectors; as for `encrypt`."""
        assert not (offset | len(buffer)) % SECTOR
        for begin in range(0, len(buffer), CHUNK):
            part = buffer[begin : begin + CHUNK]
            self._decrypt(self._ivs((offset + begin) // SECTOR, len(part) // SECTOR), part)

    @abstractmethod
    def _encrypt(self, ivs: bytes, buffer: memoryview) -> None:
        """Encrypt up to `CHUNK` bytes, given the vectors of their sectors."""

    @abstractmethod
    def _decrypt(self, ivs: bytes, buffer: memoryview) -> None:
        """Decrypt likewise."""


class CipherContext(Protocol):
    """A cipher at work, as far as it is used here.

    The library takes any buffer; what its versions declare differs, and some say `bytes`.
    """

    def update_into(self, data: Any, buf: Any, /) -> int:
        """Encrypt or decrypt `data` into `buf`; returns how many bytes came out."""
        ...


class Aes:
    """The bare cipher on up to `CHUNK` bytes of blocks that do not hang together."""

    def __init__(self, key: bytes):
        cipher = Cipher(algorithms.AES(key), modes.ECB())
        self._encryptor: CipherContext = cipher.encryptor()
        self._decryptor: CipherContext = cipher.decryptor()
        # The library wants room for a block that might be left over from the call before.
        self._out = memoryview(bytearray(CHUNK + BLOCK - 1))

    def encrypt(self, buffer: memoryview) -> None:
        """Encrypt in place."""
        buffer[:] = self._out[: self._encryptor.update_into(buffer, self._out)]

    def decrypt(self, buffer: memoryview) -> None:
        """Decrypt in place."""
        buffer[:] = self._out[: self._decryptor.update_into(buffer, self._out)]


def xor_into(buffer: memoryview | bytearray, other: bytes | bytearray | memoryview) -> None:
    """Change each bit of `buffer` where `other`, of the same length, has a bit set."""
    bits = bitarray(buffer=buffer)
    bits ^= bitarray(buffer=other)


class Ecb(BlockCipher):
    """Every block by itself, whatever the sector: equal blocks look equal."""

    def __init__(self, key: bytes, ivs: IvGenerator):
        super().__init__(ivs)
        self._aes = Aes(key)

    def _encrypt(self, ivs: bytes, buffer: memoryview) -> None:
        self._aes.encrypt(buffer)

    def _decrypt(self, ivs: bytes, buffer: memoryview) -> None:
        self._aes.decrypt(buffer)
