# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""New LUKS volumes: the options for them, and their making.

Source: QEMU qapi/crypto.json (QCryptoBlockCreateOptionsLUKS), and the behaviour of its storage
daemon.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

from nbdjobs.errors import CommandError
from nbdjobs.nodes.crypto import luks
from nbdjobs.nodes.crypto.algorithms import (
    QCryptoCipherAlgorithm,
    QCryptoCipherMode,
    QCryptoHashAlgorithm,
    QCryptoIVGenAlgorithm,
    hash_named,
)
from nbdjobs.nodes.crypto.luks import FilledSlot
from nbdjobs.nodes.crypto.spec import CipherSpec
from nbdjobs.nodes.crypto.volume import LuksVolume, in_thread
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.secrets import Secrets
from nbdjobs.qapi.types import INT64_MAX

DEFAULT_ITER_TIME: Final = 2000


@dataclass(frozen=True, kw_only=True)
class LuksCreateOptions:
    """What a new volume is like (QAPI `QCryptoBlockCreateOptionsLUKS`).

    Attributes:
        key_secret: Name of the object with its first password.
        cipher_alg: The cipher.
        cipher_mode: How it is applied to sectors.
        ivgen_alg: How vectors are made.
        ivgen_hash_alg: The hash for that; SHA-256 for `essiv` if not given.
        hash_alg: The hash for passwords.
        iter_time: Milliseconds that finding the key with the password should take.
    """

    key_secret: str | None = None
    cipher_alg: QCryptoCipherAlgorithm = QCryptoCipherAlgorithm.AES_256
    cipher_mode: QCryptoCipherMode = QCryptoCipherMode.XTS
    ivgen_alg: QCryptoIVGenAlgorithm = QCryptoIVGenAlgorithm.PLAIN64
    ivgen_hash_alg: QCryptoHashAlgorithm | None = None
    hash_alg: QCryptoHashAlgorithm = QCryptoHashAlgorithm.SHA256
    iter_time: int = DEFAULT_ITER_TIME

    @property
    def spec(self) -> CipherSpec:
        """The cipher; `CommandError` in QEMU's words if it is not there."""
        ivgen_hash = self.ivgen_hash_alg
        if ivgen_hash is None and self.ivgen_alg is QCryptoIVGenAlgorithm.ESSIV:
            ivgen_hash = QCryptoHashAlgorithm.SHA256
        spec = CipherSpec(self.cipher_alg, self.cipher_mode, self.ivgen_alg, ivgen_hash)
        spec.check()
        return spec


async def new_volume(
    options: LuksCreateOptions, secrets: Secrets, *, prefix: str = ""
) -> FilledSlot:
    """Make the header and the first key of a new volume, writing nothing yet.

    The header tells how much room it needs with its keys: `payload_offset`.

    Args:
        options: What the volume is like.
        secrets: Where the password is.
        prefix: What the names of options begin with for the user.

    Raises:
        CommandError: The options do not fit, in QEMU's words.
    """
    password = secrets.find_required_password(options.key_secret, prefix)
    spec = options.spec
    hash_named(options.hash_alg)
    make = partial(luks.new_volume, spec, options.hash_alg, password, options.iter_time)
    return await in_thread(make)


async def create_luks(
    node: Node, options: LuksCreateOptions, size: int, secrets: Secrets
) -> LuksVolume:
    """Make a volume of all of a node, whose content is lost.

    The payload is as the storage has it, which reads as noise.

    Args:
        node: Where to, with permission to write and to resize, and nobody else using it.
        options: What the volume is like.
        size: Bytes of the payload.
        secrets: Where the password is.

    Raises:
        CommandError: It cannot be done, in QEMU's words; where that is because of the options,
            nothing has changed.
    """
    filled = await new_volume(options, secrets)
    if not 0 <= size <= INT64_MAX - filled.header.payload_offset:
        raise CommandError("The requested file size is too large")
    await node.truncate(0)
    await node.truncate(filled.header.payload_offset + size)
    return await LuksVolume.write(node, 0, filled)
