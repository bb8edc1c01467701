# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Images are looked at before they are served, and get names."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.cli.exits import CliError
from nbdjobs.cli.images import (
    FOREIGN_MAGIC,
    NODE_NAME_MAX,
    QCOW2_MAGIC,
    Format,
    export_names,
    look_at,
    node_name,
)
from nbdjobs.cli.locks import FLOCK


def look(path: Path) -> str:
    """Why an image is refused."""
    with pytest.raises(CliError) as refused:
        look_at(path, read_only=False)
    assert str(path) in str(refused.value)
    return str(refused.value)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1000))
    return path


def test_a_file_is_seen_with_its_size(image: Path) -> None:
    found = look_at(image, read_only=False)
    assert (found.path, found.size, found.is_device) == (image, 1000, False)
    assert found.driver == "file"


def test_a_relative_path_becomes_absolute(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(image.parent)
    assert look_at(Path("disk.img"), read_only=False).path == image


def test_a_missing_image_is_refused(tmp_path: Path) -> None:
    assert "No such file" in look(tmp_path / "missing.img")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "expected a regular file or a block device" in look(tmp_path)


def test_a_character_device_is_refused() -> None:
    assert "expected a regular file or a block device" in look(Path("/dev/null"))


def test_an_empty_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk.img").touch()
    assert "is empty" in look(tmp_path / "disk.img")


def test_a_name_that_cannot_be_printed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "di\nsk.img"
    path.write_bytes(b"x")
    with pytest.raises(CliError, match="printable"):
        look_at(path, read_only=False)


@pytest.mark.parametrize(
    ("byte", "read_only", "is_refused"),
    [
        (100, False, True),
        (101, False, True),
        (201, False, True),
        (101, True, True),
        (100, True, False),
        (201, True, False),
        (99, False, False),
        (300, False, False),
    ],
)
def test_an_image_that_another_program_uses_is_refused(
    image: Path, byte: int, read_only: bool, is_refused: bool
) -> None:
    with image.open("rb") as file:
        lock = FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        if is_refused:
            with pytest.raises(CliError, match="in use by another program"):
                look_at(image, read_only=read_only)
        else:
            assert look_at(image, read_only=read_only).size == 1000


@pytest.mark.parametrize("magic", FOREIGN_MAGIC)
def test_another_format_is_refused_unless_raw_is_asked_for(image: Path, magic: bytes) -> None:
    image.write_bytes(magic + bytes(1000))
    assert f"looks like a {FOREIGN_MAGIC[magic]} image" in look(image)
    assert look_at(image, read_only=False, chosen=Format.RAW).size == 1000 + len(magic)


def test_a_qcow2_image_is_served_as_one_only_if_that_is_asked_for(image: Path) -> None:
    image.write_bytes(QCOW2_MAGIC + bytes(20) + (5 << 20).to_bytes(8, "big") + bytes(100))
    assert "--format qcow2 serves the disk in it" in look(image)
    found = look_at(image, read_only=False, chosen=Format.QCOW2)
    assert (found.size, found.format) == (5 << 20, Format.QCOW2)


@pytest.mark.parametrize("content", [bytes(1000), QCOW2_MAGIC + bytes(27)])
def test_what_is_no_qcow2_image_is_not_served_as_one(image: Path, content: bytes) -> None:
    image.write_bytes(content)
    with pytest.raises(CliError, match="is not a qcow2 image"):
        look_at(image, read_only=False, chosen=Format.QCOW2)


def test_names_come_from_the_files() -> None:
    paths = [Path("/a/root.img"), Path("data.raw"), Path("plain"), Path("v1.2.img")]
    assert export_names(paths, []) == ["root", "data", "plain", "v1.2"]


def test_chosen_names_go_to_the_first_images() -> None:
    assert export_names([Path("a.img"), Path("b.img")], ["first"]) == ["first", "b"]
    assert export_names([Path("a.img")], [""]) == [""]


@pytest.mark.parametrize(
    ("paths", "names", "reason"),
    [
        (["a.img"], ["x", "y"], "2 names were given for 1 image"),
        (["1/a.img", "2/a.img"], [], "'1/a.img' and '2/a.img' would both be exported as 'a'"),
        (["a.img", "b.img"], ["x", "x"], "would both be exported as 'x'"),
        (["a.img", "b.img"], ["b"], "would both be exported as 'b'"),
        (["a.img"], ["x\0"], "cannot be an export name"),
        (["a.img"], ["x" * 4097], "cannot be an export name"),
    ],
)
def test_names_that_cannot_work_are_refused(
    paths: list[str], names: list[str], reason: str
) -> None:
    with pytest.raises(CliError, match=re.escape(reason)):
        export_names([Path(path) for path in paths], names)


@pytest.mark.parametrize("name", ["disk", "vm-1.root_a", "a" * NODE_NAME_MAX])
def test_a_good_name_is_the_node_name(name: str) -> None:
    assert node_name(name) == name


@given(st.text())
def test_a_node_name_is_one_that_qemu_accepts(name: str) -> None:
    node = node_name(name)
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*", node)
    assert len(node) <= NODE_NAME_MAX
    assert node_name(node) == node


def test_names_that_look_alike_stay_apart() -> None:
    alike = ["my disk", "my-disk", "my_disk", "my\tdisk", "1", "2", "", "x" * 40, "x" * 41]
    assert len({node_name(name) for name in alike}) == len(alike)
