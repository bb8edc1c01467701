# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Ciphers for disks: what they make of many sectors is what the library makes of each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from random import Random
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdjobs.errors import CommandError
from nbdjobs.nodes.crypto import ivgen
from nbdjobs.nodes.crypto.block_cipher import CHUNK, SECTOR, BlockCipher, Ecb
from nbdjobs.nodes.crypto.cbc import Cbc
from nbdjobs.nodes.crypto.ivgen import IvGenerator
from nbdjobs.nodes.crypto.qcow import qcow_cipher
from nbdjobs.nodes.crypto.xts import Xts

Make = Callable[[bytes, IvGenerator], BlockCipher]
LibraryMode = Callable[[bytes], Any]

MODES: Final[dict[str, tuple[Make, LibraryMode]]] = {
    "xts": (Xts, modes.XTS),
    "cbc": (Cbc, modes.CBC),
    "ecb": (Ecb, lambda iv: modes.ECB()),
}
LONGEST: Final = CHUNK + 3 * SECTOR


def one_by_one(mode: str, key: bytes, ivs: list[bytes], content: bytes) -> bytes:
    """What the library makes of each sector by itself."""
    encrypted = []
    for number, iv in enumerate(ivs):
        encryptor = Cipher(algorithms.AES(key), MODES[mode][1](iv)).encryptor()
        encrypted.append(encryptor.update(content[SECTOR * number : SECTOR * (number + 1)]))
    return b"".join(encrypted)


def keys(mode: str) -> st.SearchStrategy[bytes]:
    """Keys of all lengths, with halves that differ, as the library wants them for XTS."""
    lengths = (32, 64) if mode == "xts" else (16, 24, 32)
    return st.sampled_from(lengths).flatmap(
        lambda length: st.binary(min_size=length, max_size=length).filter(
            lambda key: mode != "xts" or key[: length // 2] != key[length // 2 :]
        )
    )


@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    first=st.integers(0, 1 << 54),
    count=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_many_sectors_are_encrypted_like_each_by_itself(
    mode: str, data: st.DataObject, first: int, count: int, seed: int
) -> None:
    key = data.draw(keys(mode))
    content = Random(seed).randbytes(SECTOR * count)
    cipher = MODES[mode][0](key, ivgen.plain64)
    buffer = bytearray(content)
    cipher.encrypt(SECTOR * first, memoryview(buffer))
    ivs = [number.to_bytes(16, "little") for number in range(first, first + count)]
    assert buffer == one_by_one(mode, key, ivs, content)
    cipher.decrypt(SECTOR * first, memoryview(buffer))
    assert buffer == content


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [SECTOR, CHUNK - SECTOR, CHUNK, LONGEST])
def test_a_part_is_decrypted_without_the_rest(mode: str, length: int) -> None:
    cipher = MODES[mode][0](bytes(range(64 if mode == "xts" else 32)), ivgen.plain64)
    content = (b"".join(n.to_bytes(4) for n in range(LONGEST // 4)))[:length]
    buffer = bytearray(content)
    cipher.encrypt(1 << 30, memoryview(buffer))
    assert buffer != content
    end = memoryview(buffer)[-SECTOR:]
    cipher.decrypt((1 << 30) + length - SECTOR, end)
    assert end == content[-SECTOR:]


def test_nothing_is_encrypted_to_nothing() -> None:
    Xts(bytes(range(64)), ivgen.plain64).encrypt(0, memoryview(bytearray()))


def test_xts_is_that_of_the_standard() -> None:
    """IEEE Std 1619-2007, annex B, vector 10."""
    key = bytes.fromhex(
        "2718281828459045235360287471352662497757247093699959574966967627"
        "3141592653589793238462643383279502884197169399375105820974944592"
    )
    buffer = bytearray(n & 255 for n in range(512))
    Xts(key, lambda first, count: (0xFF).to_bytes(16, "little") * count).encrypt(
        0, memoryview(buffer)
    )
    assert buffer[:32] == bytes.fromhex(
        "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b"
    )


# Vectors


def test_plain_vectors_come_again_after_2_tib_and_plain64_do_not() -> None:
    first = (1 << 32) - 2
    numbers = [first, first + 1, 0, 1, 2]
    assert ivgen.plain(first, 5) == b"".join(n.to_bytes(16, "little") for n in numbers)
    assert ivgen.plain(first + (1 << 32), 5) == ivgen.plain(first, 5)
    assert ivgen.plain64(first, 5) == b"".join((first + n).to_bytes(16, "little") for n in range(5))


def test_essiv_vectors_are_numbers_encrypted_with_a_hash_of_the_key() -> None:
    key = bytes(range(16))
    salt = hashlib.sha256(key).digest()
    encryptor = Cipher(algorithms.AES(salt), modes.ECB()).encryptor()
    expected = encryptor.update(ivgen.plain64(7, 3))
    assert ivgen.essiv(key, "sha256")(7, 3) == expected
    assert len(ivgen.essiv(key, "md5")(0, 2)) == 32


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("sha1", "No AES cipher with key size 20 available"),
        ("sha512", "No AES cipher with key size 64 available"),
        ("ripemd160", "Hash algorithm 'ripemd160' not supported"),
    ],
)
def test_essiv_needs_a_hash_that_is_a_key(name: str, refusal: str) -> None:
    with pytest.raises(CommandError) as caught:
        ivgen.essiv(bytes(16), name)
    assert caught.value.description == refusal


@pytest.mark.parametrize("password", [b"", b"hello", b"exactly 16 bytes", b"longer than 16 bytes"])
def test_the_older_passwords_of_qcow2_are_filled_up_or_cut(password: bytes) -> None:
    buffer = bytearray(SECTOR)
    qcow_cipher(password).encrypt(SECTOR * 5, memoryview(buffer))
    key = (password + bytes(16))[:16]
    assert buffer == one_by_one("cbc", key, [(5).to_bytes(16, "little")], bytes(SECTOR))
