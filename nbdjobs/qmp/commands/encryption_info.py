# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What queries tell of encryption: QAPI types, and how a LUKS header becomes one.

Source: QEMU qapi/crypto.json and qapi/block-core.json.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbdjobs.nodes.crypto.algorithms import (
    QCryptoCipherAlgorithm,
    QCryptoCipherMode,
    QCryptoHashAlgorithm,
    QCryptoIVGenAlgorithm,
)
from nbdjobs.nodes.crypto.luks_header import STRIPES, KeySlot, LuksHeader


@dataclass(frozen=True, slots=True, kw_only=True)
class QCryptoBlockInfoLUKSSlot:
    """A place for a password; offset in bytes from the start of the header."""

    active: bool
    iters: int | None = None
    stripes: int | None = None
    key_offset: int


@dataclass(frozen=True, kw_only=True)
class QCryptoBlockInfoLUKS:
    """How a LUKS volume is encrypted; offset in bytes."""

    cipher_alg: QCryptoCipherAlgorithm
    cipher_mode: QCryptoCipherMode
    ivgen_alg: QCryptoIVGenAlgorithm
    ivgen_hash_alg: QCryptoHashAlgorithm | None = None
    hash_alg: QCryptoHashAlgorithm
    payload_offset: int
    master_key_iters: int
    uuid: str
    slots: list[QCryptoBlockInfoLUKSSlot]


def describe_luks(header: LuksHeader) -> QCryptoBlockInfoLUKS:
    """A volume as queries show it."""
    spec = header.spec
    needs_hash = spec.ivgen is QCryptoIVGenAlgorithm.ESSIV
    return QCryptoBlockInfoLUKS(
        cipher_alg=spec.algorithm,
        cipher_mode=spec.mode,
        ivgen_alg=spec.ivgen,
        ivgen_hash_alg=spec.ivgen_hash if needs_hash else None,
        hash_alg=header.hash_name,
        payload_offset=header.payload_offset,
        master_key_iters=header.iterations,
        uuid=header.uuid,
        slots=[_describe_slot(slot) for slot in header.slots],
    )


def _describe_slot(slot: KeySlot) -> QCryptoBlockInfoLUKSSlot:
    return QCryptoBlockInfoLUKSSlot(
        active=slot.is_active,
        iters=slot.iterations if slot.is_active else None,
        stripes=STRIPES if slot.is_active else None,
        key_offset=slot.offset,
    )
