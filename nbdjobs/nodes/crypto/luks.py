# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Keys of a LUKS volume: the master key in its slots, found with a password.

    password ── PBKDF2 ──▶ slot key ── decrypts ──▶ key material ── merged ──▶ master key

The master key encrypts the payload. It never changes, so passwords come and go without a look at
the payload. What takes time here does not hold the interpreter: it belongs into a thread.

Source: the LUKS on-disk format 1.2.3, section 4.
"""

from __future__ import annotations

import hmac
import os
from dataclasses import replace
from typing import NamedTuple

from nbdjobs.nodes.crypto import antiforensic, kdf
from nbdjobs.nodes.crypto.algorithms import QCryptoHashAlgorithm, hash_named
from nbdjobs.nodes.crypto.luks_header import DIGEST, SALT, STRIPES, KeySlot, LuksHeader
from nbdjobs.nodes.crypto.spec import CipherSpec


class FilledSlot(NamedTuple):
    """What has to be written for a new password.

    Attributes:
        header: The header, with the slot in it.
        number: Which slot.
        material: Its key material.
    """

    header: LuksHeader
    number: int
    material: bytes

    def area(self) -> bytes:
        """The beginning of a volume that has no other password, up to its payload."""
        area = bytearray(self.header.payload_offset)
        packed = self.header.pack()
        area[: len(packed)] = packed
        begin = self.header.slots[self.number].offset
        area[begin : begin + len(self.material)] = self.material
        return bytes(area)


def new_volume(
    spec: CipherSpec, hash_name: QCryptoHashAlgorithm, password: bytes, milliseconds: int
) -> FilledSlot:
    """A new volume with a random master key, for which there is one password.

    Raises:
        CommandError: The time is too long.
    """
    header = LuksHeader.new(spec, hash_name)
    master_key = os.urandom(header.key_length)
    algorithm = hash_named(hash_name)
    # QEMU and cryptsetup take an eighth: it is hashed again for each slot that is tried.
    iterations = kdf.iterations_for(algorithm, master_key, header.salt, DIGEST, milliseconds // 8)
    digest = kdf.derive(algorithm, master_key, header.salt, iterations, DIGEST)
    header = replace(header, iterations=iterations, digest=digest)
    return fill_slot(header, 0, master_key, password, milliseconds)


def fill_slot(
    header: LuksHeader, number: int, master_key: bytes, password: bytes, milliseconds: int
) -> FilledSlot:
    """Put the master key into a slot.

    Args:
        header: The header.
        number: Which slot.
        master_key: The master key.
        password: What it will be found with.
        milliseconds: How long finding it should take on this machine.

    Raises:
        CommandError: The time is too long.
    """
    algorithm, length = hash_named(header.hash_name), header.key_length
    salt = os.urandom(SALT)
    iterations = kdf.iterations_for(algorithm, password, salt, length, milliseconds)
    slot_key = kdf.derive(algorithm, password, salt, iterations, length)
    split = antiforensic.split(master_key, STRIPES, algorithm)
    material = bytearray(split.ljust(header.material_length, b"\0"))
    header.spec.cipher(slot_key).encrypt(0, memoryview(material))
    slot = KeySlot(True, iterations, salt, header.slots[number].offset)
    return FilledSlot(header.with_slot(number, slot), number, bytes(material))


def empty_slot(header: LuksHeader, number: int) -> LuksHeader:
    """The header without what belongs to a slot; its key material has to be overwritten."""
    return header.with_slot(number, KeySlot(False, 0, bytes(SALT), header.slots[number].offset))


def find_key(header: LuksHeader, slot: KeySlot, material: bytes, password: bytes) -> bytes | None:
    """The master key, if the password is that of the slot, which is active."""
    algorithm, length = hash_named(header.hash_name), header.key_length
    slot_key = kdf.derive(algorithm, password, slot.salt, slot.iterations, length)
    split = bytearray(material)
    header.spec.cipher(slot_key).decrypt(0, memoryview(split))
    key = antiforensic.merge(bytes(split[: length * STRIPES]), STRIPES, algorithm)
    digest = kdf.derive(algorithm, key, header.salt, header.iterations, DIGEST)
    return key if hmac.compare_digest(digest, header.digest) else None
