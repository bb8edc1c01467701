# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest

from nbdjobs.nodes.pace import FIRST_PAUSE_NS, LONGEST_PAUSE_NS, SLOW_NS, TRIAL, Pace


class Machine:
    """A clock, and a disk whose calls take as long as the test says."""

    def __init__(self) -> None:
        self.now = 10 * LONGEST_PAUSE_NS
        self.sleeps = 0
        self.pace = Pace(lambda: self.now, lambda: self.sleeps)

    def call(self, *, slow: bool = False, slept: bool = False) -> None:
        self.now += SLOW_NS + 1 if slow else 1000
        self.sleeps += slept

    def watch(self, *, slow: bool = False, slept: bool = False) -> None:
        assert self.pace.may_run_inline()
        self.pace.watch(lambda: self.call(slow=slow, slept=slept))


def test_calls_begin_inline() -> None:
    machine = Machine()
    assert machine.pace.is_fast
    assert machine.pace.may_run_inline()


def test_one_slow_call_leads_to_a_watch_and_not_to_threads() -> None:
    machine = Machine()
    machine.pace.strike()
    assert not machine.pace.is_fast
    assert machine.pace.may_run_inline()


def test_a_watch_ends_after_enough_fast_calls() -> None:
    machine = Machine()
    machine.pace.strike()
    for _ in range(TRIAL - 1):
        machine.watch()
        assert not machine.pace.is_fast
    machine.watch()
    assert machine.pace.is_fast


def test_being_set_aside_by_the_scheduler_is_not_the_disks_fault() -> None:
    machine = Machine()
    machine.pace.strike()
    for _ in range(TRIAL):
        machine.watch(slow=True, slept=False)
    assert machine.pace.is_fast


def test_a_short_sleep_is_fast_enough() -> None:
    machine = Machine()
    machine.pace.strike()
    for _ in range(TRIAL):
        machine.watch(slow=False, slept=True)
    assert machine.pace.is_fast


def to_threads(machine: Machine) -> None:
    machine.pace.strike()
    machine.watch(slow=True, slept=True)
    assert not machine.pace.may_run_inline()


def test_a_disk_that_hangs_is_never_tried_inline() -> None:
    machine = Machine()
    to_threads(machine)
    machine.now += 1000 * LONGEST_PAUSE_NS
    assert not machine.pace.may_run_inline()


def test_a_slow_disk_is_tried_again_after_a_pause() -> None:
    machine = Machine()
    to_threads(machine)
    machine.pace.thread_returned()
    assert not machine.pace.may_run_inline()
    machine.now += FIRST_PAUSE_NS
    for _ in range(TRIAL):
        machine.watch()
    assert machine.pace.is_fast


def test_pauses_grow_while_the_disk_stays_slow() -> None:
    machine = Machine()
    to_threads(machine)
    pause = FIRST_PAUSE_NS
    for _ in range(20):
        machine.pace.thread_returned()
        machine.now += pause - 1
        assert not machine.pace.may_run_inline()
        machine.now += 1
        machine.watch(slow=True, slept=True)
        pause = min(2 * pause, LONGEST_PAUSE_NS)
    assert pause == LONGEST_PAUSE_NS


def test_a_disk_that_was_good_for_long_begins_with_a_short_pause_again() -> None:
    machine = Machine()
    to_threads(machine)
    machine.pace.thread_returned()
    machine.now += FIRST_PAUSE_NS
    for _ in range(TRIAL):
        machine.watch()
    machine.now += 2 * LONGEST_PAUSE_NS
    to_threads(machine)
    machine.pace.thread_returned()
    machine.now += FIRST_PAUSE_NS
    assert machine.pace.may_run_inline()


def test_a_call_that_fails_is_judged_like_any_other() -> None:
    machine = Machine()
    machine.pace.strike()

    def fail() -> None:
        machine.call(slow=True, slept=True)
        raise OSError

    with pytest.raises(OSError, match=r"^$"):
        machine.pace.watch(fail)
    assert not machine.pace.may_run_inline()
