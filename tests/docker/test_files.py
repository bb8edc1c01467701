# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Dockerfile, compose file, entry point and manual agree; nothing in them asks for root."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from nbdjobs.cli import health, logs, serve
from nbdjobs.cli.serve_options import TcpListen
from nbdjobs.daemon.exports import STOP_GRACE_S
from tests.docker.files import DOCKER, ROOT, Dockerfile, seconds, yaml_values

DOCKERFILE = Dockerfile.read(DOCKER / "Dockerfile")
IMAGE = DOCKERFILE.last_stage()
COMPOSE = (DOCKER / "compose.yaml").read_text()
ENTRYPOINT = DOCKER / "entrypoint.sh"
MANUAL = (ROOT / "docs" / "container.md").read_text()
IGNORED = (ROOT / ".dockerignore").read_text().splitlines()

#: The port that is registered for NBD.
PORT = "10809"
USER = "10809:10809"
VOLUMES = ["/images", "/state"]


def environment() -> dict[str, str]:
    """What the image sets."""
    return dict(word.split("=", 1) for word in shlex.split(IMAGE.one("ENV")))


def table(manual: str) -> dict[str, str]:
    """The rows of the manual's tables, second column by first."""
    rows = re.findall(r"^\| `([^`]+)` \| (.*?) \|", manual, re.MULTILINE)
    return dict(rows)


def options(words: list[str]) -> argparse.Namespace:
    """A health check's command, read by the program's own parser."""
    assert words[:2] == ["nbdjobs", "health"]
    parser = argparse.ArgumentParser()
    health.add_arguments(parser)
    return parser.parse_args(words[2:])


# What the image is


def test_every_stage_is_a_slim_debian() -> None:
    assert {stage.split()[0] for stage in DOCKERFILE.all("FROM")} == {"debian:bookworm-slim"}


def test_the_user_is_a_number_and_not_root() -> None:
    user, group = IMAGE.one("USER").split(":")
    assert int(user) > 0
    assert int(group) > 0
    assert f"useradd --uid {user} --gid {group}" in IMAGE.one("RUN")
    # What comes after USER is not made as root again.
    assert [name for name, _ in IMAGE.instructions].index("USER") > max(
        index for index, (name, _) in enumerate(IMAGE.instructions) if name in {"RUN", "COPY"}
    )


def test_the_user_owns_the_volumes_and_nothing_else() -> None:
    assert f"install -d -o nbdjobs -g nbdjobs -m 0750 {' '.join(VOLUMES)}" in IMAGE.one("RUN")
    assert "chown" not in (DOCKER / "Dockerfile").read_text()


def test_what_is_copied_is_in_the_build_context_and_nothing_else_is() -> None:
    sources = [
        source
        for arguments in DOCKERFILE.all("COPY")
        if not arguments.startswith("--from")
        for source in arguments.split()[:-1]
    ]
    assert all((ROOT / source).exists() for source in sources)
    assert IGNORED[1] == "*"
    assert {line[1:] for line in IGNORED if line.startswith("!")} == set(sources)


def test_the_entry_point_is_a_program() -> None:
    assert IMAGE.all("COPY")[-1] == "docker/entrypoint.sh /usr/local/bin/nbdjobs-entrypoint"
    assert json.loads(IMAGE.one("ENTRYPOINT")) == ["nbdjobs-entrypoint"]
    assert ENTRYPOINT.stat().st_mode & stat.S_IXOTH


def test_it_stops_by_a_signal_that_the_daemon_obeys() -> None:
    assert IMAGE.one("STOPSIGNAL") == signal.SIGTERM.name


def test_the_environment_is_understood() -> None:
    chosen = logs.log_options(environment())
    assert chosen == logs.LogOptions(logs.LogFormat.JSON, logs.LogLevel.INFO)
    assert environment()["XDG_RUNTIME_DIR"] in VOLUMES


def test_the_health_check_has_time_for_its_answer() -> None:
    found = re.fullmatch(r"(.*) CMD (\[.*\])", IMAGE.one("HEALTHCHECK"))
    assert found is not None
    times = dict(option.removeprefix("--").split("=") for option in found[1].split())
    assert options(json.loads(found[2])).timeout < seconds(times["timeout"])
    assert seconds(times["timeout"]) < seconds(times["interval"])


# Dockerfile, compose file and manual say the same


def test_the_port_is_the_same_everywhere() -> None:
    assert IMAGE.one("EXPOSE") == PORT
    assert yaml_values(COMPOSE, "ports") == [f"127.0.0.1:{PORT}:{PORT}"]
    assert f"listen=0.0.0.0:{PORT}\n" in ENTRYPOINT.read_text()
    assert table(MANUAL)["/images"]
    assert f"| port | `{PORT}`, NBD |" in MANUAL
    assert f"-p 127.0.0.1:{PORT}:{PORT}" in MANUAL


