# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The `nbdjobs` program: chooses the subcommand, and turns errors into a sentence and a code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from nbdjobs import __version__
from nbdjobs.cli import backup, demo, serve
from nbdjobs.cli.exits import CliError, ExitCode
from nbdjobs.errors import NbdJobsError


@dataclass(frozen=True, slots=True)
class Subcommand:
    """One subcommand.

    Attributes:
        summary: A line for the list of subcommands.
        add_arguments: Describes its command line to the parser.
        run: Does it and returns the exit code; raises `CliError` to end with a sentence.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


SUBCOMMANDS: Final[Mapping[str, Subcommand]] = {
    "serve": Subcommand("serve disk images over NBD", serve.add_arguments, serve.run),
    "backup": Subcommand("back up a disk while it is used", backup.add_arguments, backup.run),
    "demo": Subcommand(
        "show a live backup and prove it byte by byte", demo.add_arguments, demo.run
    ),
}

DAEMON: Final = "daemon"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: The arguments without the program's name; those of the process when None.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == [DAEMON]:
            return _daemon(words[1:])
        arguments = _parser().parse_args(words)
        return SUBCOMMANDS[arguments.subcommand].run(arguments)
    except CliError as error:
        return _complain(str(error), error.code)
    except NbdJobsError as error:
        return _complain(str(error), ExitCode.FAILED)
    except BrokenPipeError:
        # Whoever read our output has had enough, `nbdjobs ... | head` for example.
        sys.stderr.close()
        return ExitCode.FAILED
    except OSError as error:
        name = f"'{error.filename}': " if error.filename is not None else ""
        return _complain(f"{name}{error.strerror or error}", ExitCode.FAILED)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED


def _daemon(words: list[str]) -> int:
    # qemu-storage-daemon's options act in order, which argparse cannot keep, so it has a parser
    # of its own; and the other subcommands start quicker without the whole daemon.
    from nbdjobs.cli.daemon import daemon_main

    return daemon_main(words)


def _complain(message: str, code: ExitCode) -> int:
    print(f"nbdjobs: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
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
    for name, subcommand in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=subcommand.summary,
            description=f"{subcommand.summary[0].upper()}{subcommand.summary[1:]}.",
        )
        subcommand.add_arguments(subparser)
    return parser
