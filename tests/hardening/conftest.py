# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Hostile clients meet a real daemon: what is measured is what the system says of the process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hardening.victim import Victim


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Victim]:
    """A daemon with some disks; in the end it has to stop as always, with a clean log."""
    with Victim(tmp_path) as victim:
        yield victim
