# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A QMP session of the command line, through the reference client library `qemu.qmp`.

Works with nbdjobs and with the real qemu-storage-daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, StateError

from nbdjobs.cli.exits import CliError
from nbdjobs.cli.images import node_name

#: Seconds until a server that accepts but does not greet is given up. qemu-storage-daemon does
#: so while another client is connected to the same socket.
GREETING_PATIENCE_S: Final = 10.0


class RefusedError(CliError):
    """The server refused a command; the session lives.

    Attributes:
        description: The server's own sentence.
        error_class: The word that programs test for (QAPI `QapiErrorClass`).
    """

    def __init__(self, command: str, description: str, error_class: str):
        self.description = description
        self.error_class = error_class
        super().__init__(f"the server refused {command}: {description}")


class ServerGoneError(CliError):
    """The server closed the session: nothing more can be asked of it."""


@dataclass(frozen=True, slots=True)
class BlockNode:
    """A node of the server.

    Attributes:
        name: Its node name.
        driver: Its driver.
        size: Bytes.
        allocated: Bytes that its file takes up; None when the server does not know.
        filename: What it has open; a path for files and devices.
        is_read_only: Nobody can write to it.
    """

    name: str
    driver: str
    size: int
    allocated: int | None
    filename: str
    is_read_only: bool

    @classmethod
    def from_qmp(cls, node: Mapping[str, Any]) -> BlockNode:
        """Read an entry of `query-named-block-nodes`."""
        image = node["image"]
        return cls(
            name=node["node-name"],
            driver=node["drv"],
            size=image["virtual-size"],
            allocated=image.get("actual-size"),
            filename=image["filename"],
            is_read_only=node["ro"],
        )


class Session:
    """An open QMP session.

    Attributes:
        client: The library's client, for its events.
        path: The server's socket.
    """

    def __init__(self, client: QMPClient, path: Path):
        self.client = client
        self.path = path

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Run a command and return the value of its answer.

        Raises:
            RefusedError: The server answered with an error.
            ServerGoneError: It did not answer at all.
        """
        try:
            return await self.client.execute(command, None if arguments is None else {**arguments})
        except ExecuteError as error:
            raise RefusedError(command, str(error), error.error_class) from error
        except (ExecInterruptedError, StateError) as error:
            raise ServerGoneError(
                f"the server at '{self.path}' closed the session before it had answered {command}"
            ) from error

    async def nodes(self) -> dict[str, BlockNode]:
        """Return all nodes by name."""
        answer = await self.execute("query-named-block-nodes", {"flat": True})
        return {node.name: node for node in map(BlockNode.from_qmp, answer)}

    async def find_node(self, name: str, nodes: Mapping[str, BlockNode]) -> BlockNode:
        """Find a disk by the name of its node, by its export's id, or by its export's name.

        Raises:
            CliError: There is none; the message says which there are.
        """
        exports = {
            export["id"]: export["node-name"]
            for export in await self.execute("query-block-exports")
        }
        for node in (name, exports.get(name, name), node_name(name)):
            if node in nodes:
                return nodes[node]
        disks = sorted(set(exports.values())) or sorted(nodes)
        there = ", ".join(f"'{disk}'" for disk in disks) or "none"
        raise CliError(f"the server has no disk '{name}': it has {there}")


@contextlib.asynccontextmanager
async def open_session(path: Path) -> AsyncIterator[Session]:
    """Connect to a server's QMP socket, and disconnect at the end.

    Raises:
        CliError: Nobody listens there, or it is not a QMP server.
    """
    client = QMPClient("nbdjobs")
    # The library logs what it also raises.
    client.logger.addHandler(logging.NullHandler())
    client.logger.propagate = False
    try:
        async with asyncio.timeout(GREETING_PATIENCE_S):
            await client.connect(str(path))
    except TimeoutError as error:
        raise CliError(
            f"the server at '{path}' does not answer: it may serve only one QMP client at a time"
        ) from error
    except ConnectError as error:
        raise CliError(_why_not(path, error.exc)) from error
    try:
        yield Session(client, path)
    finally:
        # Whatever ended the session has been reported by the command that noticed it.
        with contextlib.suppress(Exception):
            await client.disconnect()


def _why_not(path: Path, error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return f"there is no QMP socket '{path}': expected that of a running server"
        case ConnectionRefusedError():
            return f"no server listens at the QMP socket '{path}'"
        case OSError(strerror=str(reason)):
            return f"cannot connect to the QMP socket '{path}': {reason}"
        case _:
            return f"'{path}' is not a QMP socket: who listens there does not greet like one"
