# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The content of `secret` objects: read, decoded and decrypted, as their properties say.

Source: QEMU qapi/crypto.json (SecretCommonProperties) and the behaviour of its storage daemon.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Final

from nbdjobs.daemon.object_options import QCryptoSecretFormat, SecretProperties
from nbdjobs.errors import CommandError
from nbdjobs.nodes.secrets import Secrets

MAX_SECRET: Final = 1024 * 1024
"""Bytes of a file that may be a secret; a disk named by mistake is none."""

_KEY: Final = 32
_BLOCK: Final = 16
_BASE64: Final = re.compile(rb"[A-Za-z0-9+/=\n]*")


def load(options: SecretProperties, secrets: Secrets) -> bytes:
    """The content of a secret.

    Args:
        options: Its properties.
        secrets: Where the key is, if it is encrypted.

    Raises:
        CommandError: It cannot be read or does not fit together, in QEMU's words.
    """
    content = _read(options)
    is_base64 = options.format is QCryptoSecretFormat.BASE64
    if options.keyid is None:
        return _decode(content) if is_base64 else content
    key = secrets.find(options.keyid)
    if len(key) != _KEY:
        raise CommandError(f"Key should be {_KEY} bytes in length")
    if options.iv is None:
        raise CommandError("IV is required to decrypt secret")
    iv = _decode(options.iv.encode())
    if len(iv) != _BLOCK:
        raise CommandError(f"IV should be {_BLOCK} bytes in length not {len(iv)}")
    return _decrypt(_decode(content) if is_base64 else content, key, iv)


def _read(options: SecretProperties) -> bytes:
    if options.data is not None and options.file is not None:
        raise CommandError("'file' and 'data' are mutually exclusive")
    if options.data is not None:
        return options.data.encode()
    if options.file is None:
        raise CommandError("Either 'file' or 'data' must be provided")
    doing = "Failed to open"
    try:
        with Path(options.file).open("rb") as file:
            doing = "Error reading"
            content = file.read(MAX_SECRET + 1)
    except OSError as error:
        doing = "Error reading" if isinstance(error, IsADirectoryError) else doing
        raise CommandError(
            f"Unable to read {options.file}: {doing} file “{options.file}”: {error.strerror}"
        ) from error
    if len(content) > MAX_SECRET:
        raise CommandError(f"Unable to read {options.file}: more than {MAX_SECRET} bytes")
    return content


def _decode(text: bytes) -> bytes:
    """Decode base64 as lavishly as GLib: what is no whole group of four is left out."""
    if not _BASE64.fullmatch(text):
        raise CommandError("Base64 data contains invalid characters")
    text = text.replace(b"\n", b"")
    decoded = bytearray()
    for start in range(0, len(text) - 3, 4):
        group = text[start : start + 4]
        first, second, third = base64.b64decode(group.replace(b"=", b"A"))
        decoded.append(first)
        if group[2:3] != b"=":
            decoded.append(second)
        if group[3:4] != b"=":
            decoded.append(third)
    return bytes(decoded)


def _decrypt(content: bytes, key: bytes, iv: bytes) -> bytes:
    """Decrypt with AES in CBC mode, and take off the padding, whose length is in its last byte."""
    # Few daemons need it, and it takes a while to import.
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    if len(content) % _BLOCK:
        raise CommandError(f"Length {len(content)} must be a multiple of block size {_BLOCK}")
    if not content:
        return b""
    decryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
    padded = decryptor.update(content) + decryptor.finalize()
    padding = padded[-1]
    if padding > _BLOCK:
        raise CommandError(f"Incorrect number of padding bytes ({padding}) found on decrypted data")
    return padded[: len(padded) - padding]
