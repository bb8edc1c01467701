# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A daemon that ends under load, by SIGKILL or SIGTERM, while a backup runs."""

from __future__ import annotations

import random
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.interop.qmp_client import QmpClient, QmpError
from tests.stress.machine import HELD_BACK, KIB, Machine


@pytest.mark.parametrize("seed", range(3))
def test_a_crash_loses_no_acknowledged_write_and_is_in_nobodys_way(
    tmp_path: Path, seed: int
) -> None:
    machine = Machine(tmp_path, random.Random(seed), is_direct=seed == 0)
    crowd = machine.crowd()
    crowd.start()
    machine.start_backup("lost", speed=256 * KIB)
    crowd.let_write(machine.random.randrange(500))
    machine.crash()
    crowd.join_cut_off()
    machine.check_disk()

    # Neither sockets nor locks are in the way of another try in the same place.
    machine.start_again()
    with machine.daemon:
        crowd = machine.crowd()
        crowd.start()
        backup = machine.start_backup("lost")
        assert machine.end_backup(backup) is None
        machine.check_backup(backup)
        crowd.finish()
        machine.check_disk()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sync", ["full", "none"])
def test_told_to_end_the_daemon_answers_what_it_began_and_cancels_its_jobs(
    tmp_path: Path, sync: str, seed: int
) -> None:
    machine = Machine(tmp_path, random.Random(seed), is_direct=seed == 0)
    crowd = machine.crowd()
    crowd.start()
    speed = machine.random.choice((HELD_BACK, 4096 * KIB))
    backup = machine.start_backup("backup", speed=speed, sync=sync)
    crowd.let_write(machine.random.randrange(500))
    if machine.random.random() < 0.5:
        with suppress(QmpError):  # it may be over
            machine.daemon.qmp.execute("block-job-pause", {"device": "backup"})
    machine.daemon.process.send_signal(signal.SIGTERM)
    crowd.join_cut_off()
    machine.daemon.assert_ended_clean()
    names = [event["event"] for event in remaining_events(machine.daemon.qmp)]
    machine.check_disk()
    if "BLOCK_JOB_COMPLETED" in names:
        machine.check_backup(backup)
    else:
        assert names.count("BLOCK_JOB_CANCELLED") == 1


def remaining_events(qmp: QmpClient) -> list[dict[str, Any]]:
    """All events up to the end of the session."""
    with pytest.raises(ConnectionError):
        qmp.wait_event("NEVER")
    qmp.close()
    return qmp.events
