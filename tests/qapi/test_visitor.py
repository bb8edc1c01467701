# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.errors import CommandError
from nbdjobs.qapi.jsonparse import DEFAULT_LIMITS, parse_json
from nbdjobs.qapi.keyval import parse_option
from nbdjobs.qapi.types import NULL
from nbdjobs.qapi.visitor import to_qapi, visit
from tests.qapi import toy_types as toy
from tests.qapi.cases import BLOCKDEV_JSON, BLOCKDEV_KEYVAL, SIZES


def blockdev(text: str) -> toy.Blockdev:
    value, keyval = parse_option(text, implied_key="driver")
    return visit(toy.Blockdev, value, keyval=keyval)


def refusal(type_: type[object], value: object, *, keyval: bool = False) -> str:
    with pytest.raises(CommandError) as refused:
        visit(type_, value, keyval=keyval)
    return refused.value.description


@pytest.mark.parametrize(("arguments", "sentence"), BLOCKDEV_JSON)
def test_bad_arguments_are_refused_in_known_words(arguments: object, sentence: str) -> None:
    assert refusal(toy.Blockdev, arguments) == sentence


@pytest.mark.parametrize(("text", "sentence"), BLOCKDEV_KEYVAL.items())
def test_bad_options_are_refused_in_known_words(text: str, sentence: str | None) -> None:
    if sentence is None:
        assert blockdev(text).node_name is not None
        return
    with pytest.raises(CommandError) as refused:
        blockdev(text)
    assert refused.value.description == sentence


def test_a_union_becomes_its_branch_with_the_base_members() -> None:
    node = blockdev("raw,node-name=r,offset=010,file.driver=null-co,file.latency-ns=-1")
    assert node == toy.Raw(
        driver="raw",
        node_name="r",
        offset=8,
        file=toy.NullCo(driver="null-co", latency_ns=(1 << 64) - 1),
    )


def test_arrays_become_what_was_declared() -> None:
    node = blockdev("blkdebug,image=x,inject-error.0.event=l2_load,inject-error.0.once=on")
    assert isinstance(node, toy.Blkdebug)
    assert node.inject_error == (toy.InjectError(event=toy.Event.L2_LOAD, once=True),)
    assert visit(toy.Odd, {"words": ["a", "b"]}).words == ["a", "b"]


def test_null_is_not_the_same_as_left_out() -> None:
    plain: dict[str, Any] = {"driver": "qcow2", "file": "f"}
    without = visit(toy.Blockdev, plain)
    explicit = visit(toy.Blockdev, {**plain, "backing": None})
    assert isinstance(without, toy.Qcow2)
    assert isinstance(explicit, toy.Qcow2)
    assert (without.backing, explicit.backing) == (None, NULL)
    assert "backing" not in to_qapi(without)
    assert to_qapi(explicit)["backing"] is None


def test_an_optional_member_does_not_take_null() -> None:
    value = {"driver": "null-co", "size": None}
    assert refusal(toy.Blockdev, value) == ("Invalid parameter type for 'size', expected: integer")


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes_take_units(text: str, size: int | None) -> None:
    value = {
        "type": "vhost-user-blk",
        "id": "e",
        "node-name": "n",
        "addr": {"type": "unix", "path": "p"},
        "logical-block-size": text,
    }
    if size is None:
        assert refusal(toy.Export, value, keyval=True) == (
            "Parameter 'logical-block-size' expects size"
        )
    else:
        assert visit(toy.Export, value, keyval=True).logical_block_size == size


def test_narrow_integers_have_their_range() -> None:
    assert visit(toy.Odd, {"small": -128, "middle": (1 << 31) - 1}).small == -128
    assert refusal(toy.Odd, {"small": 128}) == "Parameter 'small' expects int8_t"
    assert refusal(toy.Odd, {"middle": 1 << 31}) == "Parameter 'middle' expects int32_t"
    assert refusal(toy.Odd, {"small": 1 << 70}) == (
        "Invalid parameter type for 'small', expected: integer"
    )


def test_numbers_may_be_integers() -> None:
    assert visit(toy.Odd, {"ratio": 2}).ratio == 2.0
    assert visit(toy.Odd, {"ratio": "1.5e3"}, keyval=True).ratio == 1500.0
    for bad in ("", "1e999", "nan", "1x"):
        assert refusal(toy.Odd, {"ratio": bad}, keyval=True) == (
            "Invalid parameter type for 'ratio', expected: number"
        )
    assert refusal(toy.Odd, {"ratio": True}).endswith("expected: number")


def test_options_nested_as_deep_as_json_may_be_are_read() -> None:
    depth = DEFAULT_LIMITS.depth - 1
    text = '{"driver":"raw","file":' * depth + '"x"' + "}" * depth
    node = visit(toy.Blockdev, parse_json(text))
    assert to_qapi(node)["driver"] == "raw"


def test_names_of_their_own_are_used_both_ways() -> None:
    odd = visit(toy.Odd, {"bps_max": 5, "anything": {"x": [1]}})
    assert odd.bps_max == 5
    assert to_qapi(odd) == {
        "small": 0,
        "middle": 0,
        "ratio": 0.0,
        "anything": {"x": [1]},
        "bps_max": 5,
    }
    assert refusal(toy.Odd, {"bps-max": 5}) == "Parameter 'bps-max' is unexpected"


@pytest.mark.parametrize(
    "text",
    [
        "null-co,size=5,read-zeroes=on,cache.direct=on,discard=unmap",
        "raw,file.driver=file,file.filename=/x",
        "quorum,vote-threshold=2,children.0=a,children.1.driver=null-co",
        "nbd,server.type=inet,server.host=h,server.port=p",
        "blkdebug,image=x,take-child-perms.0=write",
    ],
)
def test_typed_values_go_back_to_json(text: str) -> None:
    node = blockdev(text)
    assert visit(toy.Blockdev, to_qapi(node)) == node


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["driver", "file", "children", "cache", "server", "type"]), inner
        )
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["size", "file", "server", "children"]), json_values))
def test_any_json_is_taken_or_refused(value: dict[str, Any]) -> None:
    for driver in toy.BLOCKDEVS:
        for keyval in (False, True):
            try:
                node = visit(toy.Blockdev, {"driver": driver, **value}, keyval=keyval)
            except CommandError:
                continue
            assert isinstance(node, toy.BLOCKDEVS[driver])
