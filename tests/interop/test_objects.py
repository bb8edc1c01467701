# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Objects and throttle nodes: every command gets the answer that the real program gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from nbdjobs.daemon import throttle_limits
from nbdjobs.daemon.object_options import ObjectOptions
from nbdjobs.daemon.objects import Objects
from nbdjobs.daemon.qom_types import TYPES
from nbdjobs.nodes.graph import Graph
from nbdjobs.qapi.keyval import parse_option
from nbdjobs.qapi.visitor import visit
from tests.interop.oracle import Oracle, Reply
from tests.interop.same_answers import Ask, ours, theirs

#: Properties that only the real program has: character devices.
THEIRS: Final = frozenset({"chardevs"})

BIG: Final = 10**15


def group(name: str = "tg", /, **properties: object) -> Ask:
    named = {key.replace("_", "-"): value for key, value in properties.items()}
    return "object-add", {"qom-type": "throttle-group", "id": name, **named}


def limited(**limits: object) -> Ask:
    return group(limits={key.replace("_", "-"): value for key, value in limits.items()})


def qom_set(path: str, name: str, value: object) -> Ask:
    return "qom-set", {"path": path, "property": name, "value": value}


def qom_get(path: str, name: str) -> Ask:
    return "qom-get", {"path": path, "property": name}


def qom_list(path: str) -> Ask:
    return "qom-list", {"path": path}


def delete(name: str) -> Ask:
    return "object-del", {"id": name}


def throttle(name: str, group: str, **options: object) -> Ask:
    return "blockdev-add", {
        "driver": "throttle",
        "node-name": name,
        "throttle-group": group,
        **options,
    }


LIMITS: Final[list[Ask]] = [
    limited(),
    limited(iops_total=10),
    limited(iops_total=10, iops_read=5),
    limited(bps_total=10, bps_write=5),
    limited(bps_total=10, iops_write=5),
    limited(bps_total_max=10, bps_read_max=5),
    limited(iops_total=BIG),
    limited(iops_total=BIG + 1),
    limited(iops_total=-1),
    limited(iops_total=1, iops_total_max=-1),
    limited(iops_total_max=10),
    limited(iops_total=20, iops_total_max=10),
    limited(iops_total=20, iops_total_max=20),
    limited(iops_total=20, iops_total_max_length=0),
    limited(iops_total=20, iops_total_max_length=2),
    limited(iops_total_max_length=2),
    limited(iops_total=20, iops_total_max=30, iops_total_max_length=2),
    limited(iops_total=20, iops_total_max=30, iops_total_max_length=-1),
    limited(iops_total=20, iops_total_max=30, iops_total_max_length=1 << 32),
    limited(iops_total=20, iops_total_max=30, iops_total_max_length=(1 << 32) - 1),
    limited(iops_total=20, iops_total_max=3 * 10**9, iops_total_max_length=2 * 10**6),
    limited(iops_size=512),
    limited(bps_total=5, iops_size=512),
    limited(iops_read=5, iops_size=512),
    limited(iops_read=5, iops_size=-1),
    limited(iops_read=5, iops_write_max=10),
    limited(iops_total="5"),
    limited(nothing=5),
    group(limits=[]),
    group(x_iops_total=10),
    group(x_iops_total=10, x_iops_read=5),
    group(x_iops_total=-1),
    group(x_iops_size=-1),
    group(x_iops_total_max_length=0),
    group(x_iops_total_max_length=-1),
    group(x_iops_total_max_length=1 << 32),
    group(x_iops_total=BIG + 1),
    group(x_iops_total=1, limits={"bps-total": 1}),
    group(x_nothing=1),
]

