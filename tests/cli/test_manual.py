# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The manual names what there is: options, commands, events, drivers, folders; and no more."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

import nbdjobs
from nbdjobs.cli import backup, config, serve
from nbdjobs.cli.completion import commands
from nbdjobs.cli.main import DAEMON, SUBCOMMANDS, whole_parser
from nbdjobs.daemon.exports import BlockExportOptionsNbd
from nbdjobs.daemon.throttle_limits import ThrottleLimits
from nbdjobs.nodes.drivers import DRIVERS
from nbdjobs.nodes.options import BlockdevOptions, CacheOptions
from nbdjobs.qapi.model import members_of
from nbdjobs.qapi.types import event_name
from nbdjobs.qmp.commands import EVENTS, REGISTRY

ROOT = Path(nbdjobs.__file__).parent.parent
IMAGE_COMMANDS = {"create", "check", "map", "snapshot"}
PICTURES = sorted((ROOT / "docs" / "images").iterdir())
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def first_column(text: str, pattern: str) -> set[str]:
    """What stands in backquotes at the beginning of the tables' rows."""
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    return {found for row in rows for found in re.findall(pattern, row.split("|")[1])}


@pytest.mark.parametrize("name", ["serve", "backup"])
def test_the_manual_names_the_options_there_are(name: str) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    {"serve": serve, "backup": backup}[name].add_arguments(parser)
    options = {word for word in parser.format_help().split() if word.startswith("--")}
    options = {re.sub(r"[^a-z-].*", "", option) for option in options}
    assert first_column(page(f"{name}.md"), r"`(--[a-z-]+)") == options


def test_the_manual_of_operators_names_the_options_and_subcommands_there_are() -> None:
    others = {"serve", "backup", "demo", "health", DAEMON, *IMAGE_COMMANDS}
    operating = [command for command in commands(whole_parser()) if command.name not in others]
    options = {
        name
        for command in operating
        for option in command.options
        for name in option.names
        if name.startswith("--")
    }
    assert first_column(page("operate.md"), r"`(--[a-z-]+)") == options - {"--help"}
    for command in operating:
        assert f"nbdjobs {command.name}" in page("operate.md")


def test_the_manual_of_image_files_names_the_options_and_subcommands_there_are() -> None:
    about_servers = {"--help", "--qmp", "--json"}
    described = [
        each for each in commands(whole_parser()) if each.name in {"info", *IMAGE_COMMANDS}
    ]
    options = {
        name
        for command in described
        for option in command.options
        for name in option.names
        if name.startswith("--")
    }
    assert first_column(page("image-files.md"), r"`(--[a-z-]+)") == options - about_servers
    for command in described:
        assert f"nbdjobs {command.name}" in page("image-files.md")


def section(name: str) -> str:
    """The part of the manual about a table of the configuration file."""
    found = page("serve.md").split(f"\n### `[{name}]`\n")[1]
    return found.partition("\n#")[0]


@pytest.mark.parametrize(
    ("name", "cls", "refused"),
    [
        ("nbd", config.NbdSection, {}),
        ("qmp", config.QmpSection, {}),
        ("log", config.LogSection, {}),
        ("throttle-groups.NAME", ThrottleLimits, {}),
        ("secrets.NAME", config.SecretSection, {}),
        ("nodes.NAME", BlockdevOptions, config.NODE_REFUSED),
        ("exports.NAME", BlockExportOptionsNbd, config.EXPORT_REFUSED),
    ],
)
def test_the_manual_names_the_keys_of_the_configuration_file(
    name: str, cls: type, refused: dict[str, str]
) -> None:
    keys = {member.name for member in members_of(cls)} - set(refused)
    if "cache" in keys:
        keys = keys - {"cache"} | {f"cache.{each.name}" for each in members_of(CacheOptions)}
    general = section(name).partition("| driver |")[0]
    assert first_column(general, r"`([a-z.-]+)`") == keys


def driver_options() -> dict[str, type]:
    return {name: driver.options_type for name, driver in DRIVERS.items()}


def test_the_manual_names_the_keys_of_each_driver() -> None:
    common = {member.name for member in members_of(BlockdevOptions)}
    keys = {
        name: {member.name for member in members_of(options)} - common
        for name, options in driver_options().items()
    }
    listed: dict[str, set[str]] = {}
    for row in section("nodes.NAME").partition("| driver |")[2].splitlines()[2:]:
        if row.startswith("| `"):
            _, drivers, own, _ = row.split("|")
            found = set(re.findall(r"`([a-z0-9-]+)`", own))
            for driver in re.findall(r"`([a-z0-9_-]+)`", drivers):
                listed[driver] = keys["file"] if found == {"file"} and "those" in own else found
    assert listed == keys


def test_the_manual_names_the_commands_and_events_there_are() -> None:
    events = {event_name(event) for event in EVENTS}
    assert first_column(page("qmp.md"), r"`([A-Za-z_-]+)`") == set(REGISTRY.commands) | events


def test_the_manual_names_the_drivers_there_are() -> None:
    listed = page("qmp.md").split("Node drivers:")[1].split("\n\n")[0]
    assert set(re.findall(r"`([a-z0-9_-]+)`", listed)) - {"offset", "size"} == set(DRIVERS)


def test_the_manual_names_the_folders_there_are() -> None:
    packages = {f"nbdjobs/{path.parent.name}/" for path in (ROOT / "nbdjobs").glob("*/__init__.py")}
    listed = first_column(page("architecture.md"), r"`(nbdjobs/[a-z/.]+)`")
    assert {entry for entry in listed if entry.endswith("/")} == packages


def test_the_readme_names_the_subcommands_there_are() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(f"`nbdjobs {name}`" in text or f"nbdjobs {name} " in text for name in SUBCOMMANDS)


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_pictures_say_nothing_of_where_they_were_made_and_load_nothing(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"/(tmp|home|root|work|run|usr)/|@font-face|url\([^#]|href", text)
    assert any(path.name in page.read_text() for page in PAGES)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target
