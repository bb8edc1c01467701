# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""x-blockdev-amend changes passwords as QEMU does, and refuses in its words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from nbdjobs.nodes.qcow2.constants import Encryption
from nbdjobs.nodes.qcow2.create import CreateOptions, empty_image
from tests.interop.image_jobs import AMEND, Step, ours, theirs
from tests.interop.oracle import Oracle
from tests.interop.tools import run
from tests.nodes.encrypted import new_volume, volume_of_zeroes

pytestmark = pytest.mark.interop

PASSWORDS: Final = {"right": "open sesame", "new": "open wheat", "wrong": "open barley"}
SECRETS: Final = [
    ("object-add", {"qom-type": "secret", "id": name, "data": word})
    for name, word in PASSWORDS.items()
]
FILE: Final[Step] = (
    "blockdev-add",
    {"driver": "file", "node-name": "f", "filename": "disk.img"},
)
LUKS: Final[Step] = (
    "blockdev-add",
    {"driver": "luks", "node-name": "n", "file": "f", "key-secret": "right"},
)
QCOW2: Final[Step] = ("blockdev-add", {"driver": "qcow2", "node-name": "n", "file": "f"})
LOOK: Final[Step] = ("query-named-block-nodes", {})


def encrypted(name: str) -> Step:
    return QCOW2[0], {**QCOW2[1], "encrypt": {"format": name, "key-secret": "right"}}


def amend(driver: str, *, node: str = "n", force: bool | None = None, **options: Any) -> Step:
    named = {name.replace("_", "-"): value for name, value in options.items()}
    given = {"node-name": node, "options": {"driver": driver, **named}}
    return AMEND, given if force is None else {**given, "force": force}


def luks(state: str, **options: Any) -> Step:
    return amend("luks", state=state, **options)


def qcow2(state: str, *, force: bool | None = None, **options: Any) -> Step:
    named = {name.replace("_", "-"): value for name, value in options.items()}
    return amend("qcow2", force=force, encrypt={"format": "luks", "state": state, **named})


#: What is in the file, and what is asked.
SCENARIOS: Final[dict[str, tuple[str, Sequence[Step]]]] = {
    "a volume": (
        "luks",
        [
            LUKS,
            luks("active"),
            luks("active", new_secret="new", old_secret="right"),
            luks("active", new_secret="missing"),
            luks("active", new_secret="new", keyslot=8),
            luks("active", new_secret="new", keyslot=-1),
            luks("active", new_secret="new", keyslot=0),
            luks("active", new_secret="new", secret="missing"),
            luks("active", new_secret="new", secret="wrong"),
            luks("active", new_secret="new", iter_time=0, keyslot=5),
            luks("inactive"),
            luks("inactive", new_secret="new"),
            luks("inactive", iter_time=5, keyslot=5),
            luks("inactive", keyslot=9),
            luks("inactive", keyslot=7),
            luks("inactive", old_secret="wrong"),
            luks("inactive", old_secret="new", keyslot=0),
            luks("inactive", old_secret="new", keyslot=7),
            luks("inactive", old_secret="right"),
            luks("inactive", old_secret="new"),
            luks("inactive", keyslot=5),
            luks("sideways"),
            luks("inactive", old_secret="new", force=True),
        ],
    ),
    "an encrypted image": (
        "qcow2 luks",
        [
            encrypted("luks"),
            amend("qcow2"),
            amend("qcow2", encrypt={"format": "qcow"}),
            amend("qcow2", encrypt={"format": "aes"}),
            qcow2("active"),
            qcow2("active", new_secret="new", secret="wrong"),
            qcow2("active", new_secret="new", iter_time=0),
            qcow2("inactive", old_secret="right"),
            qcow2("inactive", old_secret="new"),
        ],
    ),
    "an image that is not encrypted": (
        "qcow2",
        [QCOW2, amend("qcow2"), qcow2("active", new_secret="new")],
    ),
    "an image with the older encryption": (
        "qcow2 aes",
        [encrypted("aes"), amend("qcow2"), qcow2("active", new_secret="new")],
    ),
    "other nodes": (
        "luks",
        [
            LUKS,
            amend("file", node="f"),
            amend("qcow2", node="f"),
            amend("luks", node="missing", state="active"),
            amend("raw"),
            amend("no-such-driver"),
            (AMEND, {"node-name": "n", "options": {}}),
        ],
    ),
    "a file in use": (
        "luks",
        [
            LUKS,
            (
                "blockdev-add",
                {"driver": "luks", "node-name": "m", "file": "f", "key-secret": "right"},
            ),
            luks("inactive", keyslot=7),
            ("blockdev-del", {"node-name": "m"}),
            luks("inactive", keyslot=7),
        ],
    ),
}


def image(kind: str) -> bytes:
    if kind == "luks":
        return volume_of_zeroes(65536, PASSWORDS["right"].encode())
    options = {
        "qcow2": CreateOptions(size=65536),
        "qcow2 aes": CreateOptions(size=65536, encryption=Encryption.AES),
        "qcow2 luks": CreateOptions(
            size=65536,
            encryption=Encryption.LUKS,
            keys=new_volume(PASSWORDS["right"].encode())[0],
        ),
    }
    return empty_image(options[kind])


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_same_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind, asked = SCENARIOS[name]
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "disk.img").write_bytes(image(kind))
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    steps = [*SECRETS, FILE, *asked]
    monkeypatch.chdir(tmp_path / "ours")
    answers = ours(steps)
    with Oracle(tmp_path / "theirs", capabilities=[]) as oracle:
        expected = theirs(steps, oracle)
    for step, answer, wanted in zip(steps, answers, expected, strict=True):
        assert (step, answer) == (step, wanted)


def test_qemu_opens_it_with_the_new_password_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("disk.img").write_bytes(image("luks"))
    steps = [
        *SECRETS,
        FILE,
        LUKS,
        luks("active", new_secret="new", iter_time=0),
        luks("inactive", old_secret="right"),
        LOOK,
    ]
    replies = ours(steps)
    assert "error" not in json.dumps(replies)
    slots = replies[-1]["return"][0]["image"]["format-specific"]["data"]["slots"]
    assert [slot["active"] for slot in slots] == [False, True, *[False] * 6]
    options = "driver=luks,key-secret=s,file.filename=disk.img"
    for password, works in ((PASSWORDS["new"], True), (PASSWORDS["right"], False)):
        secret = ("--object", f"secret,id=s,data={password}")
        found = run(
            "qemu-io", *secret, "-c", "read -P 0 0 64k", "--image-opts", options, is_checked=False
        )
        assert ("read 65536/65536" in found) == works
