# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A disk is reopened over and over under heavy writes and backups; neither notices anything."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.stress.machine import DISK_SIZE, HELD_BACK, Machine

ROUNDS = 4
REOPENINGS = 6


@pytest.mark.parametrize("seed", range(2))
def test_writes_and_backups_go_on(tmp_path: Path, seed: int) -> None:
    machine = Machine(tmp_path, random.Random(seed))
    with machine.daemon:
        crowd = machine.crowd()
        crowd.start()
        try:
            for number in range(ROUNDS):
                backup = machine.start_backup(f"backup{number}", speed=HELD_BACK)
                for _ in range(REOPENINGS):
                    crowd.let_write(machine.random.randrange(60))
                    reopen(machine)
                assert machine.end_backup(backup) is None
                machine.check_backup(backup)
        finally:
            crowd.finish()
        assert not any(writer.errors for writer in crowd.writers)
        machine.check_disk()


def reopen(machine: Machine) -> None:
    """Give both nodes of the disk other options, in one command."""
    random_, disk = machine.random, machine.disk
    file: dict[str, Any] = {
        "driver": "file",
        "node-name": f"{disk.name}-file",
        "filename": str(disk.path),
        "cache": {"direct": random_.random() < 0.3},
        "auto-read-only": random_.random() < 0.5,
        "discard": "unmap",  # what is trimmed has to read as zeroes
    }
    raw: dict[str, Any] = {
        "driver": "raw",
        "node-name": disk.name,
        "file": file["node-name"],
        "detect-zeroes": random_.choice(["off", "on"]),
        "discard": "unmap",
    }
    if random_.random() < 0.5:
        raw["size"] = DISK_SIZE
    machine.daemon.qmp.execute("blockdev-reopen", {"options": random_.sample([file, raw], 2)})
