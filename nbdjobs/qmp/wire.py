# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""QMP messages: what a client sends, checked, and what it gets back, as bytes.

Input is UTF-8 in QEMU's JSON dialect, output is plain ASCII, one message per line (or
indented for "pretty" monitors), ended by CR LF.

Source: QEMU docs/interop/qmp-spec.rst; texts and layout of qemu-storage-daemon 7.2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from nbdjobs.errors import CommandError
from nbdjobs.qapi.jsonparse import JsonValue
from nbdjobs.qapi.visitor import to_qapi


@dataclass(frozen=True, slots=True)
class Request:
    """A well-formed request.

    Attributes:
        name: Command to execute.
        arguments: Its arguments as JSON.
        is_out_of_band: It came with `exec-oob`: it runs ahead of those that wait.
    """

    name: str
    arguments: dict[str, JsonValue]
    is_out_of_band: bool


def parse_request(value: JsonValue, *, allow_oob: bool) -> Request:
    """Check the outer form of a request.

    Args:
        value: A decoded message.
        allow_oob: The session has negotiated `oob`; else `exec-oob` is as unknown as any
            other member.

    Raises:
        CommandError: The message is no request.
    """
    if not isinstance(value, dict):
        raise CommandError("QMP input must be a JSON object")
    for key, member in value.items():
        _check_member(key, member, allow_oob)
    if "execute" in value and "exec-oob" in value:
        raise CommandError("QMP input member 'execute' clashes with 'exec-oob'")
    name = value.get("execute", value.get("exec-oob"))
    if not isinstance(name, str):
        raise CommandError("QMP input lacks member 'execute'")
    arguments = value.get("arguments", {})
    assert isinstance(arguments, dict), "checked above"
    return Request(name, arguments, "exec-oob" in value)


def _check_member(key: str, member: JsonValue, allow_oob: bool) -> None:
    if key == "execute" or (key == "exec-oob" and allow_oob):
        if not isinstance(member, str):
            raise CommandError(f"QMP input member '{key}' must be a string")
    elif key == "arguments":
        if not isinstance(member, dict):
            raise CommandError("QMP input member 'arguments' must be an object")
    elif key != "id":
        raise CommandError(f"QMP input member '{key}' is unexpected")


def reply_id(value: JsonValue) -> dict[str, JsonValue]:
    """The `id` member to repeat in the reply to `value`: as it came, or none."""
    if isinstance(value, dict) and "id" in value:
        return {"id": value["id"]}
    return {}


def success(result: object, id_member: Mapping[str, JsonValue]) -> dict[str, object]:
    """The reply to a command that returned `result`; None is an empty object."""
    return {"return": to_qapi(result) if result is not None else {}, **id_member}


def failure(error: CommandError, id_member: Mapping[str, JsonValue]) -> dict[str, object]:
    """The reply to a command that was refused or failed."""
    described = {"class": str(error.error_class), "desc": error.description}
    return {**id_member, "error": described}


def encode(message: Mapping[str, object], *, pretty: bool = False) -> bytes:
    """A message as it is sent."""
    text = json.dumps(message, indent=4 if pretty else None, allow_nan=False)
    return text.encode("ascii") + b"\r\n"
