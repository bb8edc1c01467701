# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Refcounts of all widths behave like a list of numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.nodes.qcow2.refcount_table import unpack_block

orders = st.integers(0, 6)


@given(orders, st.binary(min_size=16, max_size=64).filter(lambda data: len(data) % 8 == 0))
def test_what_is_packed_is_what_was_unpacked(order: int, data: bytes) -> None:
    block = unpack_block(data, order)
    assert len(block) == len(data) * 8 >> order
    assert block.pack() == data
    assert dict(block.used()) == {i: block[i] for i in range(len(block)) if block[i]}


@given(orders, st.data())
def test_counters_are_independent(order: int, data: st.DataObject) -> None:
    block = unpack_block(bytes(32), order)
    model = [0] * len(block)
    values = st.integers(0, (1 << (1 << order)) - 1)
    changes = st.lists(st.tuples(st.integers(0, len(block) - 1), values), max_size=40)
    for index, value in data.draw(changes):
        block[index] = model[index] = value
    assert [block[index] for index in range(len(block))] == model
    assert list(block.used()) == [(i, value) for i, value in enumerate(model) if value]
    start = data.draw(st.integers(0, len(block)))
    free = [index for index in range(start, len(block)) if not model[index]]
    assert block.find_zero(start) == (free[0] if free else -1)


@pytest.mark.parametrize("order", range(7))
def test_a_full_block_has_no_zero(order: int) -> None:
    assert unpack_block(b"\xff" * 16, order).find_zero(0) == -1


def test_the_layout_is_that_of_the_specification() -> None:
    assert unpack_block(b"\x01\x00\x80\x00\x00\x00\x00\x00", 0)[0] == 1
    assert dict(unpack_block(b"\x01\x00\x80\x00\x00\x00\x00\x00", 0).used()) == {0: 1, 23: 1}
    assert dict(unpack_block(b"\x21\x43\x00\x00", 2).used()) == {0: 1, 1: 2, 2: 3, 3: 4}
    assert dict(unpack_block(b"\x00\x01\x02\x00", 4).used()) == {0: 1, 1: 512}
