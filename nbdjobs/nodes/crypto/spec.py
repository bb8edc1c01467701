# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What a header says of the cipher: "aes" with so many bytes of key, and "xts-plain64"."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Self, TypeVar, assert_never

from nbdjobs.errors import CommandError
from nbdjobs.nodes.crypto import ivgen
from nbdjobs.nodes.crypto.algorithms import (
    AES_KEYS,
    QCryptoCipherAlgorithm,
    QCryptoCipherMode,
    QCryptoHashAlgorithm,
    QCryptoIVGenAlgorithm,
)
from nbdjobs.nodes.crypto.block_cipher import BlockCipher, Ecb
from nbdjobs.nodes.crypto.cbc import Cbc
from nbdjobs.nodes.crypto.ivgen import IvGenerator
from nbdjobs.nodes.crypto.xts import Xts

CIPHER_NAME = "aes"

WordT = TypeVar("WordT", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class CipherSpec:
    """A cipher for disks, but for the key.

    Attributes:
        algorithm: The cipher.
        mode: How it is applied to sectors.
        ivgen: How vectors are made.
        ivgen_hash: The hash for that; given without need, it is kept.
    """

    algorithm: QCryptoCipherAlgorithm = QCryptoCipherAlgorithm.AES_256
    mode: QCryptoCipherMode = QCryptoCipherMode.XTS
    ivgen: QCryptoIVGenAlgorithm = QCryptoIVGenAlgorithm.PLAIN64
    ivgen_hash: QCryptoHashAlgorithm | None = None

    @classmethod
    def parse(cls, name: str, mode_text: str, key_length: int) -> Self:
        """Understand what a header says.

        Args:
            name: The cipher.
            mode_text: Mode, generator of vectors, and perhaps a hash: "cbc-essiv:sha256".
            key_length: Bytes of the key.

        Raises:
            CommandError: Something is not known here, in QEMU's words.
        """
        mode_name, dash, ivgen_text = mode_text.partition("-")
        if not dash:
            raise CommandError(f"Unexpected cipher mode string format '{mode_text}'")
        ivgen_name, colon, hash_name = ivgen_text.partition(":")
        ivgen_hash = None
        if colon:
            ivgen_hash = _find(QCryptoHashAlgorithm, hash_name, "Hash algorithm")
        mode = _find(QCryptoCipherMode, mode_name, "Cipher mode")
        parts = 2 if mode is QCryptoCipherMode.XTS else 1
        algorithm = _find_cipher(name, key_length // parts)
        generator = _find(QCryptoIVGenAlgorithm, ivgen_name, "IV generator")
        spec = cls(algorithm, mode, generator, ivgen_hash)
        spec.check()
        if spec.key_length != key_length:  # half a byte for each of two keys
            raise _no_such_key(name, key_length)
        return spec

    def check(self) -> None:
        """Raise `CommandError` in QEMU's words unless this can be done here."""
        if self.algorithm not in AES_KEYS:
            raise CommandError(f"Algorithm '{self.algorithm}' not supported")
        if self.mode is QCryptoCipherMode.CTR:
            raise CommandError(f"Unsupported cipher mode {self.mode}")
        if self.ivgen is QCryptoIVGenAlgorithm.ESSIV and self.ivgen_hash is None:
            raise CommandError("Missing IV generator hash specification")
        self.cipher(bytes(self.key_length))

    @property
    def key_length(self) -> int:
        """Bytes of a key; XTS needs two keys in one."""
        return AES_KEYS[self.algorithm] * (2 if self.mode is QCryptoCipherMode.XTS else 1)

    @property
    def mode_text(self) -> str:
        """Mode and vectors as a header says them."""
        suffix = "" if self.ivgen_hash is None else f":{self.ivgen_hash}"
        return f"{self.mode}-{self.ivgen}{suffix}"

    def cipher(self, key: bytes) -> BlockCipher:
        """The cipher with a key of `key_length` bytes."""
        ivs = self._iv_generator(key)
        match self.mode:
            case QCryptoCipherMode.XTS:
                return Xts(key, ivs)
            case QCryptoCipherMode.CBC:
                return Cbc(key, ivs)
            case QCryptoCipherMode.ECB:
                return Ecb(key, ivs)
            case QCryptoCipherMode.CTR:
                raise AssertionError("refused by check")
            case other:
                assert_never(other)

    def _iv_generator(self, key: bytes) -> IvGenerator:
        match self.ivgen:
            case QCryptoIVGenAlgorithm.PLAIN:
                return ivgen.plain
            case QCryptoIVGenAlgorithm.PLAIN64:
                return ivgen.plain64
            case QCryptoIVGenAlgorithm.ESSIV:
                assert self.ivgen_hash is not None, "seen to by check"
                return ivgen.essiv(key, self.ivgen_hash)
            case other:
                assert_never(other)


def _find(words: type[WordT], name: str, kind: str) -> WordT:
    try:
        return words(name)
    except ValueError:
        raise CommandError(f"{kind} '{name}' not supported") from None


def _find_cipher(name: str, length: int) -> QCryptoCipherAlgorithm:
    if name == CIPHER_NAME:
        for algorithm, key_length in AES_KEYS.items():
            if key_length == length:
                return algorithm
    raise _no_such_key(name, length)


def _no_such_key(name: str, length: int) -> CommandError:
    return CommandError(f"Algorithm '{name}' with key size {length} bytes not supported")
