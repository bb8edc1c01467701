# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Configuration files: what they mean, and every error with its place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.cli.config import SECTIONS, NbdSection, read_config
from nbdjobs.cli.logs import LogFormat, LogLevel

DISK = """
[nodes.disk]
driver = "file"
filename = "disk.img"
"""


def problems(text: str) -> list[str]:
    return [str(problem) for problem in read_config(text).problems]


def test_an_empty_file_is_right() -> None:
    reading = read_config("")
    assert reading.problems == ()
    assert reading.config.nbd == NbdSection()
    assert reading.config.nodes == {}


def test_single_tables_become_options() -> None:
    reading = read_config(
        """
        nbd = { tcp = 10809, max-connections = 7, handshake-max-seconds = 0 }
        qmp = { socket = "q.sock", pretty = true }
        log = { format = "json", level = "debug" }
        """
    )
    assert reading.problems == ()
    config = reading.config
    assert config.nbd == NbdSection(tcp=10809, max_connections=7, handshake_max_seconds=0)
    assert (config.qmp.socket, config.qmp.pretty) == ("q.sock", True)
    assert (config.log.format, config.log.level) == (LogFormat.JSON, LogLevel.DEBUG)


def test_named_tables_become_options_in_the_order_of_the_file() -> None:
    config = read_config(
        f"""
        [secrets.key]
        file = "key.b64"
        format = "base64"
        [throttle-groups.slow]
        bps-total = "50M"
        bps-total-max-length = 3
        iops-size = "64K"
        iops-write = 500
        {DISK}
        cache.direct = true
        [exports.b]
        node-name = "disk"
        [exports.a]
        node-name = "disk"
        writable = true
        """
    ).config
    assert config.secrets == {"key": {"file": "key.b64", "format": "base64"}}
    assert config.throttle_groups["slow"] == {
        "bps-total": 50 << 20,
        "bps-total-max-length": 3,
        "iops-size": 65536,
        "iops-write": 500,
    }
    assert config.nodes == {
        "disk": {"driver": "file", "filename": "disk.img", "cache": {"direct": True}}
    }
    assert list(config.exports.items()) == [
        ("b", {"node-name": "disk"}),
        ("a", {"node-name": "disk", "writable": True}),
    ]


def test_numbers_of_bytes_may_have_a_unit() -> None:
    reading = read_config('[nodes.n]\ndriver = "null-co"\nsize = "1.5G"\nlatency-ns = 5')
    assert reading.problems == ()
    assert reading.config.nodes["n"] == {"driver": "null-co", "size": 3 << 29, "latency-ns": 5}


def test_a_node_comes_behind_those_it_refers_to() -> None:
    text = """
        [nodes.top]
        driver = "raw"
        file = "middle"
        [nodes.lone]
        driver = "null-co"
        [nodes.middle]
        driver = "raw"
        file = { driver = "raw", file = "bottom" }
        [nodes.bottom]
        driver = "null-co"
    """
    reading = read_config(text)
    assert reading.problems == ()
    assert list(reading.config.nodes) == ["bottom", "middle", "top", "lone"]


def test_the_order_is_right_even_where_something_is_wrong() -> None:
    reading = read_config(
        """
        [nodes.top]
        driver = "raw"
        file = "inner"
        [nodes.wrong]
        driver = "raw"
        [nodes.bottom]
        driver = "raw"
        file = { driver = "null-co", node-name = "inner" }
        """
    )
    assert [problem.path for problem in reading.problems] == ["nodes.wrong"]
    assert list(reading.config.nodes) == ["bottom", "top"]


def test_a_node_in_a_circle_is_doubtful() -> None:
    reading = read_config(
        """
        [nodes.user]
        driver = "raw"
        file = "a"
        [nodes.a]
        driver = "raw"
        file = "b"
        [nodes.b]
        driver = "raw"
        file = "a"
        """
    )
    assert [str(problem) for problem in reading.problems] == [
        "nodes.a: the node uses itself: a -> b -> a"
    ]
    assert "a" not in reading.config.nodes
    assert "a" in reading.doubtful


