# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The header of a LUKS volume, version 1: what it says, read and checked, and written.

    0        592       4096                                        payload offset
    │ header │         │ key material 0 │ key material 1 │ ... 7 │ │ payload
                         4000 stripes of the encrypted master key

Source: the LUKS on-disk format 1.2.3, section 3; the limits are those that QEMU sets.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass, replace
from struct import Struct
from typing import ClassVar, Final, Self

from nbdjobs.errors import CommandError
from nbdjobs.nodes.crypto.algorithms import QCryptoHashAlgorithm, hash_named
from nbdjobs.nodes.crypto.kdf import MAX_ITERATIONS
from nbdjobs.nodes.crypto.spec import CIPHER_NAME, CipherSpec
from nbdjobs.nodes.rounding import round_up

MAGIC: Final = b"LUKS\xba\xbe"
VERSION: Final = 1
LENGTH: Final = 592
SLOTS: Final = 8
STRIPES: Final = 4000
SALT: Final = 32
DIGEST: Final = 20

_SECTOR: Final = 512
_ALIGNMENT: Final = 4096
"""Where the first key material begins, and what areas are rounded up to."""

_ENABLED: Final = 0x00AC71F3
_DISABLED: Final = 0x0000DEAD


@dataclass(frozen=True, slots=True)
class KeySlot:
    """A place for the master key, encrypted with a password.

    Attributes:
        is_active: Whether there is a key in it.
        iterations: How often the password is hashed.
        salt: What it is hashed with.
        offset: Bytes from the header's start to the key material.
    """

    LAYOUT: ClassVar = Struct(">II32sII")

    is_active: bool
    iterations: int
    salt: bytes
    offset: int

    def pack(self) -> bytes:
        """The slot as it is in the header."""
        state = _ENABLED if self.is_active else _DISABLED
        sector = self.offset // _SECTOR
        return self.LAYOUT.pack(state, self.iterations, self.salt, sector, STRIPES)

    @classmethod
    def unpack(cls, data: bytes, number: int) -> Self:
        """Read a slot; `CommandError` in QEMU's words if it cannot be one."""
        state, iterations, salt, sector, stripes = cls.LAYOUT.unpack(data)
        if stripes != STRIPES:
            raise CommandError(f"Keyslot {number} is corrupted (stripes {stripes} != {STRIPES})")
        if sector * _SECTOR < _ALIGNMENT:
            raise CommandError(f"Keyslot {number} is overlapping with the LUKS header")
        if state not in (_ENABLED, _DISABLED):
            raise CommandError(f"Keyslot {number} state (active/disable) is corrupted")
        is_active = state == _ENABLED
        if is_active:
            _check_iterations(iterations, f"Keyslot {number}")
        return cls(is_active, iterations, salt, sector * _SECTOR)


