# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Operation blockers: commands that a use of a node rules out."""

from __future__ import annotations

import pytest

from nbdjobs.errors import CommandError
from nbdjobs.nodes.op_blockers import BlockOp, OpBlockers


def test_the_operations_that_a_use_rules_out_are_refused_with_its_reason() -> None:
    blockers = OpBlockers("s")
    reason = "block device is in use by block job: backup"
    blockers.add(reason, allowed=frozenset({BlockOp.BACKUP_SOURCE}))
    blockers.add(reason)
    blockers.remove(reason)
    blockers.check(BlockOp.BACKUP_SOURCE)
    assert blockers.rules_out(BlockOp.RESIZE)
    assert blockers
    with pytest.raises(CommandError) as refusal:
        blockers.check(BlockOp.RESIZE)
    assert refusal.value.description == f"Node 's' is busy: {reason}"
    blockers.remove(reason)
    blockers.check(BlockOp.RESIZE)
    assert not blockers.rules_out(BlockOp.RESIZE)
    assert not blockers
