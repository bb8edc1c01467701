# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Clusters are used again only when nothing stable refers to them and nobody knows them."""

from __future__ import annotations

from nbdjobs.nodes.qcow2.reclaim import Freed, Reason, Reclaim


def test_what_was_unlinked_is_free_after_the_commit() -> None:
    reclaim = Reclaim()
    reclaim.drop(5)
    freed = reclaim.begin_commit()
    assert reclaim.ready() == []
    reclaim.committed(freed)
    assert reclaim.ready() == [Freed(5, 1, False)]
    assert reclaim.ready() == []


def test_requests_that_began_before_the_commit_ended_are_waited_for() -> None:
    reclaim = Reclaim()
    with reclaim.request():
        reclaim.drop(5)
        reclaim.committed(reclaim.begin_commit())
        with reclaim.request():
            reclaim.drop(6)
            reclaim.committed(reclaim.begin_commit())
        # The second batch may not overtake the first: its request may know both.
        assert reclaim.ready() == []
    assert [freed.first for freed in reclaim.ready()] == [5, 6]


def test_requests_that_begin_afterwards_are_not_waited_for() -> None:
    reclaim = Reclaim()
    reclaim.drop(5)
    reclaim.committed(reclaim.begin_commit())
    with reclaim.request():
        assert len(reclaim.ready()) == 1


def test_what_a_commit_failed_to_unlink_waits_for_the_next() -> None:
    reclaim = Reclaim()
    reclaim.drop(5)
    freed = reclaim.begin_commit()
    reclaim.drop(9)
    reclaim.commit_failed(freed)
    assert reclaim.ready() == []
    reclaim.committed(reclaim.begin_commit())
    assert [freed.first for freed in reclaim.ready()] == [5, 9]


def test_neighbours_of_the_same_fate_are_one_run() -> None:
    reclaim = Reclaim([Reason.REQUEST])
    reclaim.drop(5)
    reclaim.drop(6, 2)
    reclaim.drop(8, 1, Reason.REQUEST)
    reclaim.drop(10)
    assert reclaim.unlinked == [Freed(5, 3, False), Freed(8, 1, True), Freed(10, 1, False)]
