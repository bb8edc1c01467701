# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The `nbdjobs` program: chooses the subcommand, and turns errors into a sentence and a code."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Final, Protocol, cast

from nbdjobs import __version__
from nbdjobs.cli.exits import CliError, ExitCode
from nbdjobs.errors import NbdJobsError


class Subcommand(Protocol):
    """What the module of a subcommand offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Describe its command line."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it and return the exit code; raise `CliError` to end with a sentence."""


SUBCOMMANDS: Final[Mapping[str, str]] = {
    "serve": "serve disk images over NBD",
    "backup": "back up a disk while it is used",
    "health": "ask whether a running server answers",
    "demo": "show a live backup and prove it byte by byte",
    "jobs": "show the jobs of a server, live",
    "pause": "pause a job",
    "resume": "go on with a paused job",
    "cancel": "end a job early",
    "speed": "limit the speed of a job",
    "complete": "let a job that is ready take effect",
    "finalize": "let a pending job take effect",
    "dismiss": "remove a job that has ended",
    "top": "watch what a server does, live",
    "info": "show what an image is, or exports, jobs and nodes of a server",
    "create": "make an image",
    "check": "check an image, and repair it",
    "map": "show which parts of a disk are where in its images",
    "snapshot": "list, take, apply and delete snapshots inside an image",
    "qmp": "run a QMP command, or a shell for them",
    "completion": "print the completion script of a shell",
}
"""Each is loaded only when it is used: a server has no use for what draws progress bars. It has a
module of its name in this package, or is a row of the table of verbs for jobs."""

_JOB_VERBS: Final = frozenset(
    {"pause", "resume", "cancel", "speed", "complete", "finalize", "dismiss"}
)

DAEMON: Final = "daemon"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: The arguments without the program's name; those of the process when None.

    Returns:
        The exit code.
    """
    code = _run(list(sys.argv[1:] if argv is None else argv))
    try:
        sys.stdout.flush()  # here, since at Python's own end a reader who has left is an error
    except BrokenPipeError:
        _drop_output()
        return code or ExitCode.FAILED
    return code


def _run(words: list[str]) -> int:
    try:
        if words[:1] == [DAEMON]:
            return _daemon(words[1:])
        subcommand = _load(words[0]) if words and words[0] in SUBCOMMANDS else None
        parser = _parser({} if subcommand is None else {words[0]: subcommand})
        arguments = parser.parse_args(words)
        if subcommand is None:
            parser.error("expected a subcommand as the first word")
        return subcommand.run(arguments)
    except CliError as error:
        return _complain(str(error), error.code)
    except NbdJobsError as error:
        return _complain(str(error), ExitCode.FAILED)
    except BrokenPipeError:
        # Whoever read our output has had enough, `nbdjobs ... | head` for example.
        _drop_output()
        return ExitCode.FAILED
    except OSError as error:
        name = f"'{error.filename}': " if error.filename is not None else ""
        return _complain(f"{name}{error.strerror or error}", ExitCode.FAILED)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED


def _drop_output() -> None:
    """Let what is still to be written go nowhere: Python would complain of it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _daemon(words: list[str]) -> int:
    # qemu-storage-daemon's options act in order, which argparse cannot keep, so it has a parser
    # of its own; and the other subcommands start quicker without the whole daemon.
    from nbdjobs.cli.daemon import daemon_main

    return daemon_main(words)


def _complain(message: str, code: ExitCode) -> int:
    print(f"nbdjobs: {message}", file=sys.stderr)
    return code


def _load(name: str) -> Subcommand:
    if name in _JOB_VERBS:
        from nbdjobs.cli.job_verbs import VERBS

        return VERBS[name]
    return cast(Subcommand, importlib.import_module(f"nbdjobs.cli.{name}"))


def whole_parser() -> argparse.ArgumentParser:
    """Return the parser with the arguments of all subcommands."""
    return _parser({name: _load(name) for name in SUBCOMMANDS})


def _parser(described: Mapping[str, Subcommand]) -> argparse.ArgumentParser:
    """Make the parser; of the subcommands, only these describe their arguments."""
    parser = argparse.ArgumentParser(
        prog="nbdjobs", description="An NBD block server with live backup jobs, driven over QMP."
    )
    parser.add_argument("--version", action="version", version=f"nbdjobs {__version__}")
    subparsers = parser.add_subparsers(
        dest="subcommand", required=True, metavar="SUBCOMMAND", title="subcommands"
    )
    subparsers.add_parser(
        DAEMON, help="the daemon, with qemu-storage-daemon's command line", add_help=False
    )
    for name, summary in SUBCOMMANDS.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        subparser = subparsers.add_parser(name, help=summary, description=description)
        if name in described:
            described[name].add_arguments(subparser)
    return parser
