# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The tables that our own readers are tested with hold what the real program says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.oracle import Oracle, command_line_refusal, refusal
from tests.qapi.cases import BLOCKDEV_JSON, BLOCKDEV_KEYVAL, KEYVAL_REFUSED, SIZES


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    directory: Path = tmp_path_factory.mktemp("oracle")
    with Oracle(directory, capabilities=[]) as running:
        yield running


@pytest.mark.parametrize(("text", "sentence"), [*KEYVAL_REFUSED.items(), *BLOCKDEV_KEYVAL.items()])
def test_command_line_text(text: str, sentence: str | None) -> None:
    assert command_line_refusal("--blockdev", text) == sentence


@pytest.mark.parametrize(("arguments", "sentence"), BLOCKDEV_JSON)
def test_command_arguments(oracle: Oracle, arguments: object, sentence: str) -> None:
    assert refusal(oracle.execute("blockdev-add", arguments)) == sentence


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes(text: str, size: int | None) -> None:
    option = "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=p,logical-block-size=" + text
    said = command_line_refusal("--export", option)
    bad_size = "Parameter 'logical-block-size' expects size"
    assert (said == bad_size) is (size is None)
