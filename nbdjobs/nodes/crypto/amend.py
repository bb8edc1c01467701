# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Passwords of a LUKS volume are added and taken away, while its payload stays as it is.

Source: QEMU qapi/crypto.json (QCryptoBlockAmendOptionsLUKS), and the texts of its qemu-img.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from nbdjobs.errors import CommandError
from nbdjobs.nodes.crypto import luks
from nbdjobs.nodes.crypto.creation import DEFAULT_ITER_TIME
from nbdjobs.nodes.crypto.luks_header import SLOTS
from nbdjobs.nodes.crypto.volume import LuksVolume, in_thread
from nbdjobs.nodes.secrets import Secrets


class QCryptoBlockLUKSKeyslotState(StrEnum):
    """What slots shall be."""

    ACTIVE = "active"
    INACTIVE = "inactive"


@dataclass(frozen=True, kw_only=True)
class LuksAmendOptions:
    """A change of passwords (QAPI `QCryptoBlockAmendOptionsLUKS`).

    Attributes:
        state: To put a password in, or to take some out.
        new_secret: Name of the object with the password to put in.
        old_secret: Name of the object with the password to take out, wherever it is.
        keyslot: Which slot; the first free one to put a password in if not given.
        iter_time: Milliseconds that finding the key with the new password should take.
        secret: Name of the object with a password that is there; that with which the volume was
            opened if not given.
    """

    state: QCryptoBlockLUKSKeyslotState
    new_secret: str | None = None
    old_secret: str | None = None
    keyslot: int | None = None
    iter_time: int | None = None
    secret: str | None = None


async def amend(
    volume: LuksVolume,
    options: LuksAmendOptions,
    secrets: Secrets,
    *,
    key_secret: str | None,
    is_forced: bool = False,
) -> None:
    """Change passwords; nobody else may use the volume's header meanwhile.

    Args:
        volume: Whose.
        options: The change.
        secrets: Where the passwords are.
        key_secret: What the volume was opened with.
        is_forced: Overwrite a slot that is in use, and take out the last password.

    Raises:
        CommandError: It does not fit, in QEMU's words, and nothing has changed; or the storage
            failed.
    """
    if options.state is QCryptoBlockLUKSKeyslotState.ACTIVE:
        await _add(volume, options, secrets, key_secret, is_forced)
    else:
        await _erase(volume, options, secrets, is_forced)


async def _add(
    volume: LuksVolume,
    options: LuksAmendOptions,
    secrets: Secrets,
    key_secret: str | None,
    is_forced: bool,
) -> None:
    if options.new_secret is None:
        raise CommandError("'new-secret' is required to activate a keyslot")
    if options.old_secret is not None:
        raise CommandError("'old-secret' must not be given when activating keyslots")
    number = _slot_to_fill(volume, options.keyslot, is_forced)
    secret = key_secret if options.secret is None else options.secret
    new = secrets.find_password(options.new_secret)
    master_key = await volume.master_key(secrets.find_required_password(secret))
    iter_time = DEFAULT_ITER_TIME if options.iter_time is None else options.iter_time
    fill = partial(luks.fill_slot, volume.header, number, master_key, new, iter_time)
    await volume.store(await in_thread(fill))


def _slot_to_fill(volume: LuksVolume, wanted: int | None, is_forced: bool) -> int:
    slots = volume.header.slots
    if wanted is None:
        for number, slot in enumerate(slots):
            if not slot.is_active:
                return number
        raise CommandError("Can't add a keyslot - all keyslots are in use")
    _check_number(wanted)
    if slots[wanted].is_active and not is_forced:
        raise CommandError(f"Refusing to overwrite active keyslot {wanted} - please erase it first")
    return wanted


async def _erase(
    volume: LuksVolume, options: LuksAmendOptions, secrets: Secrets, is_forced: bool
) -> None:
    if options.new_secret is not None:
        raise CommandError("'new-secret' must not be given when erasing keyslots")
    if options.iter_time is not None:
        raise CommandError("'iter-time' must not be given when erasing keyslots")
    active = {number for number, slot in enumerate(volume.header.slots) if slot.is_active}
    if options.keyslot is not None:
        _check_number(options.keyslot)
        await _check_slot(volume, options.keyslot, options.old_secret, secrets)
        if active == {options.keyslot} and not is_forced:
            raise CommandError(
                f"Attempt to erase the only active keyslot {options.keyslot} which will erase all"
                " the data in the image irreversibly - refusing operation"
            )
        await volume.erase(options.keyslot)
        return
    if options.old_secret is None:
        raise CommandError(
            "To erase keyslot(s), either explicit keyslot index or the password currently"
            " contained in them must be given"
        )
    password = secrets.find_password(options.old_secret)
    found = [number for number in active if await volume.key_in(number, password) is not None]
    if not found:
        raise CommandError("No keyslots match given (old) password for erase operation")
    if set(found) == active and not is_forced:
        raise CommandError(
            "All the active keyslots match the (old) password that was given and erasing them"
            " will erase all the data in the image irreversibly - refusing operation"
        )
    for number in found:
        await volume.erase(number)


async def _check_slot(
    volume: LuksVolume, number: int, old_secret: str | None, secrets: Secrets
) -> None:
    """Refuse to erase a slot that has another password than was said, or none."""
    if old_secret is not None:
        password = secrets.find_password(old_secret)
        if await volume.key_in(number, password) is None:
            raise CommandError(
                f"Given keyslot {number} doesn't contain the given old password for erase operation"
            )
    if not volume.header.slots[number].is_active:
        raise CommandError(f"Given keyslot {number} is already erased (inactive) ")


def _check_number(number: int) -> None:
    if not 0 <= number < SLOTS:
        raise CommandError(
            f"Invalid keyslot {number & 0xFFFF_FFFF} specified, must be between 0 and {SLOTS - 1}"
        )
