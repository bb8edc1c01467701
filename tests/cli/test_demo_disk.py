# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The demo's image, the copy set aside, and the comparison that is its proof."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.cli import demo_disk

MIB = 1 << 20
SIZE = 32 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    demo_disk.make_image(path, SIZE)
    return path


def test_the_image_has_data_and_holes(image: Path) -> None:
    content = image.read_bytes()
    part = SIZE // 4
    assert len(content) == SIZE
    assert image.stat().st_blocks * 512 < SIZE
    assert [content[start : start + part] == bytes(part) for start in range(0, SIZE, part)] == [
        False,
        True,
        False,
        True,
    ]


def test_the_copy_is_equal_and_as_sparse(image: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.img"
    demo_disk.set_aside(image, copy)
    assert copy.read_bytes() == image.read_bytes()
    assert copy.stat().st_blocks * 512 < SIZE
    assert demo_disk.count_differences(image, copy) == 0


def test_an_image_without_data_is_copied(tmp_path: Path) -> None:
    hole, copy = tmp_path / "hole", tmp_path / "copy"
    with hole.open("wb") as file:
        file.truncate(SIZE)
    demo_disk.set_aside(hole, copy)
    assert demo_disk.count_differences(hole, copy) == 0


@pytest.mark.parametrize("offset", [0, 1, demo_disk.CHUNK - 1, demo_disk.CHUNK, SIZE - 1])
def test_one_byte_that_differs_is_found(image: Path, tmp_path: Path, offset: int) -> None:
    copy = tmp_path / "copy.img"
    demo_disk.set_aside(image, copy)
    with copy.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([old ^ 0x80]))
    assert demo_disk.count_differences(image, copy) == 1


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_differences_are_counted_byte_by_byte(
    tmp_path_factory: pytest.TempPathFactory, first: bytes, second: bytes
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    (folder / "first").write_bytes(first)
    (folder / "second").write_bytes(second)
    expected = sum(a != b for a, b in zip(first, second, strict=False))
    expected += abs(len(first) - len(second))
    assert demo_disk.count_differences(folder / "first", folder / "second") == expected