SESSION: Final[list[Ask]] = [
    group(x_iops_total=10, limits={"bps-total": 5, "bps-total-max": 20}),
    group(),
    group("3x"),
    ("object-add", {"qom-type": "throttle-group"}),
    ("object-add", {"id": "x"}),
    ("object-add", {"qom-type": "nothing", "id": "x"}),
    ("object-add", {"qom-type": "iothread", "id": "io"}),
    ("object-add", {"qom-type": "iothread", "id": "io2", "poll-max-ns": -1}),
    ("object-add", {"qom-type": "iothread", "id": "io2", "thread-pool-max": 0}),
    ("object-add", {"qom-type": "iothread", "id": "io2", "thread-pool-min": 65}),
    ("object-add", {"qom-type": "secret", "id": "s", "data": "hello"}),
    ("object-add", {"qom-type": "secret", "id": "s2"}),
    *map(qom_list, ("/", "/objects", "/objects/", "//objects//tg", "tg", "objects/io", "s")),
    *map(qom_list, ("", "/nothing", "nothing", "/objects/nothing", "objects")),
    *(qom_get("tg", name) for name in ("type", "limits", "x-iops-total", "x-iops-size", "no")),
    *(qom_get("io", name) for name in ("type", "poll-max-ns", "poll-grow", "thread-pool-max")),
    *(qom_get("s", name) for name in ("loaded", "format", "data", "file")),
    qom_get("/", "objects"),
    qom_get("/objects", "tg"),
    qom_get("/", "type"),
    qom_get("/nothing", "type"),
    qom_set("tg", "limits", {"iops-total": 100}),
    qom_get("tg", "limits"),
    qom_set("tg", "limits", {"iops-read": 100}),
    qom_set("tg", "limits", {"iops-total": 0, "iops-read": 100}),
    qom_get("tg", "limits"),
    qom_set("tg", "limits", {"nothing": 1}),
    qom_set("tg", "limits", 5),
    qom_set("tg", "limits", None),
    qom_set("tg", "limits", {"iops-total": "x"}),
    qom_set("tg", "limits", {"iops-total-max-length": -1}),
    qom_set("tg", "x-iops-total", 5),
    qom_set("tg", "x-iops-total", "5"),
    qom_set("tg", "type", "x"),
    qom_set("tg", "nothing", 1),
    qom_set("io", "poll-max-ns", 5),
    qom_set("io", "poll-max-ns", -5),
    qom_set("io", "poll-max-ns", "5"),
    qom_get("io", "poll-max-ns"),
    qom_set("s", "data", "x"),
    qom_set("s", "loaded", True),
    qom_set("/", "objects", "x"),
    qom_set("/nothing", "x", 1),
    ("blockdev-add", {"driver": "null-co", "node-name": "n"}),
    throttle("t", "tg", file="n"),
    throttle("t2", "nothing", file="n"),
    throttle("t2", "io", file="n"),
    throttle("t2", "tg", file="nothing"),
    throttle("t2", "tg"),
    ("blockdev-add", {"driver": "throttle", "node-name": "t2", "file": "n"}),
    delete("tg"),
    ("blockdev-del", {"node-name": "n"}),
    ("blockdev-del", {"node-name": "t"}),
    *map(delete, ("tg", "tg", "io", "s", "", "/objects/io")),
    qom_list("/objects"),
]


def secret(name: str, data: str, **properties: object) -> Ask:
    return "object-add", {"qom-type": "secret", "id": name, "data": data, **properties}


IV: Final = "AAAAAAAAAAAAAAAAAAAAAA=="
KEY: Final = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


def encrypted(name: str, data: str, **properties: object) -> Ask:
    return secret(name, data, **{"keyid": "key", "iv": IV, "format": "base64", **properties})


