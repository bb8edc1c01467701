# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""User-created objects: what `--object` makes and other options refer to by id."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from nbdjobs.errors import CommandError
from nbdjobs.nodes.graph import is_well_formed_id
from nbdjobs.qapi.types import flat_union


@flat_union("qom-type", lambda: {"iothread": IothreadProperties, "secret": SecretProperties})
@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectOptions:
    """Properties of an object (QAPI `ObjectOptions`)."""

    qom_type: str
    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IothreadProperties(ObjectOptions):
    """A thread for requests: accepted, so that scripts work, while one event loop serves all."""

    poll_max_ns: int | None = None
    poll_grow: int | None = None
    poll_shrink: int | None = None
    aio_max_batch: int | None = None
    thread_pool_min: int | None = None
    thread_pool_max: int | None = None


class SecretFormat(StrEnum):
    """How a secret is written."""

    RAW = "raw"
    BASE64 = "base64"


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretProperties(ObjectOptions):
    """A password or key, given in the option or in a file."""

    loaded: bool | None = None
    format: SecretFormat | None = None
    data: str | None = None
    file: str | None = None


class Objects:
    """All user-created objects by id."""

    def __init__(self) -> None:
        self._objects: dict[str, ObjectOptions] = {}
        self._secrets: dict[str, bytes] = {}

    def add(self, options: ObjectOptions) -> None:
        """Create an object; `CommandError` when its id or a property is wrong."""
        if not is_well_formed_id(options.id):
            raise CommandError("Parameter 'id' expects an identifier")
        if options.id in self._objects:
            raise CommandError(
                f"attempt to add duplicate property '{options.id}' to object (type 'container')"
            )
        if isinstance(options, SecretProperties):
            self._secrets[options.id] = _load(options)
        self._objects[options.id] = options

    def check_iothread(self, name: str) -> None:
        """Raise `CommandError` unless an iothread of that id exists."""
        if not isinstance(self._objects.get(name), IothreadProperties):
            raise CommandError(f'iothread "{name}" not found')

    def secret(self, name: str) -> bytes:
        """The content of a secret; `CommandError` if there is none of that id."""
        if name not in self._secrets:
            raise CommandError(f"No secret with id '{name}'")
        return self._secrets[name]


def _load(options: SecretProperties) -> bytes:
    if options.data is not None and options.file is not None:
        raise CommandError("'file' and 'data' are mutually exclusive")
    if options.data is not None:
        content = options.data.encode()
    elif options.file is not None:
        content = _read(options.file)
    else:
        raise CommandError("Either 'file' or 'data' must be provided")
    if options.format is not SecretFormat.BASE64:
        return content
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise CommandError("Base64 data contains invalid characters") from error


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CommandError(
            f"Unable to read {path}: Failed to open file “{path}”: {error.strerror}"
        ) from error
