# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The names that options and headers have for algorithms, and what is behind them.

Source: QEMU qapi/crypto.json, whose names are those of the LUKS format, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from cryptography.hazmat.primitives import hashes

from nbdjobs.errors import CommandError


class QCryptoCipherAlgorithm(StrEnum):
    """Ciphers; only those of AES are there."""

    AES_128 = "aes-128"
    AES_192 = "aes-192"
    AES_256 = "aes-256"
    DES = "des"
    TRIPLE_DES = "3des"
    CAST5_128 = "cast5-128"
    SERPENT_128 = "serpent-128"
    SERPENT_192 = "serpent-192"
    SERPENT_256 = "serpent-256"
    TWOFISH_128 = "twofish-128"
    TWOFISH_192 = "twofish-192"
    TWOFISH_256 = "twofish-256"


class QCryptoCipherMode(StrEnum):
    """How the blocks of a sector hang together; `ctr` is not there."""

    ECB = "ecb"
    CBC = "cbc"
    XTS = "xts"
    CTR = "ctr"


class QCryptoIVGenAlgorithm(StrEnum):
    """What makes sectors with the same content look different."""

    PLAIN = "plain"
    PLAIN64 = "plain64"
    ESSIV = "essiv"


class QCryptoHashAlgorithm(StrEnum):
    """Hashes; `ripemd160` is not there."""

    MD5 = "md5"
    SHA1 = "sha1"
    SHA224 = "sha224"
    SHA256 = "sha256"
    SHA384 = "sha384"
    SHA512 = "sha512"
    RIPEMD160 = "ripemd160"


AES_KEYS: Final[Mapping[QCryptoCipherAlgorithm, int]] = {
    QCryptoCipherAlgorithm.AES_128: 16,
    QCryptoCipherAlgorithm.AES_192: 24,
    QCryptoCipherAlgorithm.AES_256: 32,
}
"""Bytes of a key of each cipher that is there."""

_HASHES: Final[Mapping[QCryptoHashAlgorithm, type[hashes.HashAlgorithm]]] = {
    QCryptoHashAlgorithm.MD5: hashes.MD5,
    QCryptoHashAlgorithm.SHA1: hashes.SHA1,
    QCryptoHashAlgorithm.SHA224: hashes.SHA224,
    QCryptoHashAlgorithm.SHA256: hashes.SHA256,
    QCryptoHashAlgorithm.SHA384: hashes.SHA384,
    QCryptoHashAlgorithm.SHA512: hashes.SHA512,
}


def hash_named(name: str) -> hashes.HashAlgorithm:
    """A hash by its name; `CommandError` in QEMU's words if it is not there."""
    for algorithm, kind in _HASHES.items():
        if algorithm == name:
            return kind()
    raise CommandError(f"Hash algorithm '{name}' not supported")


def digest(algorithm: hashes.HashAlgorithm, data: bytes) -> bytes:
    """The hash of some bytes."""
    hasher = hashes.Hash(algorithm)
    hasher.update(data)
    return hasher.finalize()