SECRETS: Final[list[Ask]] = [
    secret("key", KEY, format="base64"),
    secret("short", "key"),
    ("object-add", {"qom-type": "iothread", "id": "io"}),
    secret("a", "x", iv="not looked at"),
    encrypted("b", "kWhEh8NMNFbrTpAc74hKHg=="),
    encrypted("c", ""),
    encrypted("d", "RtzUVlVCi5rPamaENmpwJQ=="),
    encrypted("d", "AAAA"),
    encrypted("d", "x", format="raw"),
    encrypted("d", "?"),
    encrypted("d", "", iv="?"),
    encrypted("d", "", iv="AAAA"),
    encrypted("d", "", iv=""),
    encrypted("d", "", keyid="nothing"),
    encrypted("d", "", keyid="io"),
    encrypted("d", "", keyid="short"),
    secret("d", "x", keyid="key"),
    secret("d", "x", keyid="short"),
    secret("e", "x", file="y"),
    secret("f", "a=b\nc", format="base64"),
    secret("g", "AAAA ", format="base64"),
    ("object-add", {"qom-type": "secret", "id": "h", "file": "/"}),
    ("object-add", {"qom-type": "secret", "id": "h", "file": "/nothing"}),
    qom_list("/objects"),
    qom_list("b"),
    *(qom_get("b", name) for name in ("keyid", "iv", "format", "loaded", "data")),
    *(qom_get("key", name) for name in ("keyid", "iv")),
    *map(delete, ("key", "b", "b")),
]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    with Oracle(tmp_path_factory.mktemp("oracle"), capabilities=[]) as running:
        yield running


def by_name(row: dict[str, Any]) -> str:
    return str(row["name"])


def comparable(reply: Reply) -> Reply:
    """Properties in one order, without those that only the real program has."""
    found = reply.get("return")
    if not isinstance(found, list):
        return reply
    rows = [row for row in found if row["name"] not in THEIRS]
    return {"return": sorted(rows, key=by_name)}


def assert_same(oracle: Oracle, session: list[Ask], folder: Path) -> None:
    expected = theirs(session, folder, oracle)
    for ask, mine, other in zip(session, ours(session, folder), expected, strict=True):
        assert comparable(mine) == comparable(other), ask


@pytest.mark.parametrize("asked", LIMITS, ids=lambda asked: str(asked[1]))
def test_limits(oracle: Oracle, asked: Ask, tmp_path: Path) -> None:
    assert_same(oracle, [asked, qom_get("/objects/tg", "limits"), delete("tg")], tmp_path)


def test_a_session(oracle: Oracle, tmp_path: Path) -> None:
    assert_same(oracle, SESSION, tmp_path)


def test_secrets(oracle: Oracle, tmp_path: Path) -> None:
    assert_same(oracle, SECRETS, tmp_path)


def test_a_command_line_option(tmp_path: Path) -> None:
    """Both take the same text."""
    option = "throttle-group,id=tg,x-iops-total=10,limits.bps-total=5"
    with Oracle(tmp_path, "--object", option, capabilities=[]) as oracle:
        expected = oracle.execute(*qom_get("tg", "limits"))["return"]
    value, is_keyval = parse_option(option, implied_key="qom-type")
    objects = Objects(Graph())
    objects.add(visit(ObjectOptions, value, keyval=is_keyval))
    assert throttle_limits.describe(objects.limits("tg")) == expected


@pytest.mark.parametrize(
    "implements",
    [None, "object", "secret_common", "event-loop-base", "user-creatable", "interface", "zz"],
)
@pytest.mark.parametrize("abstract", [None, False, True])
def test_types(implements: str | None, abstract: bool | None, oracle: Oracle) -> None:
    given = {"implements": implements, "abstract": abstract}
    ask: Ask = ("qom-list-types", {key: value for key, value in given.items() if value is not None})
    (expected,) = theirs([ask], Path("/nowhere"), oracle)
    (found,) = ours([ask], Path("/nowhere"))
    known = [each for each in expected["return"] if each["name"] in TYPES]
    assert sorted(found["return"], key=by_name) == sorted(known, key=by_name)


@pytest.mark.parametrize("name", [*TYPES, "zz", ""])
def test_properties_of_types(name: str, oracle: Oracle) -> None:
    ask: Ask = ("qom-list-properties", {"typename": name})
    (expected,) = theirs([ask], Path("/nowhere"), oracle)
    (found,) = ours([ask], Path("/nowhere"))
    assert comparable(found) == comparable(expected)
