# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The short form of `make fuzz`: always the same examples."""

from __future__ import annotations

import pytest

from tests.fuzz.hypothesis_engine import run_examples
from tests.fuzz.targets import TARGETS, Target

EXAMPLES = 100


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_sound(name: str) -> None:
    for data in TARGETS[name].seeds:
        TARGETS[name].run(data)


@pytest.mark.parametrize("name", TARGETS)
def test_spoilt_seeds_are_sound(name: str) -> None:
    run_examples(TARGETS[name], EXAMPLES)


def test_a_failure_is_found() -> None:
    def fails(data: bytes) -> None:
        assert b"needle" not in data[3:]

    with pytest.raises(AssertionError):
        run_examples(Target(fails, (b"hay hay needle hay",)), EXAMPLES)
