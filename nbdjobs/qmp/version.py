# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The version that clients are told.

Clients choose what they use by the version triple, so it names the QEMU release whose
commands and texts nbdjobs follows; the package says what really answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nbdjobs import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionTriple:
    """QAPI `VersionTriple`."""

    major: int
    minor: int
    micro: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionInfo:
    """QAPI `VersionInfo`."""

    qemu: VersionTriple
    package: str


VERSION: Final = VersionInfo(
    qemu=VersionTriple(major=7, minor=2, micro=0), package=f"nbdjobs {__version__}"
)