def test_an_empty_string_is_null_where_null_means_something() -> None:
    text = """
        [nodes.q]
        driver = "qcow2"
        file = { driver = "null-co" }
        backing = ""
    """
    reading = read_config(text)
    assert reading.problems == ()
    assert reading.config.nodes["q"]["backing"] is None


def test_inline_nodes_may_be_referred_to_by_name() -> None:
    text = """
        [nodes.disk]
        driver = "raw"
        file = { driver = "null-co", node-name = "inner" }
        [exports.e]
        node-name = "inner"
    """
    assert problems(text) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a = ", "this is not TOML: Invalid value (at end of document)"),
        ("a = " + "[" * 5000, "tables or lists are nested too deeply"),
        ("expots = 1", "expots: unknown key, did you mean 'exports'?"),
        ("zzz = 1", f"zzz: unknown key, expected one of {', '.join(SECTIONS)}"),
        ('"a b" = 1', f'"a b": unknown key, expected one of {", ".join(SECTIONS)}'),
        ("nbd = 1", "nbd: expected a table, not a number"),
        ("nodes = 1", "nodes: expected tables such as [nodes.NAME]"),
        ("exports = []", "exports: expected tables such as [exports.NAME]"),
        ("nodes.disk = true", "nodes.disk: expected a table, not true or false"),
        ("[nbd]\nsokket = 1", "nbd.sokket: unknown key, did you mean 'socket'?"),
        ("[nbd]\nsocket = 1", "nbd.socket: expected a string, not a number"),
        ('[nbd]\nsocket = "s"\ntcp = 1', "nbd: expected one of socket and tcp, not both"),
        ("[nbd]\ntcp = 1.5", "nbd.tcp: expected a string or a number, not a number"),
        ("[nbd]\ntcp = 65536", "nbd.tcp: 65536 is out of range: expected 0 to 65535"),
        (
            '[nbd]\ntcp = "h:0"',
            "nbd.tcp: 'h:0' is not an address: expected PORT, HOST:PORT or [IPV6]:PORT with a port"
            " from 1 to 65535",
        ),
        (
            "[nbd]\nmax-connections = -1",
            "nbd.max-connections: -1 is out of range: expected 0 to 4294967295",
        ),
        ("[qmp]\npretty = 1", "qmp.pretty: expected true or false, not a number"),
        ('[log]\nlevel = "inf"', "log.level: there is no 'inf', did you mean 'info'?"),
        ("[log]\nformat = 1", "log.format: expected one of text, json, not a number"),
        (
            '[log]\nformat = "xml"',
            "log.format: there is no 'xml', expected one of text, json",
        ),
        ("[secrets.s]", "secrets.s: the key 'file' is missing: expected a string"),
        (
            '[throttle-groups.g]\nbps-read = "9X"',
            "throttle-groups.g.bps-read: '9X' is not a size: expected a number such as 1048576,"
            " 50M or 1.5G",
        ),
        (
            "[throttle-groups.g]\niops-read = true",
            'throttle-groups.g.iops-read: expected a number such as 65536 or "64K", not true or'
            " false",
        ),
        (
            "[nodes.n]",
            "nodes.n: the key 'driver' is missing: expected one of",
        ),
        ("[nodes.n]\ndriver = 1", "nodes.n.driver: expected a string, not a number"),
        (
            '[nodes.n]\ndriver = "fil"',
            "nodes.n.driver: there is no 'fil', did you mean 'file'?",
        ),
        (
            '[nodes.n]\ndriver = "file"',
            "nodes.n: the key 'filename' is missing: expected a string",
        ),
        (
            '[nodes.n]\ndriver = "null-co"\nnode-name = "n"',
            "nodes.n.node-name: unknown key: the name of the table is its name",
        ),
        (
            '[nodes.n]\ndriver = "null-co"\ncache = { dircet = true }',
            "nodes.n.cache.dircet: unknown key, did you mean 'direct'?",
        ),
        (
            '[nodes.n]\ndriver = "null-co"\nread-only = 2026-01-01',
            "nodes.n.read-only: expected true or false, not a date or time",
        ),
        (
            '[nodes.n]\ndriver = "raw"\nfile = 1',
            "nodes.n.file: expected a string or a table, not a number",
        ),
        (
            '[nodes.n]\ndriver = "raw"\nfile = { driver = "raw", fil = "x", file = "n" }',
            "nodes.n.file.fil: unknown key, did you mean 'file'?",
        ),
        (
            '[nodes.n]\ndriver = "raw"\nfile = "m"\n[nodes.mm]\ndriver = "null-co"',
            "nodes.n.file: there is no node 'm', did you mean 'mm'?",
        ),
        (
            '[nodes.a]\ndriver = "raw"\nfile = "b"\n[nodes.b]\ndriver = "raw"\nfile = "a"',
            "nodes.a: the node uses itself: a -> b -> a",
        ),
        ("[exports.e]", "exports.e: the key 'node-name' is missing: expected a string"),
        (
            DISK + '[exports.e]\nnode-name = "dsk"',
            "exports.e.node-name: there is no node 'dsk', did you mean 'disk'?",
        ),
        (
            '[exports.e]\nnode-name = "x"',
            "exports.e.node-name: there is no node 'x'",
        ),
        (
            DISK + '[exports.e]\nnode-name = "disk"\nid = "x"',
            "exports.e.id: unknown key: the name of the table is its name",
        ),
        (
            DISK + '[exports."my disk"]\nnode-name = "disk"\nwriteable = true',
            "exports.\"my disk\".writeable: unknown key, did you mean 'writable'?",
        ),
    ],
)
def test_an_error_is_told_with_its_place_and_what_was_expected(text: str, sentence: str) -> None:
    [found] = problems(text)
    if sentence.endswith("one of"):
        found = found[: len(sentence)]
    assert found == sentence


