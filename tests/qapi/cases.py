# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Inputs and what is said of them; None where they are taken.

The unit tests read them with our own code, the interop tests ask qemu-storage-daemon.
"""

from __future__ import annotations

from typing import Any

LONG = "a" * 127
TOO_LONG = "a" * 128

#: Texts of an option with the implied key `driver`, malformed in themselves.
KEYVAL_REFUSED: dict[str, str] = {
    ",": "Invalid parameter ''",
    "=x": "Invalid parameter ''",
    "null-co,,": "Invalid parameter ''",
    "null-co,,,": "Invalid parameter ''",
    "null-co,=x": "Invalid parameter ''",
    "null-co,.x=1": "Invalid parameter '.x'",
    "null-co,x.=1": "Invalid parameter 'x.'",
    "null-co,x..y=1": "Invalid parameter 'x..y'",
    "null-co,5=1": "Invalid parameter '5'",
    "null-co,_a=1": "Invalid parameter '_a'",
    "null-co,-a=1": "Invalid parameter '-a'",
    "null-co,a b=1": "Invalid parameter 'a b'",
    "null-co,a$=1": "Invalid parameter 'a$'",
    "null-co,a.0a=1": "Invalid parameter 'a.0a'",
    "null-co,a.-1=1": "Invalid parameter 'a.-1'",
    "null-co,read-zeroes": "Expected '=' after parameter 'read-zeroes'",
    "null-co,size=1,nosize": "Expected '=' after parameter 'nosize'",
    "driver=null-co,raw": "Expected '=' after parameter 'raw'",
    "null-co,help,foo": "Expected '=' after parameter 'foo'",
    "null-co,foo,help": "Expected '=' after parameter 'foo'",
    "help": "Help is not available for this option",
    "?": "Help is not available for this option",
    "null-co,help": "Help is not available for this option",
    "help,a=b": "Help is not available for this option",
    "null-co,cache.direct=on,cache=x": "Parameters 'cache.*' used inconsistently",
    "null-co,cache=x,cache.direct=on": "Parameters 'cache.*' used inconsistently",
    "null-co,a.b.c=1,a.b=2": "Parameters 'a.b.*' used inconsistently",
    "null-co,a.b=2,a.b.c=1": "Parameters 'a.b.*' used inconsistently",
    "null-co,a.0=1,a.b=2": "Parameters 'a.*' used inconsistently",
    "null-co,a.0=1,a.2=2": "Parameter 'a.1' missing",
    "null-co,a.1=1": "Parameter 'a.0' missing",
    "null-co,a.99999999999=1": "Parameter 'a.0' missing",
    f"null-co,{TOO_LONG}=1": f"Parameter '{TOO_LONG}' is too long",
    "{": "JSON parse error, premature EOI",
    '{"a': "JSON parse error, stray '\"a'",
    '{"a":-': "JSON parse error, stray '-'",
    '{"a":[1': "JSON parse error, premature EOI",
    "{a}": "JSON parse error, invalid keyword 'a'",
    "{]@": "JSON parse error, expecting value",
    '{"driver":"null-co",}': "JSON parse error, expecting value",
    '{"driver":"null-co"} x': "Expecting at most one JSON value",
    '{"driver":"null-co"},': "Expecting at most one JSON value",
    '{"driver":"a","driver":"b"}': "JSON parse error, duplicate key",
}

#: Well-formed texts of a blockdev that does not satisfy its type, or does.
BLOCKDEV_KEYVAL: dict[str, str | None] = {
    "": "Parameter 'driver' is missing",
    "x": "Parameter 'driver' does not accept value 'x'",
    "driver": "Parameter 'driver' does not accept value 'driver'",
    "help=x": "Parameter 'driver' is missing",
    "[]": "Parameter 'driver' does not accept value '[]'",
    " {}": "Parameter 'driver' does not accept value ' {}'",
    "{}": "Parameter 'driver' is missing",
    "null-co,node-name=n": None,
    "null-co,node-name=n,": None,
    "null-co,node-name=help": None,
    "null-co,node-name=n,latency-ns=0x10,size=010": None,
    "null-co,node-name=n,size=1,size=2": None,
    "null-co,node-name=n,read-zeroes=yes": None,
    "null-co,node-name=n,read-zeroes=y": None,
    "null-co,node-name=n,read-zeroes=true": None,
    "null-co,node-name=n,read-zeroes=x": "Parameter 'read-zeroes' expects 'on' or 'off'",
    "null-co,node-name=n,read-zeroes=ON": "Parameter 'read-zeroes' expects 'on' or 'off'",
    "null-co,node-name=n,size=x": "Parameter 'size' expects integer",
    "null-co,node-name=n,size=": "Parameter 'size' expects integer",
    "null-co,node-name=n,size=1k": "Parameter 'size' expects integer",
    "null-co,node-name=n,size=08": "Parameter 'size' expects integer",
    "null-co,node-name=n,size=1,,5": "Parameter 'size' expects integer",
    "null-co,node-name=n,size=9223372036854775808": "Parameter 'size' expects integer",
    "null-co,node-name=n,latency-ns=18446744073709551616": (
        "Parameter 'latency-ns' expects integer"
    ),
    "null-co,node-name=n,cache=x": "Invalid parameter type for 'cache', expected: object",
    "null-co,node-name=n,cache.direct=x": "Parameter 'cache.direct' expects 'on' or 'off'",
    "null-co,node-name=n,cache.foo=on": "Parameter 'cache.foo' is unexpected",
    "null-co,node-name=n,a.0.b=1": "Parameter 'a' is unexpected",
    f"null-co,node-name=n,{LONG}=1": f"Parameter '{LONG}' is unexpected",
    "null-co,__a.b_c=1": "Parameter '__a.b_c' is unexpected",
    "raw": "Parameter 'file' is missing",
    "raw,file.driver=zz": "Parameter 'driver' does not accept value 'zz'",
    "raw,file.driver=file": "Parameter 'file.filename' is missing",
    "raw,file.driver=null-co,file.size=x": "Parameter 'file.size' expects integer",
    "raw,file.driver=null-co,file.foo=x": "Parameter 'file.foo' is unexpected",
    "raw,file.driver=null-co,file.cache.direct=5": (
        "Parameter 'file.cache.direct' expects 'on' or 'off'"
    ),
    "quorum,vote-threshold=1": "Parameter 'children' is missing",
    "quorum,vote-threshold=1,children=b": (
        "Invalid parameter type for 'children', expected: array"
    ),
    "quorum,vote-threshold=1,children.x=b": (
        "Invalid parameter type for 'children', expected: array"
    ),
    "quorum,vote-threshold=1,children.0.driver=null-co,children.0.size=x": (
        "Parameter 'children.0.size' expects integer"
    ),
    "quorum,vote-threshold=1,children.0.driver=null-co,children.0.zz=x": (
        "Parameter 'children.0.zz' is unexpected"
    ),
    "blkdebug,image=x,inject-error.0.event=zz": "Parameter 'event' does not accept value 'zz'",
    "blkdebug,image=x,take-child-perms.0=zz": "Parameter 'null' does not accept value 'zz'",
    "nbd,server.type=inet,server.host=h": "Parameter 'server.port' is missing",
    "nbd,server.type=zz": "Parameter 'type' does not accept value 'zz'",
    "nbd,server=zz": "Invalid parameter type for 'server', expected: object",
    "nbd,server.type=unix,server.path=x,reconnect-delay=-1": (
        "Parameter 'reconnect-delay' expects uint32_t"
    ),
    "nbd,server.type=unix,server.path=x,reconnect-delay=z": (
        "Parameter 'reconnect-delay' expects integer"
    ),
}

_NBD: dict[str, Any] = {"driver": "nbd", "server": {"type": "unix", "path": "x"}}
_BLKDEBUG: dict[str, Any] = {"driver": "blkdebug", "image": "x"}
_QUORUM: dict[str, Any] = {"driver": "quorum", "vote-threshold": 1}

#: Arguments of blockdev-add that are refused.
BLOCKDEV_JSON: list[tuple[dict[str, Any], str]] = [
    ({}, "Parameter 'driver' is missing"),
    ({"bar": 2}, "Parameter 'driver' is missing"),
    ({"driver": "x"}, "Parameter 'driver' does not accept value 'x'"),
    ({"driver": 5}, "Invalid parameter type for 'driver', expected: string"),
    ({"driver": None}, "Invalid parameter type for 'driver', expected: string"),
    ({"driver": "null-co", "foo": 1}, "Parameter 'foo' is unexpected"),
    (
        {"driver": "null-co", "node-name": 5, "foo": 1},
        "Invalid parameter type for 'node-name', expected: string",
    ),
    (
        {"driver": "null-co", "size": "1"},
        "Invalid parameter type for 'size', expected: integer",
    ),
    (
        {"driver": "null-co", "size": 1.0},
        "Invalid parameter type for 'size', expected: integer",
    ),
    (
        {"driver": "null-co", "size": True},
        "Invalid parameter type for 'size', expected: integer",
    ),
    (
        {"driver": "null-co", "size": 1 << 63},
        "Invalid parameter type for 'size', expected: integer",
    ),
    ({"driver": "null-co", "latency-ns": -1, "foo": 1}, "Parameter 'foo' is unexpected"),
    ({"driver": "null-co", "latency-ns": 1 << 64}, "Parameter 'latency-ns' expects uint64"),
    ({"driver": "null-co", "latency-ns": "x"}, "Parameter 'latency-ns' expects uint64"),
    ({"driver": "null-co", "cache": 5}, "Invalid parameter type for 'cache', expected: object"),
    (
        {"driver": "null-co", "cache": {"direct": "on"}},
        "Invalid parameter type for 'cache.direct', expected: boolean",
    ),
    (
        {"driver": "null-co", "cache": {"foo": True}, "size": "x"},
        "Parameter 'cache.foo' is unexpected",
    ),
    (
        {"driver": "null-co", "detect-zeroes": "x", "discard": "y"},
        "Parameter 'discard' does not accept value 'y'",
    ),
    (
        {"driver": "null-co", "discard": 1},
        "Invalid parameter type for 'discard', expected: string",
    ),
    ({"driver": "raw"}, "Parameter 'file' is missing"),
    (
        {"driver": "raw", "file": None},
        "Invalid parameter type for 'file', expected: BlockdevRef",
    ),
    ({"driver": "raw", "file": []}, "Invalid parameter type for 'file', expected: BlockdevRef"),
    ({"driver": "raw", "file": {}}, "Parameter 'file.driver' is missing"),
    ({"driver": "raw", "file": {"driver": "file"}}, "Parameter 'file.filename' is missing"),
    (
        {"driver": "raw", "file": {"driver": "null-co", "foo": {"a": 1}}},
        "Parameter 'file.foo' is unexpected",
    ),
    (
        {"driver": "raw", "file": {"driver": "raw", "file": {"driver": "raw", "file": 1}}},
        "Invalid parameter type for 'file', expected: BlockdevRef",
    ),
    (
        {"driver": "raw", "file": {"driver": "null-co", "cache": {"direct": 1}}},
        "Invalid parameter type for 'file.cache.direct', expected: boolean",
    ),
    (
        {"driver": "qcow2", "file": "x", "backing": 5},
        "Invalid parameter type for 'backing', expected: BlockdevRefOrNull",
    ),
    ({"driver": "nbd", "server": {}}, "Parameter 'server.type' is missing"),
    (
        {"driver": "nbd", "server": {"type": "x"}},
        "Parameter 'type' does not accept value 'x'",
    ),
    (
        {"driver": "nbd", "server": {"type": "unix", "path": "x", "host": 1}},
        "Parameter 'server.host' is unexpected",
    ),
    ({**_NBD, "reconnect-delay": -1}, "Parameter 'reconnect-delay' expects uint32_t"),
    ({**_NBD, "reconnect-delay": 1 << 32}, "Parameter 'reconnect-delay' expects uint32_t"),
    ({**_NBD, "reconnect-delay": 1.5}, "Parameter 'reconnect-delay' expects uint64"),
    (
        {**_BLKDEBUG, "inject-error": 5},
        "Invalid parameter type for 'inject-error', expected: array",
    ),
    (
        {**_BLKDEBUG, "inject-error": [5]},
        "Invalid parameter type for 'inject-error[0]', expected: object",
    ),
    ({**_BLKDEBUG, "inject-error": [{}]}, "Parameter 'inject-error[0].event' is missing"),
    (
        {**_BLKDEBUG, "inject-error": [{"event": "x"}]},
        "Parameter 'event' does not accept value 'x'",
    ),
    (
        {**_BLKDEBUG, "inject-error": [{"event": "l2_load"}, {"event": "l2_load", "zz": 3}]},
        "Parameter 'inject-error[1].zz' is unexpected",
    ),
    (
        {**_BLKDEBUG, "take-child-perms": [5]},
        "Invalid parameter type for 'take-child-perms[0]', expected: string",
    ),
    ({**_BLKDEBUG, "take-child-perms": ["x"]}, "Parameter 'null' does not accept value 'x'"),
    (
        {**_QUORUM, "children": [5]},
        "Invalid parameter type for 'null', expected: BlockdevRef",
    ),
    (
        {**_QUORUM, "children": ["a", {"driver": "null-co", "zz": 1}]},
        "Parameter 'children[1].zz' is unexpected",
    ),
]

#: Sizes as users write them; None where they are refused.
SIZES: dict[str, int | None] = {
    "512": 512,
    " 1k": 1024,
    "+1K": 1024,
    "1.": 1,
    "1.0": 1,
    "1.k": 1024,
    "0.5k": 512,
    "1.5M": 1536 * 1024,
    "010": 10,
    "08": 8,
    "0x10": 16,
    "0x10B": 0x10B,
    "0xE": 14,
    "1T": 1 << 40,
    "1P": 1 << 50,
    "1.5E": 3 << 59,
    "18446744073709551615": (1 << 64) - 1,
    "18446744073709551616": None,
    "16E": None,
    "": None,
    "-1": None,
    ".5k": None,
    "1 k": None,
    "1e3": None,
    "1.5": None,
    "1.5B": None,
    "1kB": None,
    "0x": None,
    "0x1.5": None,
    "x": None,
}
