# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Backups of a disk under heavy writes are the disk at the instant of their start, to the byte."""

from __future__ import annotations

import os
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.stress.machine import HELD_BACK, KIB, Backup, Machine
from tests.stress.writers import Crowd

ROUNDS = 15


@pytest.mark.parametrize("seed", range(2))
def test_completed_backups_are_exact_whatever_happens_meanwhile(tmp_path: Path, seed: int) -> None:
    check_backups(Machine(tmp_path, random.Random(seed)))


@pytest.mark.parametrize("seed", range(2))
def test_they_are_exact_on_storage_that_takes_its_time(tmp_path: Path, seed: int) -> None:
    require_direct_io(tmp_path)
    check_backups(Machine(tmp_path, random.Random(seed), is_direct=True))


def check_backups(machine: Machine) -> None:
    with machine.daemon:
        nodes = machine.node_names()
        crowd = machine.crowd()
        crowd.start()
        try:
            completed = sum(back_up(machine, crowd, number) for number in range(ROUNDS))
        finally:
            crowd.finish()
        assert completed
        assert machine.node_names() == nodes
        assert machine.daemon.qmp.execute("query-jobs") == []
        assert not any(writer.errors for writer in crowd.writers)
        machine.check_disk()


def require_direct_io(directory: Path) -> None:
    """Skip the test where the file system knows no direct I/O."""
    path = directory / "trial"
    path.touch()
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError:
        pytest.skip("the file system knows no O_DIRECT")


def back_up(machine: Machine, crowd: Crowd, number: int) -> int:
    """Start one or two backups, disturb them, and check them; returns how many completed."""
    backups = [
        start(machine, crowd, f"backup{number}-{part}")
        for part in range(machine.random.choice((1, 1, 2)))
    ]
    cancelled: set[Backup] = set()
    for _ in range(machine.random.randrange(4)):
        crowd.let_write(machine.random.randrange(100))
        backup = machine.random.choice(backups)
        if machine.steer(backup):
            cancelled.add(backup)
    completed = 0
    for backup in backups:
        error = machine.end_backup(backup)
        if error is None:
            machine.check_backup(backup)
            completed += 1
        else:
            assert backup in cancelled, error
    return completed


def start(machine: Machine, crowd: Crowd, job: str) -> Backup:
    """Start a backup; every other time while no write is in flight, so that all is known."""
    random_ = machine.random
    options: dict[str, Any] = {
        "speed": random_.choice((HELD_BACK, 256 * KIB, 8192 * KIB, 0)),
        "x-perf": {
            "use-copy-range": random_.random() < 0.5,
            "max-workers": random_.choice((1, 2, 64)),
            "max-chunk": random_.choice((0, 64 * KIB, 256 * KIB)),
        },
    }
    crowd.let_write(random_.randrange(100))
    with crowd.held() if random_.random() < 0.5 else nullcontext():
        return machine.start_backup(job, **options)
