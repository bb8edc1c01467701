# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Finding and running other projects' tools.

A test that drives a tool asks for it by name first. Where the tool is missing the test is
skipped, with the tool's name; under ``NBDJOBS_REQUIRE_INTEROP=1``, which ``make test`` sets, it
fails instead, so that a machine without the tools can never look like a passed run.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

#: nbd-client is an administrator's tool: a user's PATH often does not have its folder.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

#: Seconds after which a tool is taken for hung.
PATIENCE_S = 120.0


def require(tool: str) -> str:
    """Return the path of a program, or skip (or fail) the test by its name."""
    path = shutil.which(tool, path=SEARCH_PATH)
    if path is None:
        _missing(tool)
    return path


def is_here(tool: str) -> bool:
    """Whether a program is here, for tests that can tell less without it.

    Where tools are required, one that is missing fails, so that nothing is left out unnoticed.
    """
    if shutil.which(tool, path=SEARCH_PATH) is not None:
        return True
    if os.environ.get("NBDJOBS_REQUIRE_INTEROP") == "1":
        pytest.fail(f"{tool} is required and was not found")
    return False


def require_libnbd() -> Any:
    """Return libnbd's Python module, or skip (or fail) the test.

    The bindings come with Debian's python3-libnbd and are untyped.
    """
    try:
        return importlib.import_module("nbd")
    except ImportError:
        _missing("python3-libnbd")


def _missing(name: str) -> NoReturn:
    if os.environ.get("NBDJOBS_REQUIRE_INTEROP") == "1":
        pytest.fail(f"{name} is required and was not found")
    pytest.skip(f"{name} was not found")


def run(*command: str | Path, is_checked: bool = True, **environment: str) -> str:
    """Run a tool to its end and return what it printed.

    Args:
        command: The tool's name, looked up with ``require``, and its arguments.
        is_checked: Fail the test, with all that was printed, when the exit code is not 0.
        environment: Variables added to the tool's environment.
    """
    result = run_for_result(*command, **environment)
    if is_checked:
        assert result.returncode == 0, f"{result.args}: {result.stdout}{result.stderr}"
    return result.stdout


def run_for_result(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end and return exit code and output, whatever they are."""
    return subprocess.run(
        _found(command),
        env=_environment(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def start(*command: str | Path, **environment: str) -> subprocess.Popen[str]:
    """Start a tool that goes on running; the caller ends it."""
    return subprocess.Popen(
        _found(command),
        env=_environment(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _found(command: Sequence[str | Path]) -> list[str]:
    return [require(str(command[0])), *map(str, command[1:])]


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    # Numbers and messages are compared, so no translation may get between.
    return {**os.environ, "PATH": SEARCH_PATH, "LC_ALL": "C", **extra}
