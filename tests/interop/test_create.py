# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""blockdev-create makes what QEMU makes, and refuses in its words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from tests.interop.image_jobs import CREATE, Options, Step, ours, theirs
from tests.interop.oracle import Oracle
from tests.interop.tools import run

pytestmark = pytest.mark.interop

MIB: Final = 1024 * 1024


def create(driver: str, **options: Any) -> Step:
    named = {name.replace("_", "-"): value for name, value in options.items()}
    return CREATE, {"options": {"driver": driver, **named}}


def file(**options: Any) -> Step:
    return create("file", **{"filename": "new.img", "size": MIB, **options})


def qcow2(**options: Any) -> Step:
    return create("qcow2", **{"file": "f", "size": MIB, **options})


def add(driver: str, name: str, **options: Any) -> Step:
    return "blockdev-add", {"driver": driver, "node-name": name, **options}


NODES: Final = [
    file(filename="disk.img", size=0),
    add("file", "f", filename="disk.img"),
    file(filename="data.img", size=0),
]
DATA: Final = {"driver": "file", "filename": "data.img"}

SCENARIOS: Final[dict[str, Sequence[Step]]] = {
    "files": [
        file(),
        file(size=MIB + 1),
        file(size=-1),
        file(size=1 << 62),
        file(size=1 << 63),
        file(filename="missing/a.img"),
        file(filename="."),
        file(filename=""),
        file(filename="file:other.img"),
        file(preallocation="metadata"),
        file(preallocation="falloc"),
        file(preallocation="full"),
        file(preallocation="most"),
        file(nocow=True),
        file(extent_size_hint=65536),
        file(extent_size_hint=-1),
        file(extent_size_hint=1 << 40),
    ],
    "drivers that make nothing": [
        create("host_device"),
        create("host_device", filename="a"),
        create("raw"),
        create("raw", file="f"),
        create("null-co"),
        create("throttle"),
        create("no-such-driver"),
        (CREATE, {"options": {}}),
    ],
    "a file in use": [
        *NODES,
        file(filename="disk.img"),
        qcow2(),
        add("qcow2", "q", file="f"),
        qcow2(),
        file(filename="disk.img"),
        qcow2(file="q"),
        add("file", "read-only", filename="data.img", **{"read-only": True}),
        qcow2(file="read-only"),
    ],
    "nodes for an image": [
        *NODES,
        qcow2(file="missing"),
        qcow2(file=DATA),
        qcow2(file={"driver": "file", "filename": "missing.img"}),
        qcow2(data_file="missing"),
        qcow2(data_file=DATA),
        qcow2(data_file=DATA, version="v2"),
        qcow2(data_file=DATA, data_file_raw=True, backing_file="b.img"),
        qcow2(data_file_raw=True),
    ],
    "sizes of an image": [
        *NODES,
        *(qcow2(size=size) for size in (0, 512, MIB + 1, -512, 1 << 62, (1 << 63) - 512, 1 << 63)),
        *(qcow2(cluster_size=size) for size in (512, 2 * MIB, 3, -3, 4 * MIB, (1 << 32) + 65536)),
        *(qcow2(refcount_bits=bits) for bits in (1, 64, 0, 3, 128, -1)),
    ],
    "options of an image": [
        *NODES,
        qcow2(version="v4"),
        qcow2(version="v2"),
        qcow2(version="v2", refcount_bits=8),
        qcow2(version="v2", lazy_refcounts=True),
        qcow2(version="v2", extended_l2=True),
        qcow2(version="v2", compression_type="zstd"),
        qcow2(version="v2", compression_type="zlib"),
        qcow2(extended_l2=True, cluster_size=4096),
        qcow2(lazy_refcounts=True, extended_l2=True, compression_type="zstd"),
        qcow2(backing_fmt="raw"),
        qcow2(backing_fmt="no-such-format", backing_file="b.img"),
        qcow2(backing_fmt="raw", backing_file="b.img"),
        qcow2(backing_file="b.img"),
        qcow2(backing_file="x" * 1023),
        qcow2(backing_file="x" * 1024),
        qcow2(backing_file="x" * 1023, cluster_size=512),
        qcow2(backing_file="b.img", preallocation="metadata"),
        qcow2(backing_file="b.img", backing_fmt="raw", preallocation="full", extended_l2=True),
        *(qcow2(preallocation=mode) for mode in ("off", "metadata", "falloc", "full", "most")),
    ],
    "encrypted volumes": [
        ("object-add", {"qom-type": "secret", "id": "word", "data": "sesame"}),
        *NODES,
        create("luks", file="f", size=MIB),
        create("luks", file="f", size=MIB, key_secret="missing"),
        create("luks", file="missing", size=MIB, key_secret="word"),
        create("luks", file="f", key_secret="word"),
        create("luks", file="f", size=MIB, key_secret="word", cipher_alg="3des"),
        *(qcow2(encrypt={"format": method}) for method in ("luks", "qcow", "aes")),
        *(
            qcow2(encrypt={"format": method, "key-secret": "missing"})
            for method in ("luks", "qcow")
        ),
        qcow2(encrypt={"format": "luks", "key-secret": "word", "cipher-alg": "3des"}),
        qcow2(encrypt={"format": "qcow", "key-secret": "word"}),
        qcow2(encrypt={"format": "qcow", "key-secret": "word"}, version="v2"),
    ],
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_same_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for folder in ("ours", "theirs"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "ours")
    steps = SCENARIOS[name]
    answers = ours(steps)
    with Oracle(tmp_path / "theirs", capabilities=[]) as oracle:
        expected = theirs(steps, oracle)
    for step, answer, wanted in zip(steps, answers, expected, strict=True):
        assert (step, answer) == (step, wanted)
    made, theirs_made = (
        {path.name for path in (tmp_path / folder).glob("*.img")} for folder in ("ours", "theirs")
    )
    assert made <= theirs_made  # what fails leaves no new file here


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"version": "v2"},
        {"cluster-size": 4096, "refcount-bits": 1},
        {"extended-l2": True, "lazy-refcounts": True},
        {"compression-type": "zstd"},
        {"preallocation": "metadata"},
        {"preallocation": "falloc"},
        {"preallocation": "full"},
        {"backing-file": "b.img", "backing-fmt": "raw"},
    ],
    ids=str,
)
def test_the_image_is_as_qemu_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Options
) -> None:
    steps = [
        file(filename="disk.img", size=0),
        qcow2(file={"driver": "file", "filename": "disk.img"}, size=8 * MIB, **options),
    ]
    described = {}
    for side in ("ours", "theirs"):
        folder = tmp_path / side
        folder.mkdir()
        monkeypatch.chdir(folder)
        Path("b.img").write_bytes(bytes(MIB))
        if side == "ours":
            replies = ours(steps)
        else:
            with Oracle(folder, capabilities=[]) as oracle:
                replies = theirs(steps, oracle)
        assert "error" not in json.dumps(replies)
        run("qemu-img", "check", "disk.img")
        info = json.loads(run("qemu-img", "info", "--output=json", "disk.img"))
        info.pop("actual-size")
        described[side] = json.dumps(info).replace(str(folder), "")
        mapped = run("qemu-img", "map", "--output=json", "disk.img")
        described[side] += str([(each["start"], each["zero"]) for each in json.loads(mapped)])
    assert described["ours"] == described["theirs"]


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_a_new_volume_opens_with_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preallocation: str
) -> None:
    monkeypatch.chdir(tmp_path)
    volume = create(
        "luks",
        file={"driver": "file", "filename": "disk.img"},
        size=MIB,
        key_secret="word",
        iter_time=10,
        preallocation=preallocation,
    )
    steps = [
        ("object-add", {"qom-type": "secret", "id": "word", "data": "sesame"}),
        file(filename="disk.img", size=0),
        volume,
    ]
    assert "error" not in json.dumps(ours(steps))
    found = run(
        "qemu-img",
        "info",
        "--output=json",
        "--object",
        "secret,id=word,data=sesame",
        "--image-opts",
        "driver=luks,key-secret=word,file.filename=disk.img",
    )
    assert json.loads(found)["virtual-size"] == MIB
    if preallocation != "off":
        assert Path("disk.img").stat().st_blocks * 512 >= MIB
