# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Keys spread over many bytes: whoever misses a few of them learns nothing of the key.

A disk may keep a copy of a sector that was overwritten long ago. A key that was taken away is gone
for good when any one of its stripes is gone.

    mixed = 0
    for each stripe but the last: it is random, and mixed = diffuse(mixed ^ stripe)
    last stripe = mixed ^ key

Source: the LUKS on-disk format, section 2.4 (AF-splitter).
"""

from __future__ import annotations

import os

from cryptography.hazmat.primitives.hashes import HashAlgorithm

from nbdjobs.nodes.crypto.algorithms import digest


def split(key: bytes, stripes: int, algorithm: HashAlgorithm) -> bytes:
    """Spread a key; the result is `stripes` times as long."""
    noise = os.urandom(len(key) * (stripes - 1))
    return noise + _xor(_mix(noise, len(key), algorithm), key)


def merge(material: bytes, stripes: int, algorithm: HashAlgorithm) -> bytes:
    """Find the key in what `split` has made of it."""
    length = len(material) // stripes
    noise, last = material[:-length], material[-length:]
    return _xor(_mix(noise, length, algorithm), last)


def _mix(noise: bytes, length: int, algorithm: HashAlgorithm) -> bytes:
    mixed = bytes(length)
    for begin in range(0, len(noise), length):
        mixed = _diffuse(_xor(mixed, noise[begin : begin + length]), algorithm)
    return mixed


def _diffuse(data: bytes, algorithm: HashAlgorithm) -> bytes:
    """Replace each piece, as long as the hash, by a hash of its number and itself."""
    size = algorithm.digest_size
    hashed = b"".join(
        digest(algorithm, number.to_bytes(4) + data[begin : begin + size])
        for number, begin in enumerate(range(0, len(data), size))
    )
    # The last piece may be shorter, and then its hash is cut: it is at the end of all of them.
    return hashed[: len(data)]


def _xor(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a) ^ int.from_bytes(b)).to_bytes(len(a))
