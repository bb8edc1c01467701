# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What a configuration file means in qemu-storage-daemon's options, and what users are told. Pure.

Each option remembers the key that it comes from, so that what the daemon says about the option can
be said about the key.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdjobs.cli.config import Config
from nbdjobs.cli.config_walk import below
from nbdjobs.cli.daemon_options import Step
from nbdjobs.cli.serve_options import Listen, control_options


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigServing:
    """What `nbdjobs serve --config` was asked for.

    Attributes:
        config: What the file says.
        listen: Where NBD clients connect.
        qmp: Where QMP clients connect.
        is_found: `nbdjobs backup` finds the QMP socket without being told.
    """

    config: Config
    listen: Listen
    qmp: Path
    is_found: bool = True


def steps(serving: ConfigServing) -> Iterator[Step]:
    """Translate into the options of `nbdjobs daemon`, in the order in which they have to act.

    The QMP socket comes first, so that a start that fails later cannot have been missed by
    whoever waits for it.
    """
    config = serving.config
    chardev, monitor = control_options(serving.qmp)
    yield Step("chardev", chardev, "qmp")
    yield Step("monitor", monitor + (",pretty=on" if config.qmp.pretty else ""), "qmp")
    for name, secret in config.secrets.items():
        yield _object("secrets", name, {"qom-type": "secret", **secret})
    for name, limits in config.throttle_groups.items():
        yield _object("throttle-groups", name, {"qom-type": "throttle-group", "limits": limits})
    for name, node in config.nodes.items():
        text = json.dumps({"node-name": name, **node})
        yield Step("blockdev", text, below("nodes", name))
    yield Step("nbd-server", _server(serving), "nbd")
    for name, export in config.exports.items():
        text = json.dumps({"type": "nbd", "id": name, "name": name, **export})
        yield Step("export", text, below("exports", name))


def _object(section: str, name: str, options: Mapping[str, Any]) -> Step:
    return Step("object", json.dumps({"id": name, **options}), below(section, name))


def _server(serving: ConfigServing) -> str:
    nbd = serving.config.nbd
    limits = {
        "max-connections": nbd.max_connections,
        "handshake-max-seconds": nbd.handshake_max_seconds,
    }
    given = (f",{name}={value}" for name, value in limits.items() if value is not None)
    return serving.listen.option() + "".join(given)


def config_daemon_options(serving: ConfigServing) -> list[str]:
    """The same as a command line of `nbdjobs daemon` and qemu-storage-daemon."""
    return [word for step in steps(serving) for word in (f"--{step.option}", step.text)]


def exported(serving: ConfigServing) -> Iterator[dict[str, str]]:
    """What is served, for logs: an export's name, its node, and where clients find it."""
    for name, export in serving.config.exports.items():
        export_name = export.get("name", name)
        yield {
            "export": export_name,
            "node": export["node-name"],
            "access": "read-write" if export.get("writable") else "read-only",
            "uri": serving.listen.uri(export_name),
            "qmp": str(serving.qmp),
        }


def config_banner(serving: ConfigServing) -> list[str]:
    """Return the lines that say what is served, where, and what to do next."""
    lines = []
    for each in exported(serving):
        lines += [
            f"serving '{each['export']}' (node {each['node']}, {each['access']})",
            f"  {each['uri']}",
        ]
    lines.append(f"QMP socket: {shlex.quote(str(serving.qmp))}")
    for name in list(serving.config.exports)[:1]:
        words = ["nbdjobs", "backup", name, f"{name}-backup.img"]
        if not serving.is_found:
            words += ["--qmp", str(serving.qmp)]
        lines.append(f"backup:     {shlex.join(words)}")
    return lines
