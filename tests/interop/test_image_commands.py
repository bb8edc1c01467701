# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""nbdjobs info, check, map, snapshot and create, beside qemu-img and with its images."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest

from nbdjobs.cli.main import main
from nbdjobs.nodes.image_lock import ImageLock
from nbdjobs.nodes.permissions import ALL as ALL_PERMISSIONS
from nbdjobs.nodes.permissions import Permission
from tests.interop.tools import run, run_for_result

pytestmark = pytest.mark.interop

MIB: Final = 1024 * 1024

Folder = Callable[[], Path]


def qemu_img(*words: str | Path) -> str:
    return run("qemu-img", *words)


def write(path: Path, *commands: str) -> None:
    lines = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-f", "qcow2", *lines, path)


FILL: Final = ("write -P 1 0 300k", "write -z 512k 64k", "write -P 3 1M 64k", "discard 128k 64k")

#: Options of `qemu-img create`, and what is written then.
IMAGES: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "empty": ("", ()),
    "version 2": ("compat=0.10", FILL),
    "version 3": ("", FILL),
    "small clusters": ("cluster_size=512,refcount_bits=1", FILL),
    "large clusters": ("cluster_size=2M,refcount_bits=64", FILL),
    "lazy": ("lazy_refcounts=on", FILL),
    "subclusters": ("extended_l2=on", (*FILL, "write -P 4 1536k 512", "write -z 1540k 2k")),
    "zstd": ("compression_type=zstd", (*FILL, "write -c -P 7 1792k 128k")),
    "compressed": ("", (*FILL, "write -c -P 7 1792k 128k")),
    "metadata": ("preallocation=metadata", FILL),
    "metadata, subclusters": ("preallocation=metadata,extended_l2=on", ()),
    "full": ("preallocation=full", ()),
    "data file": ("data_file=data.raw", FILL),
    "raw data file": ("data_file=data.raw,data_file_raw=on", FILL),
    "overlay": ("backing_file=base.raw,backing_fmt=raw", FILL),
    "overlay of an overlay": ("backing_file=mid.qcow2,backing_fmt=qcow2", FILL),
    "overlay with subclusters": ("backing_file=mid.qcow2,backing_fmt=qcow2,extended_l2=on", FILL),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of the images, where relative names lead to each other."""
    place = tmp_path_factory.mktemp("images")
    data = Random(1).randbytes(MIB)
    with (place / "base.raw").open("wb") as base:
        base.write(data)
        base.truncate(3 * MIB // 2)
    with (place / "sparse.raw").open("wb") as sparse:
        sparse.truncate(4 * MIB)
        sparse.seek(MIB)
        sparse.write(data)
    cwd = Path.cwd()
    try:
        os.chdir(place)
        mid = "backing_file=base.raw,backing_fmt=raw"
        qemu_img("create", "-q", "-f", "qcow2", "-o", mid, "mid.qcow2")
        write(Path("mid.qcow2"), "write -P 9 256k 128k")
        for name, (options, commands) in IMAGES.items():
            given = ["-o", options] if options else []
            qemu_img("create", "-q", "-f", "qcow2", *given, f"{name}.qcow2", "2M")
            if commands:
                write(Path(f"{name}.qcow2"), *commands)
        for name in ("snapshots", "version 2 snapshots"):
            source = "version 2" if name.startswith("version 2") else "version 3"
            shutil.copy(f"{source}.qcow2", f"{name}.qcow2")
            qemu_img("snapshot", "-c", "first", f"{name}.qcow2")
            write(Path(f"{name}.qcow2"), "write -P 5 0 128k")
            qemu_img("snapshot", "-c", "second", f"{name}.qcow2")
        (place / "word").write_bytes(b"sesame")
        # Not by qemu-img, which gives up where it cannot measure how long it took.
        make = ["create", "--password-file", "word", "-f"]
        assert main([*make, "luks", "-o", "iter-time=10", "volume.luks", "1M"]) == 0
        assert main([*make, "qcow2", "-o", "encrypt.iter-time=10", "encrypted.qcow2", "1M"]) == 0
    finally:
        os.chdir(cwd)
    return place


ALL: Final = (*(f"{name}.qcow2" for name in IMAGES), "snapshots.qcow2", "version 2 snapshots.qcow2")


@pytest.fixture
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def ours(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    """Run nbdjobs; the exit code, and what was printed as JSON."""
    capsys.readouterr()
    code = main([*words, "--output", "json"])
    return code, json.loads(capsys.readouterr().out)


def theirs(*words: str) -> tuple[int, Any]:
    done = run_for_result("qemu-img", *words, "--output=json")
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("name", [*ALL, "sparse.raw", "volume.luks", "encrypted.qcow2"])
def test_info_tells_what_qemu_img_tells(
    in_folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert ours(capsys, "info", name) == theirs("info", name)


@pytest.mark.parametrize("name", [name for name in ALL if "overlay" in name])
def test_info_tells_of_the_whole_chain(
    in_folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    found = ours(capsys, "info", "--backing-chain", name)
    assert found == theirs("info", "--backing-chain", name)
    assert len(found[1]) > 1


@pytest.mark.parametrize("name", ALL)
def test_check_tells_what_qemu_img_tells(
    in_folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert ours(capsys, "check", name) == theirs("check", name)


@pytest.mark.parametrize("name", [*ALL, "sparse.raw"])
def test_map_tells_what_qemu_img_tells(
    in_folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert ours(capsys, "map", name) == theirs("map", name)


def test_map_tells_of_a_part(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for start, length in (("0", "1"), ("100000", "300000"), ("1M", "1M")):
        mine = ours(capsys, "map", "-s", start, "-l", length, "overlay.qcow2")
        its = theirs("map", f"--start-offset={start}", f"--max-length={length}", "overlay.qcow2")
        assert mine == its


def test_map_of_encrypted_images_tells_no_places(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = ours(capsys, "map", "encrypted.qcow2", "--password-file", "word")
    assert code == 0
    assert [(each["start"], each["length"], each["zero"]) for each in found] == [(0, MIB, True)]
    code, found = ours(capsys, "map", "volume.luks", "--password-file", "word")
    assert [(each["length"], each["data"], "offset" in each) for each in found] == [
        (MIB, True, False)
    ]


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """An image with a leaked cluster at its end."""
    path = tmp_path / "damaged.qcow2"
    shutil.copy(folder / "version 3.qcow2", path)
    with path.open("r+b") as file:
        file.seek(0, 2)
        end = -(-file.tell() // 65536)
        file.truncate((end + 1) * 65536)
        file.seek(2 * 65536 + 2 * end)
        file.write(b"\0\1")
    return path


def unnamed(answer: tuple[int, Any]) -> tuple[int, Any]:
    return answer[0], {name: value for name, value in answer[1].items() if name != "filename"}


@pytest.mark.parametrize("repair", ["leaks", "all"])
def test_leaks_are_told_and_repaired(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], repair: str
) -> None:
    found = ours(capsys, "check", str(damaged))
    assert found[0] == 3
    assert found == theirs("check", str(damaged))
    other = shutil.copy(damaged, tmp_path / "other.qcow2")
    mine = unnamed(ours(capsys, "check", "-r", repair, str(damaged)))
    assert mine == unnamed(theirs("check", "-r", repair, str(other)))
    assert mine[0] == 0
    assert ours(capsys, "check", str(damaged))[0] == 0
    qemu_img("check", damaged)


def test_corruption_is_told_and_repaired(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "damaged.qcow2"
    shutil.copy(folder / "version 3.qcow2", path)
    with path.open("r+b") as file:
        file.seek(2 * 65536 + 2 * 5)
        file.write(b"\0\0")
    code, found = ours(capsys, "check", str(path))
    assert (code, found["corruptions"] > 0) == (2, True)
    assert ours(capsys, "check", "--repair", "leaks", str(path))[0] == 2
    code, found = ours(capsys, "check", "--repair", "all", str(path))
    assert (code, found["corruptions-fixed"] > 0) == (0, True)
    qemu_img("check", path)


def test_formats_without_a_check_have_an_exit_code_of_their_own(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "sparse.raw"]) == 63
    assert run_for_result("qemu-img", "check", "sparse.raw").returncode == 63


def test_text_forms(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--backing-chain", "overlay of an overlay.qcow2"]) == 0
    text = capsys.readouterr().out
    assert text.count("image:") == 3
    assert "backing file:   mid.qcow2 (qcow2)" in text
    assert main(["info", "snapshots.qcow2"]) == 0
    assert "second" in capsys.readouterr().out
    assert main(["check", "compressed.qcow2"]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    assert main(["map", "compressed.qcow2"]) == 0
    assert "(compressed or encrypted)" in capsys.readouterr().out
    assert main(["snapshot", "snapshots.qcow2"]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [
        "first",
        "second",
    ]


def test_snapshots_are_taken_applied_and_deleted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(shutil.copy(folder / "version 3.qcow2", tmp_path / "disk.qcow2"))
    before = tmp_path / "before.raw"
    qemu_img("convert", "-O", "raw", path, before)
    assert main(["snapshot", "-c", "mine", path]) == 0
    write(Path(path), "write -P 77 0 2M")
    assert [each["name"] for each in ours(capsys, "snapshot", path)[1]] == ["mine"]
    assert main(["snapshot", "-a", "mine", path]) == 0
    qemu_img("compare", path, before)
    assert main(["snapshot", "-d", "1", path]) == 0
    assert ours(capsys, "snapshot", path) == (0, [])
    qemu_img("check", path)
    assert main(["snapshot", "-d", "1", path]) == 1
    assert "has no snapshot '1'" in capsys.readouterr().err


CREATED: Final[dict[str, tuple[list[str], list[str]]]] = {
    "raw": (["-f", "raw"], ["-f", "raw"]),
    "default": ([], ["-f", "raw"]),
    "qcow2": (["-f", "qcow2"], ["-f", "qcow2"]),
    "their options": (
        ["-f", "qcow2", "-o", "compat=0.10,cluster_size=4K"],
        ["-f", "qcow2", "-o", "compat=0.10,cluster_size=4K"],
    ),
    "our options": (
        ["-f", "qcow2", "-o", "version=v3", "-o", "refcount-bits=8,extended-l2,cluster-size=32K"],
        ["-f", "qcow2", "-o", "refcount_bits=8,extended_l2=on,cluster_size=32K"],
    ),
    "preallocated": (
        ["-f", "qcow2", "-o", "preallocation=full,lazy-refcounts=on"],
        ["-f", "qcow2", "-o", "preallocation=full,lazy_refcounts=on"],
    ),
}


@pytest.mark.parametrize("name", CREATED)
def test_new_images_are_as_qemu_img_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    mine, its = CREATED[name]
    described = []
    for side in ("ours", "theirs"):
        (tmp_path / side).mkdir()
        monkeypatch.chdir(tmp_path / side)
        if side == "ours":
            assert main(["create", *mine, "disk", "1M"]) == 0
        else:
            qemu_img("create", "-q", *its, "disk", "1M")
        info = theirs("info", "disk")[1]
        info.pop("actual-size")
        described.append(info)
    assert described[0] == described[1]


def test_an_overlay_has_the_size_of_what_is_below(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = tmp_path / "overlay.qcow2"
    base = folder / "mid.qcow2"
    words = ["create", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(overlay)]
    assert main(words) == 0
    qemu_img("compare", overlay, base)
    info = theirs("info", str(overlay))[1]
    assert (info["backing-filename"], info["backing-filename-format"]) == (str(base), "qcow2")


def test_encrypted_images_open_with_their_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    word = tmp_path / "word"
    word.write_bytes(b"sesame")
    for image_format, options in (("luks", "iter-time=10"), ("qcow2", "encrypt.iter-time=10")):
        path = tmp_path / image_format
        words = ["create", "-f", image_format, "--password-file", str(word), "-o", options]
        assert main([*words, str(path), "1M"]) == 0
        encrypt = "encrypt." if image_format == "qcow2" else ""
        opts = f"driver={image_format},file.filename={path},{encrypt}key-secret=word"
        if encrypt:
            opts += ",encrypt.format=luks"
        secret = f"secret,id=word,file={word}"
        run("qemu-io", "--object", secret, "--image-opts", "-c", "write 0 64k", opts)


REFUSED: Final[dict[str, tuple[list[str], str]]] = {
    "no file": (["info", "missing"], "'missing' cannot be opened: No such file or directory"),
    "a folder": (["check", "."], "'.' cannot be opened: Is a directory"),
    "no size": (["create", "new.raw"], "the size of the disk is missing: expected one such as 10G"),
    "no format below": (
        ["create", "-f", "qcow2", "-b", "base.raw", "new.qcow2"],
        "a backing file has to come with its format, which is never guessed: expected"
        " --backing-format",
    ),
    "below raw": (
        ["create", "-b", "base.raw", "-F", "raw", "a"],
        "a raw image has no backing file",
    ),
    "its own": (
        ["create", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "mid.qcow2"],
        "'mid.qcow2' cannot be its own backing file",
    ),
    "a bad option": (
        ["create", "-f", "qcow2", "-o", "cluster-size=3", "new.qcow2", "1M"],
        "'new.qcow2' cannot be made: Cluster size must be a power of two between 512 and 2048k",
    ),
    "an unknown option": (
        ["create", "-f", "qcow2", "-o", "speed=3", "new.qcow2", "1M"],
        "'new.qcow2' cannot be made: Parameter 'speed' is unexpected",
    ),
    "no password": (
        ["create", "-f", "luks", "new.luks", "1M"],
        "a luks image needs a password: expected --password-file",
    ),
    "snapshots of raw": (
        ["snapshot", "base.raw"],
        "'base.raw' is no qcow2 image, and only those hold snapshots",
    ),
    "behind the end": (
        ["map", "-s", "1G", "mid.qcow2"],
        "'mid.qcow2' ends at byte 1572864: expected an offset before that",
    ),
    "both kinds of info": (
        ["info", "mid.qcow2", "--qmp", "socket"],
        "--qmp is about a server: expected no image with it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_said_in_a_sentence_and_makes_nothing(
    in_folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    words, text = REFUSED[name]
    before = {path.name: path.stat().st_mtime_ns for path in in_folder.iterdir()}
    assert main(words) in (1, 2)
    assert capsys.readouterr().err == f"nbdjobs: {text}\n"
    assert {path.name: path.stat().st_mtime_ns for path in in_folder.iterdir()} == before


def test_encrypted_images_are_checked_without_their_password(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = ours(capsys, "check", "encrypted.qcow2")
    assert (code, found["total-clusters"]) == (0, 16)


def test_images_in_use_are_looked_at_only_when_told_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copy(folder / "version 3.qcow2", tmp_path / "disk.qcow2"))
    with path.open("r+b") as file:
        ImageLock(file.fileno()).acquire(Permission.WRITE, ALL_PERMISSIONS & ~Permission.WRITE)
        for command in ("info", "check", "map"):
            capsys.readouterr()
            assert main([command, str(path)]) == 1
            assert f"'{path}' is in use by another program" in capsys.readouterr().err
            assert main([command, "-U", str(path)]) == 0
        assert main(["check", "-r", "all", str(path)]) == 1
        assert main(["snapshot", "-c", "new", str(path)]) == 1
        assert main(["create", "-f", "qcow2", str(path), "1M"]) == 1
    assert ours(capsys, "check", str(path))[0] == 0
