# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs completion`: a script that teaches a shell to complete the command line.

The scripts are made from the same parsers as `--help`, so they know what the program knows.
"""

from __future__ import annotations

import argparse
import re
from typing import Final

from nbdjobs.cli.completion_scripts import SCRIPTS, Argument, Command, Option
from nbdjobs.cli.daemon_options import USAGE
from nbdjobs.cli.exits import ExitCode
from nbdjobs.cli.main import DAEMON, whole_parser
from nbdjobs.cli.parsers import arguments_of, help_of, name_of, options_of, subcommands

#: What arguments are called whose values are paths.
PATHS: Final = frozenset({"FILE", "IMAGE", "PATH", "TARGET"})

EPILOG: Final = (
    'bash: source <(nbdjobs completion bash); zsh: nbdjobs completion zsh > "${fpath[1]}/_nbdjobs";'
    " fish: nbdjobs completion fish > ~/.config/fish/completions/nbdjobs.fish"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = EPILOG
    parser.add_argument("shell", choices=list(SCRIPTS), help="for which shell")


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    print(SCRIPTS[arguments.shell](commands(whole_parser())), end="")
    return ExitCode.DONE


def commands(parser: argparse.ArgumentParser) -> list[Command]:
    """Read the subcommands out of the program's parser."""
    return [
        Command(
            name=each.name,
            summary=each.summary,
            options=_daemon_options() if each.name == DAEMON else _options(each.parser),
            arguments=tuple(_value(action) for action in arguments_of(each.parser)),
        )
        for each in subcommands(parser)
    ]


def _options(parser: argparse.ArgumentParser) -> tuple[Option, ...]:
    return tuple(
        Option(
            names=tuple(action.option_strings),
            summary=help_of(action),
            value=_value(action) if action.nargs != 0 else None,
        )
        for action in options_of(parser)
    )


def _value(action: argparse.Action) -> Argument:
    name = name_of(action)
    return Argument(
        name=name,
        choices=tuple(str(choice) for choice in action.choices or ()),
        is_path=name in PATHS,
        is_repeated=action.nargs in ("*", "+"),
    )


def _daemon_options() -> tuple[Option, ...]:
    """The daemon's options, which argparse does not know; its help says which have a value."""
    found = re.findall(r"^ {2}(?:(-\w), )?(--[a-z-]+)( \S)?", USAGE, re.MULTILINE)
    options = {
        long: Option(
            names=tuple(name for name in (short, long) if name),
            summary="",
            value=Argument("VALUE", (), is_path=long == "--pidfile") if value else None,
        )
        for short, long, value in found
    }
    return tuple(options.values())
