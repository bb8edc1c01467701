# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The table of what is covered from outside names tests that exist."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.interop.coverage import COVERAGE


def names_of_tests(file: Path) -> set[str]:
    return {
        node.name
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("word", COVERAGE)
def test_the_test_exists(word: str) -> None:
    file, _, function = COVERAGE[word].partition("::")
    assert function in names_of_tests(Path(__file__).with_name(file))
