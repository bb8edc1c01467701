# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A configuration file in qemu-storage-daemon's options, and what users are told."""

from __future__ import annotations

import json
from pathlib import Path

from nbdjobs.cli.config import read_config
from nbdjobs.cli.config_options import (
    ConfigServing,
    config_banner,
    config_daemon_options,
    exported,
    steps,
)
from nbdjobs.cli.serve_options import TcpListen

TEXT = """
nbd.max-connections = 7
nbd.handshake-max-seconds = 3
[secrets.key]
file = "key"
[throttle-groups.slow]
iops-total = 5
[nodes.top]
driver = "throttle"
throttle-group = "slow"
file = "disk"
[nodes.disk]
driver = "null-co"
[exports.disk]
node-name = "top"
writable = true
[exports.other]
node-name = "disk"
name = "my disk"
"""


def serving(text: str = TEXT, *, is_found: bool = True) -> ConfigServing:
    reading = read_config(text)
    assert reading.problems == ()
    return ConfigServing(
        config=reading.config,
        listen=TcpListen("::1", 10809),
        qmp=Path("/run/q,s.sock"),
        is_found=is_found,
    )


def test_each_option_knows_its_key() -> None:
    found = [(step.option, step.typed) for step in steps(serving())]
    assert found == [
        ("chardev", "qmp"),
        ("monitor", "qmp"),
        ("object", "secrets.key"),
        ("object", "throttle-groups.slow"),
        ("blockdev", "nodes.disk"),
        ("blockdev", "nodes.top"),
        ("nbd-server", "nbd"),
        ("export", "exports.disk"),
        ("export", "exports.other"),
    ]


def test_tables_become_json() -> None:
    texts = [step.text for step in steps(serving())]
    assert texts[:2] == [
        "socket,id=control,path=/run/q,,s.sock,server=on,wait=off",
        "chardev=control",
    ]
    assert [json.loads(text) for text in texts[2:6]] == [
        {"id": "key", "qom-type": "secret", "file": "key"},
        {"id": "slow", "qom-type": "throttle-group", "limits": {"iops-total": 5}},
        {"node-name": "disk", "driver": "null-co"},
        {"node-name": "top", "driver": "throttle", "throttle-group": "slow", "file": "disk"},
    ]
    assert texts[6] == (
        "addr.type=inet,addr.host=::1,addr.port=10809,max-connections=7,handshake-max-seconds=3"
    )
    assert [json.loads(text) for text in texts[7:]] == [
        {"type": "nbd", "id": "disk", "name": "disk", "node-name": "top", "writable": True},
        {"type": "nbd", "id": "other", "name": "my disk", "node-name": "disk"},
    ]


def test_a_pretty_monitor_is_one() -> None:
    options = config_daemon_options(serving("qmp.pretty = true"))
    assert options[2:4] == ["--monitor", "chardev=control,pretty=on"]


def test_the_banner_says_what_where_and_what_next() -> None:
    assert config_banner(serving()) == [
        "serving 'disk' (node top, read-write)",
        "  nbd://[::1]:10809/disk",
        "serving 'my disk' (node disk, read-only)",
        "  nbd://[::1]:10809/my%20disk",
        "QMP socket: /run/q,s.sock",
        "backup:     nbdjobs backup disk disk-backup.img",
    ]
    assert config_banner(serving("", is_found=False)) == ["QMP socket: /run/q,s.sock"]
    assert config_banner(serving(is_found=False))[-1].endswith(" --qmp /run/q,s.sock")


def test_programs_get_what_is_served_as_fields() -> None:
    assert list(exported(serving()))[1] == {
        "export": "my disk",
        "node": "disk",
        "access": "read-only",
        "uri": "nbd://[::1]:10809/my%20disk",
        "qmp": "/run/q,s.sock",
    }
