# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Ciphers as headers describe them."""

from __future__ import annotations

import itertools

import pytest

from nbdjobs.errors import CommandError
from nbdjobs.nodes.crypto.algorithms import AES_KEYS
from nbdjobs.nodes.crypto.spec import CipherSpec

CIPHERS = list(
    itertools.product(AES_KEYS, ["xts", "cbc", "ecb"], ["plain", "plain64", "essiv:sha256"])
)


@pytest.mark.parametrize(("algorithm", "mode", "ivs"), CIPHERS)
def test_what_is_said_is_understood_and_said_again(algorithm: str, mode: str, ivs: str) -> None:
    length = int(algorithm.removeprefix("aes-")) // 8 * (2 if mode == "xts" else 1)
    spec = CipherSpec.parse("aes", f"{mode}-{ivs}", length)
    assert (spec.algorithm, spec.key_length, spec.mode_text) == (
        algorithm,
        length,
        f"{mode}-{ivs}",
    )
    buffer = bytearray(1024)
    spec.cipher(bytes(range(length))).encrypt(0, memoryview(buffer))
    assert buffer[:16] != bytes(16)
    assert (buffer[:512] == buffer[512:]) == (mode == "ecb")


def test_a_hash_without_need_is_kept() -> None:
    assert CipherSpec.parse("aes", "xts-plain64:sha1", 64).mode_text == "xts-plain64:sha1"


@pytest.mark.parametrize(
    ("name", "mode", "length", "refusal"),
    [
        ("aes", "", 64, "Unexpected cipher mode string format ''"),
        ("aes", "xts", 64, "Unexpected cipher mode string format 'xts'"),
        ("aes", "-", 64, "Cipher mode '' not supported"),
        ("aes", "foo-plain", 64, "Cipher mode 'foo' not supported"),
        ("aes", "xts-", 64, "IV generator '' not supported"),
        ("aes", "xts-foo", 64, "IV generator 'foo' not supported"),
        ("aes", "xts-plain64-x", 64, "IV generator 'plain64-x' not supported"),
        ("aes", "xts-plain64:", 64, "Hash algorithm '' not supported"),
        ("aes", "xts-plain64:foo", 64, "Hash algorithm 'foo' not supported"),
        ("aes", "cbc-essiv", 32, "Missing IV generator hash specification"),
        ("aes", "cbc-essiv:sha1", 32, "No AES cipher with key size 20 available"),
        ("aes", "ctr-plain64", 32, "Unsupported cipher mode ctr"),
        ("aes", "xts-plain64", 0, "Algorithm 'aes' with key size 0 bytes not supported"),
        ("aes", "xts-plain64", 65, "Algorithm 'aes' with key size 65 bytes not supported"),
        ("aes", "cbc-plain64", 64, "Algorithm 'aes' with key size 64 bytes not supported"),
        ("AES", "cbc-plain64", 32, "Algorithm 'AES' with key size 32 bytes not supported"),
        ("serpent", "xts-plain", 64, "Algorithm 'serpent' with key size 32 bytes not supported"),
    ],
)
def test_what_is_not_known_is_refused(name: str, mode: str, length: int, refusal: str) -> None:
    with pytest.raises(CommandError) as caught:
        CipherSpec.parse(name, mode, length)
    assert caught.value.description == refusal
