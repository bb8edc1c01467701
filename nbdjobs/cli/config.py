# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The configuration file of `nbdjobs serve`: what it may hold, read and checked as a whole. Pure.

    [nbd]  [qmp]  [log]                       one table each
    [throttle-groups.NAME]  [secrets.NAME]    what nodes refer to
    [nodes.NAME]                              as blockdev-add takes them
    [exports.NAME]                            as block-export-add takes them

The declarations of QMP are used for nodes, exports and limits, so that a driver that is added to
nbdjobs is in the file, too.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Final

from nbdjobs.cli.config_walk import Problem, Walk, below, suggest
from nbdjobs.cli.logs import LogFormat, LogLevel
from nbdjobs.cli.serve_options import parse_tcp
from nbdjobs.daemon.exports import BlockExportOptionsNbd
from nbdjobs.daemon.object_options import QCryptoSecretFormat
from nbdjobs.daemon.throttle_limits import ThrottleLimits
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.qapi.types import Alternate, Uint16, Uint32
from nbdjobs.qapi.visitor import visit

_NAMED: Final = "the name of the table is its name"


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdSection:
    """The table `[nbd]`: where clients connect.

    Attributes:
        socket: Path of a unix socket.
        tcp: `HOST:PORT` or a port instead.
        max_connections: Clients at once.
        handshake_max_seconds: Time for a client to choose its export.
    """

    socket: str | None = None
    tcp: Annotated[str | Uint16, Alternate("TcpAddress")] | None = None
    max_connections: Uint32 | None = None
    handshake_max_seconds: Uint32 | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QmpSection:
    """The table `[qmp]`: the control socket.

    Attributes:
        socket: Path of the unix socket.
        pretty: Answers are indented.
    """

    socket: str | None = None
    pretty: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSection:
    """The table `[log]`: the log on standard error."""

    format: LogFormat | None = None
    level: LogLevel | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretSection:
    """A table of `[secrets]`: the file is read, and nothing of it is ever shown."""

    file: str
    format: QCryptoSecretFormat = QCryptoSecretFormat.RAW


