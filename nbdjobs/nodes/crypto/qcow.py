# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The older encryption of qcow2 images: a password that is a key of AES as it is.

Source: QEMU `docs/interop/qcow2`, "Data encryption"; how the password becomes a key is not told
there but known from the images: 16 bytes of it, filled up with zeroes.
"""

from __future__ import annotations

from typing import Final

from nbdjobs.nodes.crypto.block_cipher import BlockCipher
from nbdjobs.nodes.crypto.cbc import Cbc
from nbdjobs.nodes.crypto.ivgen import plain64

_KEY: Final = 16


def qcow_cipher(password: bytes) -> BlockCipher:
    """The cipher of an image; offsets are those of the guest."""
    return Cbc(password[:_KEY].ljust(_KEY, b"\0"), plain64)