def test_all_errors_are_told() -> None:
    assert problems(
        """
        xyz = 1
        [nbd]
        tcp = "x"
        max = 1
        [nodes.a]
        driver = "file"
        discard = "umap"
        [nodes.b]
        driver = "raw"
        file = "missing"
        [exports.a]
        node-name = "a"
        writable = 1
        """
    ) == [
        "xyz: unknown key, expected one of " + ", ".join(SECTIONS),
        "nbd.max: unknown key, expected one of socket, tcp, max-connections, handshake-max-seconds",
        "nbd.tcp: 'x' is not an address: expected PORT, HOST:PORT or [IPV6]:PORT with a port"
        " from 1 to 65535",
        "nodes.a.discard: there is no 'umap', did you mean 'unmap'?",
        "nodes.a: the key 'filename' is missing: expected a string",
        "nodes.b.file: there is no node 'missing', expected one of a, b",
        "exports.a.writable: expected true or false, not a number",
    ]


def test_secrets_are_not_taken_from_the_file_and_not_told() -> None:
    found = problems('[secrets.s]\nfile = "pw"\ndata = "hunter2"')
    assert found == [
        "secrets.s.data: unknown key: secrets are read from files, expected 'file'",
    ]


def test_what_is_wrong_is_not_there_and_what_refers_to_it_is_doubtful() -> None:
    reading = read_config(DISK + 'fil = 1\n[exports.e]\nnode-name = "disk"')
    assert reading.config.nodes == {}
    assert list(reading.config.exports) == ["e"]
    assert reading.doubtful == {"disk"}


VALUES = st.recursive(
    st.one_of(st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["driver", "file", "filename", "cache", "size", "node-name", "x"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


def toml(value: object) -> str:
    """Write a value as TOML."""
    match value:
        case bool():
            return "true" if value else "false"
        case dict():
            return "{" + ", ".join(f'"{key}" = {toml(each)}' for key, each in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(toml, value)) + "]"
        case str():
            return '"' + "".join(f"\\U{ord(each):08X}" for each in value) + '"'
        case _:
            return str(value)


@given(
    section=st.sampled_from(SECTIONS),
    value=VALUES,
    driver=st.sampled_from(["raw", "file", "null-co", "throttle", "nonsense"]),
)
def test_any_file_is_read_without_an_accident(section: str, value: object, driver: str) -> None:
    if isinstance(value, dict):
        value = {"driver": driver, **value}
    for text in (f"{section} = {toml(value)}", f"{section}.a = {toml(value)}"):
        reading = read_config(text)
        assert reading.problems or reading.config is not None
        assert all(problem.path.startswith(section) for problem in reading.problems)
