# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Objects as a tree of paths and properties."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from nbdjobs.daemon.object_options import ObjectOptions
from nbdjobs.daemon.objects import Objects
from nbdjobs.daemon.qom import Qom
from nbdjobs.errors import CommandError, ErrorClass
from nbdjobs.nodes.graph import Graph
from nbdjobs.qapi.visitor import visit


def tree(*objects: dict[str, object]) -> Qom:
    collection = Objects(Graph())
    for properties in objects:
        collection.add(visit(ObjectOptions, properties))
    return Qom(collection)


def three() -> Qom:
    return tree(
        {"qom-type": "throttle-group", "id": "tg", "x-iops-total": 10},
        {"qom-type": "iothread", "id": "io", "poll-max-ns": 5},
        {"qom-type": "secret", "id": "s", "data": "hello"},
    )


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(CommandError) as caught:
        act()
    return caught.value.description


def test_containers_have_their_children_as_properties() -> None:
    assert three().properties("/") == {"type": "string", "objects": "child<container>"}
    assert three().properties("/objects") == {
        "type": "string",
        "tg": "child<throttle-group>",
        "io": "child<iothread>",
        "s": "child<secret>",
    }


@pytest.mark.parametrize("path", ["/objects/io", "io", "objects/io", "//objects//io/"])
def test_an_object_has_several_paths(path: str) -> None:
    assert three().get(path, "type") == "iothread"


def test_a_path_that_means_several_things_is_refused() -> None:
    qom = tree({"qom-type": "iothread", "id": "objects"})
    assert refusal(lambda: qom.properties("objects")) == "Path 'objects' is ambiguous"
    assert refusal(lambda: qom.properties("")) == "Path '' is ambiguous"
    assert qom.get("/objects/objects", "type") == "iothread"


@pytest.mark.parametrize("path", ["/nothing", "nothing", "/objects/nothing", "/objects/io/x"])
def test_nothing_is_at_other_paths(path: str) -> None:
    with pytest.raises(CommandError) as caught:
        three().properties(path)
    assert caught.value.description == f"Device '{path}' not found"
    assert caught.value.error_class is ErrorClass.DEVICE_NOT_FOUND


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ("/", "objects", "/objects"),
        ("/objects", "tg", "/objects/tg"),
        ("/", "type", "container"),
        ("tg", "type", "throttle-group"),
        ("tg", "x-iops-total", 10),
        ("tg", "x-iops-total-max-length", 1),
        ("io", "poll-max-ns", 5),
        ("io", "thread-pool-max", 64),
        ("s", "data", "hello"),
        ("s", "file", ""),
        ("s", "format", "raw"),
        ("s", "loaded", True),
    ],
)
def test_values(path: str, name: str, value: object) -> None:
    assert three().get(path, name) == value


def test_limits_are_shown_whole() -> None:
    limits = three().get("tg", "limits")
    assert isinstance(limits, dict)
    assert len(limits) == 19
    assert {name for name, value in limits.items() if value > 1} == {"iops-total"}


def test_types_are_named_as_in_qemu() -> None:
    qom = three()
    assert qom.properties("tg")["limits"] == "ThrottleLimits"
    assert qom.properties("tg")["x-bps-read"] == "int"
    assert qom.properties("s")["format"] == "QCryptoSecretFormat"
    assert (qom.properties("s")["loaded"], qom.properties("s")["data"]) == ("bool", "string")


def test_what_may_change_changes() -> None:
    async def go() -> None:
        qom = three()
        qom.set("io", "poll-max-ns", 7)
        qom.set("s", "data", "other")
        qom.set("tg", "limits", {"bps-total": 8})
        assert qom.get("io", "poll-max-ns") == 7
        assert qom.get("s", "data") == "other"
        assert (qom.get("tg", "x-bps-total"), qom.get("tg", "x-iops-total")) == (8, 10)

    asyncio.run(go())


@pytest.mark.parametrize(
    ("path", "name", "value", "text"),
    [
        ("tg", "nothing", 1, "Property 'throttle-group.nothing' not found"),
        ("tg", "id", "x", "Property 'throttle-group.id' not found"),
        ("/objects", "nothing", 1, "Property 'container.nothing' not found"),
        ("tg", "type", "x", "Property 'throttle-group.type' is not writable"),
        ("s", "loaded", True, "Property 'secret.loaded' is not writable"),
        ("/", "objects", "x", "Property 'container.objects' is not writable"),
        ("tg", "x-iops-total", 1, "Property cannot be set after initialization"),
        ("tg", "limits", 1, "Invalid parameter type for 'limits', expected: object"),
        ("tg", "limits", {"x": 1}, "Parameter 'limits.x' is unexpected"),
        ("io", "poll-grow", "x", "Invalid parameter type for 'poll-grow', expected: integer"),
        ("io", "poll-grow", -1, "poll-grow value must be in range [0, 9223372036854775807]"),
        ("io", "thread-pool-min", 65, "bad thread-pool-min/thread-pool-max values"),
    ],
)
def test_what_may_not_change_stays(path: str, name: str, value: object, text: str) -> None:
    qom = three()
    assert refusal(lambda: qom.set(path, name, value)) == text
    assert qom.get("tg", "limits") == three().get("tg", "limits")
    assert qom.get("io", "poll-grow") == 0
    assert qom.get("io", "thread-pool-min") == 0
