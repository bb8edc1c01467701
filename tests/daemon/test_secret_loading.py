# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Secrets: from text or files, in base64, encrypted by others; and the words for what is wrong."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Final

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.daemon import secret_loading
from nbdjobs.daemon.object_options import ObjectOptions, SecretProperties
from nbdjobs.errors import CommandError
from nbdjobs.nodes.secrets import Secrets
from nbdjobs.qapi.visitor import visit

KEY: Final = bytes(range(32))
IV: Final = bytes(range(16))
IV_TEXT: Final = base64.b64encode(IV).decode()


def load(**properties: object) -> bytes:
    secrets = Secrets()
    secrets.add("key", KEY)
    secrets.add("short", KEY[:31])
    secrets.add("thread", None)
    options = visit(ObjectOptions, {"qom-type": "secret", "id": "s", **properties})
    assert isinstance(options, SecretProperties)
    return secret_loading.load(options, secrets)


def encrypt(padded: bytes) -> str:
    encryptor = Cipher(algorithms.AES(KEY), modes.CBC(IV)).encryptor()
    return base64.b64encode(encryptor.update(padded) + encryptor.finalize()).decode()


def test_a_secret_comes_from_text_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"\xff\0 raw\n")
    (tmp_path / "base64").write_bytes(base64.b64encode(b"hidden") + b"\n")
    assert load(data="plain") == b"plain"
    assert load(file=str(tmp_path / "raw")) == b"\xff\0 raw\n"
    assert load(file=str(tmp_path / "base64"), format="base64") == b"hidden"


def test_a_file_without_end_is_no_secret() -> None:
    with pytest.raises(CommandError, match="Unable to read /dev/zero: more than 1048576 bytes"):
        load(file="/dev/zero")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("", b""),
        ("\n", b""),
        ("aGVs\nbG8=\n", b"hello"),
        ("aGVsbG8", b"hel"),
        ("aGVs=bG8=", b"hel\x01\xb1\xbc"),
        ("AA==AAAA", b"\0\0\0\0"),
        ("a", b""),
    ],
)
def test_base64_is_decoded_as_lavishly_as_glib_does(text: str, content: bytes) -> None:
    assert load(data=text, format="base64") == content


@given(st.binary(max_size=100))
def test_what_is_encrypted_is_decrypted(content: bytes) -> None:
    padding = 16 - len(content) % 16
    text = encrypt(content + bytes([padding]) * padding)
    assert load(data=text, keyid="key", iv=IV_TEXT, format="base64") == content


def test_encrypted_secrets_may_be_raw_bytes_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(base64.b64decode(encrypt(b"hello" + bytes([11]) * 11)))
    assert load(file=str(tmp_path / "s"), keyid="key", iv=IV_TEXT) == b"hello"


def test_only_the_last_byte_of_the_padding_counts() -> None:
    text = encrypt(b"hello world 1234")
    assert text != encrypt(b"hello world 123\0")
    properties = {"keyid": "key", "iv": IV_TEXT, "format": "base64"}
    assert load(data=encrypt(b"hello world 123\0"), **properties) == b"hello world 123\0"
    assert load(data=encrypt(b"hello world 123\x04"), **properties) == b"hello world "


@pytest.mark.parametrize(
    ("properties", "refusal"),
    [
        ({}, "Either 'file' or 'data' must be provided"),
        ({"data": "x", "file": "y"}, "'file' and 'data' are mutually exclusive"),
        ({"data": "?", "format": "base64"}, "Base64 data contains invalid characters"),
        ({"data": "AAAA ", "format": "base64"}, "Base64 data contains invalid characters"),
        (
            {"file": "/nonexistent/x"},
            "Unable to read /nonexistent/x: Failed to open file “/nonexistent/x”:"
            " No such file or directory",
        ),
        ({"file": "/"}, "Unable to read /: Error reading file “/”: Is a directory"),
        ({"data": "x", "keyid": "nothing"}, "No secret with id 'nothing'"),
        ({"data": "x", "keyid": "thread"}, "Object with id 'thread' is not a secret"),
        ({"data": "x", "keyid": "short"}, "Key should be 32 bytes in length"),
        ({"data": "x", "keyid": "key"}, "IV is required to decrypt secret"),
        ({"data": "", "keyid": "key", "iv": "?"}, "Base64 data contains invalid characters"),
        ({"data": "", "keyid": "key", "iv": "AAAA"}, "IV should be 16 bytes in length not 3"),
        (
            {"data": "x", "keyid": "key", "iv": IV_TEXT},
            "Length 1 must be a multiple of block size 16",
        ),
        (
            {"data": encrypt(bytes(15) + b"\x11"), "format": "base64"}
            | {"keyid": "key", "iv": IV_TEXT},
            "Incorrect number of padding bytes (17) found on decrypted data",
        ),
    ],
)
def test_what_does_not_fit_is_refused(properties: dict[str, object], refusal: str) -> None:
    with pytest.raises(CommandError) as caught:
        load(**properties)
    assert caught.value.description == refusal
