# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What argparse's parsers say about the command line, for completion scripts and manual pages."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Described:
    """A subcommand as the program's parser describes it."""

    name: str
    summary: str
    parser: argparse.ArgumentParser


def subcommands(parser: argparse.ArgumentParser) -> list[Described]:
    """Read the subcommands out of the program's parser."""
    actions = _subparsers(parser)
    # Where argparse itself takes its help from.
    summaries = {choice.dest: choice.help or "" for choice in actions._get_subactions()}
    return [Described(name, summaries[name], each) for name, each in actions.choices.items()]


def _subparsers(
    parser: argparse.ArgumentParser,
) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action
    raise AssertionError("the program has subcommands")


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options, those with dashes."""
    return [action for action in parser._actions if action.option_strings]


def arguments_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments that are known by their place."""
    return [action for action in parser._actions if not action.option_strings]


def alternatives_of(
    parser: argparse.ArgumentParser, action: argparse.Action
) -> tuple[list[argparse.Action], bool]:
    """What may stand in the place of an option or argument, itself included.

    Returns:
        All of them, and whether one has to be there.
    """
    for group in parser._mutually_exclusive_groups:
        if action in group._group_actions:
            return group._group_actions, group.required
    return [action], action.required and not action.option_strings


def help_of(action: argparse.Action) -> str:
    """The help of an option or argument."""
    return (action.help or "").replace("%%", "%")


def name_of(action: argparse.Action) -> str:
    """What the help calls the value of an option or argument."""
    return str(action.metavar or action.dest.upper())