Tables = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A configuration, or as much of it as is right.

    Attributes:
        nbd: Where clients connect.
        qmp: The control socket.
        log: The log.
        secrets: Options of secrets by name, in the order of the file; likewise the following.
        throttle_groups: Limits by name.
        nodes: Options of nodes by name; a node comes behind those that it refers to.
        exports: Options of exports by name.
    """

    nbd: NbdSection = field(default_factory=NbdSection)
    qmp: QmpSection = field(default_factory=QmpSection)
    log: LogSection = field(default_factory=LogSection)
    secrets: Tables = field(default_factory=dict)
    throttle_groups: Tables = field(default_factory=dict)
    nodes: Tables = field(default_factory=dict)
    exports: Tables = field(default_factory=dict)


SECTIONS: Final = tuple(each.name.replace("_", "-") for each in fields(Config))

#: Those that are there once, while of the others there is one for each name.
_SINGLE: Final = ("nbd", "qmp", "log")

_NO_THREADS: Final = "one event loop serves all"
EXPORT_REFUSED: Final = {
    "type": "every export is one for NBD",
    "id": _NAMED,
    "iothread": _NO_THREADS,
    "fixed-iothread": _NO_THREADS,
}
NODE_REFUSED: Final = {"node-name": _NAMED}
SECRET_REFUSED: Final = {"data": "secrets are read from files, expected 'file'"}


@dataclass(frozen=True, slots=True)
class Reading:
    """What was found in a file.

    Attributes:
        config: Everything that is right.
        problems: Everything that is not.
        doubtful: Names of what is not right, which others may refer to all the same.
    """

    config: Config
    problems: tuple[Problem, ...]
    doubtful: frozenset[str]


def read_config(text: str) -> Reading:
    """Read a configuration and find all that is wrong with it by itself.

    Whether its files are there, and what else only a server can say, is for a rehearsal.
    """
    try:
        return _Reader(tomllib.loads(text)).read()
    except tomllib.TOMLDecodeError as error:
        problem = f"this is not TOML: {error}"
    except RecursionError:
        problem = "tables or lists are nested too deeply"
    return Reading(Config(), (Problem("", problem),), frozenset())


class _Reader:
    """Reads one document, table by table."""

    def __init__(self, document: dict[str, Any]):
        self._document = document
        self._walk = Walk()
        self._doubtful: set[str] = set()

    def read(self) -> Reading:
        for key, value in self._document.items():
            if key not in SECTIONS:
                self._walk.complain(below("", key), f"unknown key{suggest(key, SECTIONS)}")
            elif key not in _SINGLE and not isinstance(value, dict):
                self._walk.complain(key, f"expected tables such as [{key}.NAME]")
        nbd = self._section("nbd", NbdSection)
        self._check_address()
        config = Config(
            nbd=visit(NbdSection, nbd),
            qmp=visit(QmpSection, self._section("qmp", QmpSection)),
            log=visit(LogSection, self._section("log", LogSection)),
            secrets=self._tables("secrets", SecretSection, SECRET_REFUSED),
            throttle_groups=self._tables("throttle-groups", ThrottleLimits),
            nodes=self._nodes(),
            exports=self._exports(),
        )
        return Reading(config, tuple(self._walk.problems), frozenset(self._doubtful))

    def _section(self, name: str, cls: type) -> dict[str, Any]:
        """A table that is there once; empty if anything in it is wrong."""
        before = len(self._walk.problems)
        read = self._walk.table(cls, self._document.get(name, {}), name)
        return read if len(self._walk.problems) == before else {}

    def _tables(
        self, section: str, cls: type, refused: Mapping[str, str] | None = None
    ) -> dict[str, dict[str, Any]]:
        """The tables of a section by name, without those in which anything is wrong."""
        found = {}
        for name, value in self._named(section).items():
            path = below(section, name)
            before = len(self._walk.problems)
            read = self._walk.table(cls, value, path, refused=refused or {})
            if len(self._walk.problems) == before:
                found[name] = read
            else:
                self._doubtful.add(name)
        return found

    def _named(self, section: str) -> dict[str, Any]:
        value = self._document.get(section)
        return value if isinstance(value, dict) else {}

    def _nodes(self) -> dict[str, dict[str, Any]]:
        nodes = self._tables("nodes", BlockdevOptions, NODE_REFUSED)
        uses: dict[str, list[str]] = {}
        for path, name in self._walk.references:
            self._check_node(path, name)
            used = self._table_of(self._walk.inline.get(name, ""), default=name)
            uses.setdefault(self._table_of(path), []).append(used)
        return {name: nodes[name] for name in self._in_order(nodes, uses)}

    def _table_of(self, path: str, default: str = "") -> str:
        """The name of the node in whose table a path is."""
        tables = (name for name in self._named("nodes") if _is_below(path, name))
        return next(tables, default)

    def _exports(self) -> dict[str, dict[str, Any]]:
        exports = self._tables("exports", BlockExportOptionsNbd, EXPORT_REFUSED)
        for name, options in exports.items():
            path = below(below("exports", name), "node-name")
            self._check_node(path, options["node-name"])
        return exports

    def _check_node(self, path: str, name: str) -> None:
        known = [*self._named("nodes"), *self._walk.inline]
        if name not in known:
            self._walk.complain(path, f"there is no node '{name}'{suggest(name, known)}")
            self._doubtful.add(name)

    def _in_order(self, nodes: Tables, uses: Mapping[str, list[str]]) -> list[str]:
        """Nodes behind those that they use, else in the order of the file."""
        ordered: list[str] = []
        under_way: list[str] = []

        def place(name: str) -> None:
            if name in under_way:
                circle = " -> ".join([*under_way[under_way.index(name) :], name])
                self._walk.complain(below("nodes", name), f"the node uses itself: {circle}")
                self._doubtful.add(name)
            elif name not in ordered and name in nodes:
                under_way.append(name)
                for used in uses.get(name, ()):
                    place(used)
                under_way.pop()
                if name not in self._doubtful:
                    ordered.append(name)

        for name in nodes:
            place(name)
        return ordered

    def _check_address(self) -> None:
        nbd = self._document.get("nbd")
        if not isinstance(nbd, dict):
            return
        if "socket" in nbd and "tcp" in nbd:
            self._walk.complain("nbd", "expected one of socket and tcp, not both")
        if "tcp" in nbd and not any(each.path == "nbd.tcp" for each in self._walk.problems):
            try:
                parse_tcp(str(nbd["tcp"]))
            except ValueError as error:
                self._walk.complain("nbd.tcp", str(error))


def _is_below(path: str, node: str) -> bool:
    return path.startswith(below("nodes", node) + ".")
