# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What keys are made of: spread over stripes, hashed from passwords."""

from __future__ import annotations

import hashlib
from random import Random

import pytest
from cryptography.hazmat.primitives import hashes
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdjobs.errors import CommandError
from nbdjobs.nodes.crypto import antiforensic, kdf
from nbdjobs.nodes.crypto.algorithms import QCryptoHashAlgorithm, digest, hash_named


@settings(deadline=None)
@given(
    st.binary(min_size=1, max_size=80),
    st.integers(1, 20),
    st.sampled_from(["sha1", "sha256", "sha512"]),
)
def test_a_key_comes_together_again(key: bytes, stripes: int, name: str) -> None:
    algorithm = hash_named(name)
    material = antiforensic.split(key, stripes, algorithm)
    assert len(material) == len(key) * stripes
    assert antiforensic.merge(material, stripes, algorithm) == key


def test_any_lost_bit_loses_the_key() -> None:
    key, stripes, algorithm = bytes(range(32)), 10, hashes.SHA256()
    material = bytearray(antiforensic.split(key, stripes, algorithm))
    random = Random(1)
    for _ in range(50):
        bit = 1 << random.randrange(8)
        place = random.randrange(len(material) - len(key))
        material[place] ^= bit
        found = antiforensic.merge(bytes(material), stripes, algorithm)
        wrong = sum(a != b for a, b in zip(found, key, strict=True))
        assert wrong > len(key) // 2, "the key is not to be guessed from what is left"
        material[place] ^= bit


def test_the_same_key_never_looks_the_same() -> None:
    key, algorithm = bytes(32), hashes.SHA256()
    materials = {antiforensic.split(key, 4, algorithm) for _ in range(10)}
    assert len(materials) == 10


def test_a_key_shorter_than_its_hash_is_mixed_with_part_of_it() -> None:
    """One stripe of noise, worked out by hand."""
    noise, last = b"\x01\x02\x03", b"\xff\xff\xff"
    hashed = hashlib.sha1(bytes(4) + noise).digest()[:3]
    expected = bytes(a ^ b for a, b in zip(hashed, last, strict=True))
    assert antiforensic.merge(noise + last, 2, hashes.SHA1()) == expected


def test_passwords_become_keys_by_pbkdf2() -> None:
    expected = hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 1234, 64)
    assert kdf.derive(hashes.SHA256(), b"password", b"salt", 1234, 64) == expected


def test_no_time_means_the_least_iterations() -> None:
    assert kdf.iterations_for(hashes.SHA256(), b"p", b"s", 32, 0) == kdf.MIN_ITERATIONS


def test_time_is_what_this_machine_does_in_it() -> None:
    found = kdf.iterations_for(hashes.SHA256(), b"p", b"s", 32, 20)
    assert kdf.MIN_ITERATIONS <= found <= kdf.MAX_ITERATIONS


@pytest.mark.parametrize("milliseconds", [-1, 1 << 32])
def test_impossible_times_are_refused(milliseconds: int) -> None:
    with pytest.raises(CommandError, match=f"PBKDF time of {milliseconds} ms is out of range"):
        kdf.iterations_for(hashes.SHA256(), b"p", b"s", 32, milliseconds)


def test_nobody_is_made_to_wait_for_hours() -> None:
    with pytest.raises(CommandError, match=r"PBKDF iterations \d+ larger than 268435456"):
        kdf.iterations_for(hashes.SHA256(), b"p", b"s", 32, (1 << 32) - 1)


def test_hashes_are_those_of_their_names() -> None:
    for algorithm in set(QCryptoHashAlgorithm) - {QCryptoHashAlgorithm.RIPEMD160}:
        assert digest(hash_named(algorithm), b"x") == hashlib.new(algorithm, b"x").digest()
    with pytest.raises(CommandError, match="Hash algorithm 'sha3' not supported"):
        hash_named("sha3")