def test_the_user_is_the_same_everywhere() -> None:
    assert IMAGE.one("USER") == USER
    assert yaml_values(COMPOSE, "user") == [USER]
    assert f"| user | `{USER}`" in MANUAL
    assert f"chown -R {USER} images" in MANUAL


def test_the_volumes_are_the_same_everywhere() -> None:
    assert json.loads(IMAGE.one("VOLUME")) == VOLUMES
    mounted = [volume.rpartition(":")[2] for volume in yaml_values(COMPOSE, r"    volumes")]
    assert mounted == VOLUMES
    assert [row for row in table(MANUAL) if row.startswith("/")] == VOLUMES
    assert all(f":{volume} " in MANUAL for volume in VOLUMES)


def test_the_variables_are_those_of_the_manual() -> None:
    rows = {name: value.strip("`") for name, value in table(MANUAL).items() if name.isupper()}
    set_by_image = {name: environment().get(name, "/images") for name in rows}
    assert rows == set_by_image
    assert set(environment()) - set(rows) == {"PATH", "PYTHONDONTWRITEBYTECODE"}
    assert all(f"{name}: {value}\n" in COMPOSE for name, value in rows.items() if "LOG" in name)


def test_the_health_check_is_the_same_in_the_compose_file() -> None:
    [command] = re.findall(r"CMD (\[.*\])", IMAGE.one("HEALTHCHECK"))
    assert yaml_values(COMPOSE, "test") == ["CMD", *json.loads(command)]
    for option in ("interval", "timeout", "start-period", "retries"):
        [value] = yaml_values(COMPOSE, option.replace("-", "_"))
        assert f"--{option}={value} " in IMAGE.one("HEALTHCHECK")


# What the compose file asks for


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("read_only", ["true"]),
        ("cap_drop", ["ALL"]),
        ("security_opt", ["no-new-privileges:true"]),
        ("tmpfs", ["/tmp"]),
        ("stop_signal", ["SIGTERM"]),
        ("context", [".."]),
        ("dockerfile", ["docker/Dockerfile"]),
    ],
)
def test_the_container_may_do_no_more_than_it_must(key: str, value: list[str]) -> None:
    assert yaml_values(COMPOSE, key) == value


def test_nothing_gives_privileges_back() -> None:
    for word in ("privileged", "cap_add", "network_mode", "pid:", "root"):
        assert word not in COMPOSE


def test_the_grace_time_leaves_time_to_flush() -> None:
    [grace] = yaml_values(COMPOSE, "stop_grace_period")
    assert seconds(grace) >= 10 * STOP_GRACE_S
    assert f"`stop_grace_period: {grace}`" in MANUAL


# What the entry point runs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of images, and a program `nbdjobs` that shows its arguments."""
    images = tmp_path / "my images"
    images.mkdir()
    program = tmp_path / "bin" / "nbdjobs"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    return images


def started(folder: Path, *words: str) -> list[str]:
    ended = enter(folder, *words)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.splitlines()


def enter(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder.parent / 'bin'}:{os.environ['PATH']}"
    variables = {"PATH": path, "NBDJOBS_IMAGES": str(folder)}
    return subprocess.run(
        ["/bin/sh", ENTRYPOINT, *words], env=variables, capture_output=True, text=True, check=False
    )


def test_all_images_are_served(folder: Path) -> None:
    for name in ("b.img", "a b.img", "backup.img.partial", ".hidden"):
        (folder / name).touch()
    (folder / "folder").mkdir()
    (folder / "linked").symlink_to("b.img")
    assert started(folder) == [
        *("serve", "--tcp", f"0.0.0.0:{PORT}"),
        *(str(folder / name) for name in ("a b.img", "b.img", "linked")),
    ]


def test_the_program_understands_what_it_gets(folder: Path) -> None:
    (folder / "a.img").touch()
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    found = parser.parse_args(started(folder, "--read-only", "--name", "x y")[1:])
    assert (found.tcp, found.images) == (TcpListen("0.0.0.0", int(PORT)), [folder / "a.img"])
    assert (found.read_only, found.names) == (True, ["x y"])


def test_a_subcommand_replaces_the_default(folder: Path) -> None:
    words = ["backup", "disk", "a backup.img", "--json"]
    assert started(folder, *words) == words


def test_a_folder_without_images_is_named(folder: Path) -> None:
    ended = enter(folder)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        f"nbdjobs: there is no disk image in {folder}: mount a folder of raw images there\n"
    )