@dataclass(frozen=True, slots=True, kw_only=True)
class LuksHeader:
    """What the first 592 bytes say.

    Attributes:
        spec: The cipher, for the payload and for key material.
        hash_name: The hash of the format itself.
        payload_offset: Bytes from the header's start to the payload.
        digest: What the master key is recognised by: a hash of it.
        salt: What it is hashed with.
        iterations: How often.
        raw_uuid: 40 bytes, text up to the first zero byte.
        slots: The key slots.
    """

    LAYOUT: ClassVar = Struct(">6sH32s32s32sII20s32sI40s")

    spec: CipherSpec
    hash_name: QCryptoHashAlgorithm
    payload_offset: int
    digest: bytes
    salt: bytes
    iterations: int
    raw_uuid: bytes
    slots: tuple[KeySlot, ...]

    @property
    def key_length(self) -> int:
        """Bytes of the master key."""
        return self.spec.key_length

    @property
    def material_length(self) -> int:
        """Bytes of the key material of a slot, in whole sectors."""
        return _material_length(self.key_length)

    @property
    def uuid(self) -> str:
        """The name that the volume has for all time."""
        return self.raw_uuid.split(b"\0")[0].decode(errors="replace")

    def with_slot(self, number: int, slot: KeySlot) -> LuksHeader:
        """The same with a slot changed."""
        slots = list(self.slots)
        slots[number] = slot
        return replace(self, slots=tuple(slots))

    @classmethod
    def new(cls, spec: CipherSpec, hash_name: QCryptoHashAlgorithm) -> Self:
        """A header without any key, whose master key's digest is still to come."""
        distance = _slot_distance(spec.key_length)
        slots = tuple(
            KeySlot(False, 0, bytes(SALT), _ALIGNMENT + number * distance)
            for number in range(SLOTS)
        )
        return cls(
            spec=spec,
            hash_name=hash_name,
            payload_offset=_ALIGNMENT + SLOTS * distance,
            digest=bytes(DIGEST),
            salt=os.urandom(SALT),
            iterations=0,
            raw_uuid=str(uuid.uuid4()).encode().ljust(40, b"\0"),
            slots=slots,
        )

    def pack(self) -> bytes:
        """The header as it is in the volume."""
        fields = self.LAYOUT.pack(
            MAGIC,
            VERSION,
            CIPHER_NAME.encode(),
            self.spec.mode_text.encode(),
            self.hash_name.encode(),
            self.payload_offset // _SECTOR,
            self.key_length,
            self.digest,
            self.salt,
            self.iterations,
            self.raw_uuid,
        )
        return fields + b"".join(slot.pack() for slot in self.slots)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read and check the beginning of a volume; what is missing counts as zeroes.

        Raises:
            CommandError: What is wrong, in QEMU's words.
        """
        data = data[:LENGTH].ljust(LENGTH, b"\0")
        fields = cls.LAYOUT.unpack_from(data)
        magic, version, name, mode, hash_name, payload_sector, key_length = fields[:7]
        digest, salt, iterations, raw_uuid = fields[7:]
        if magic != MAGIC:
            raise CommandError("Volume is not in LUKS format")
        if version != VERSION:
            raise CommandError(f"LUKS version {version} is not supported")
        words = [
            _text(field, what)
            for field, what in (
                (name, "cipher name"),
                (mode, "cipher mode"),
                (hash_name, "hash spec"),
            )
        ]
        payload_offset = payload_sector * _SECTOR
        if payload_offset < _ALIGNMENT:
            raise CommandError("LUKS payload is overlapping with the header")
        _check_iterations(iterations, "LUKS key")
        slots = tuple(
            KeySlot.unpack(data[begin : begin + KeySlot.LAYOUT.size], number)
            for number, begin in enumerate(range(cls.LAYOUT.size, LENGTH, KeySlot.LAYOUT.size))
        )
        _check_places(slots, _slot_distance(key_length), payload_offset)
        spec = CipherSpec.parse(words[0], words[1], key_length)
        hash_named(words[2])
        return cls(
            spec=spec,
            hash_name=QCryptoHashAlgorithm(words[2]),
            payload_offset=payload_offset,
            digest=digest,
            salt=salt,
            iterations=iterations,
            raw_uuid=raw_uuid,
            slots=slots,
        )


assert LuksHeader.LAYOUT.size + SLOTS * KeySlot.LAYOUT.size == LENGTH


def _material_length(key_length: int) -> int:
    return round_up(key_length * STRIPES, _SECTOR)


def _slot_distance(key_length: int) -> int:
    """Bytes from the key material of a slot to that of the next."""
    return round_up(_material_length(key_length), _ALIGNMENT)


def _text(field: bytes, what: str) -> str:
    if b"\0" not in field:
        raise CommandError(f"LUKS header {what} is not NUL terminated")
    return field.split(b"\0")[0].decode(errors="replace")


def _check_iterations(iterations: int, whose: str) -> None:
    if not iterations:
        raise CommandError(f"{whose} iteration count is zero")
    if iterations > MAX_ITERATIONS:
        raise CommandError(f"{whose} iteration count {iterations} is larger than {MAX_ITERATIONS}")


def _check_places(slots: tuple[KeySlot, ...], length: int, payload_offset: int) -> None:
    """Refuse key material that reaches into the payload or into that of another slot."""
    for number, slot in enumerate(slots):
        if slot.offset + length > payload_offset:
            raise CommandError(f"Keyslot {number} is overlapping with the encrypted payload")
        for other in range(number + 1, len(slots)):
            begin = slots[other].offset
            if slot.offset < begin + length and begin < slot.offset + length:
                raise CommandError(f"Keyslots {number} and {other} are overlapping in the header")
