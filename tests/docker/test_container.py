# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The container, really built and run: `make test-container`.

Clients are outside, at the published port; commands run inside, as an operator's would.
"""

from __future__ import annotations

import json
import random
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdjobs import __version__
from nbdjobs.cli.demo_disk import count_differences
from nbdjobs.cli.demo_writer import BLOCK, Writer, negotiate
from tests.docker.container import GRACE_S, USER_ID, Container, build, network
from tests.interop.tools import run

pytestmark = pytest.mark.interop

MIB = 1 << 20
SIZE = 32 * MIB

#: Bytes per second of the backup: slow enough that the client writes while it runs.
SPEED = "16M"

#: Writes of the client before the backup starts.
BEFORE = 100


@pytest.fixture(scope="module")
def bridged() -> str:
    """The network of the containers; the image is built by then."""
    build()
    return network()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "disk.img").write_bytes(random.Random(0).randbytes(SIZE))
    return folder


@pytest.fixture
def container(images: Path, bridged: str) -> Iterator[Container]:
    with Container(images, bridged) as running:
        yield running.ready()


@contextmanager
def client(container: Container) -> Iterator[Writer]:
    """A client outside that writes to the disk, and does not flush."""
    with socket.create_connection(("127.0.0.1", container.port)) as connection:
        yield Writer(connection, negotiate(connection, "disk"), random.Random(1))


def test_it_is_an_ordinary_user_who_may_nothing(container: Container) -> None:
    assert container.execute("id", "-u").stdout == f"{USER_ID}\n"
    status = container.execute("cat", "/proc/1/status").stdout
    words = dict(line.split(":\t", 1) for line in status.splitlines())
    assert words["Uid"].split() == [str(USER_ID)] * 4
    assert {int(words[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert words["NoNewPrivs"] == "1"


def test_only_the_volumes_can_be_written(container: Container) -> None:
    for folder in ("/", "/etc", "/opt/nbdjobs", "/run", "/var/tmp"):
        refused = container.execute("touch", f"{folder}/x")
        assert refused.returncode != 0, folder
    assert "Read-only file system" in container.execute("touch", "/run/x").stderr
    for folder in ("/images", "/state"):
        assert container.execute("touch", f"{folder}/x").returncode == 0, folder


def test_clients_outside_read_and_write_the_image(container: Container, tmp_path: Path) -> None:
    disk, copy, new = container.images / "disk.img", tmp_path / "copy.img", tmp_path / "new.img"
    for export in ("disk", ""):
        assert run("nbdinfo", "--size", container.uri(export)) == f"{SIZE}\n"
    run("nbdcopy", container.uri("disk"), copy)
    assert count_differences(copy, disk) == 0
    new.write_bytes(random.Random(2).randbytes(SIZE))
    run("nbdcopy", "--flush", new, container.uri("disk"))
    assert count_differences(new, disk) == 0


def test_a_backup_holds_while_a_client_writes(container: Container, tmp_path: Path) -> None:
    disk, expected, backup = (
        container.images / "disk.img",
        tmp_path / "expected.img",
        tmp_path / "backup.img",
    )
    with client(container) as writer:
        writer.write_until(lambda: writer.counts.writes >= BEFORE)
        writer.drain()
        shutil.copyfile(disk, expected)
        words = ["nbdjobs", "backup", "disk", "b.img", "--json", "--no-progress", "--speed", SPEED]
        with container.begin(*words) as job:
            assert job.stdout is not None
            assert json.loads(job.stdout.readline())["type"] == "started"
            writer.write_until(lambda: job.poll() is not None)
            result = json.loads(job.stdout.readline())
        writer.end()
        assert writer.counts.writes > 2 * BEFORE
    assert (result["outcome"], result["exit-code"]) == ("completed", 0)
    assert result["intercepted-operations"] > 0
    container.copy_out("/state/b.img", backup)
    assert count_differences(backup, expected) == 0
    assert count_differences(backup, disk) > 0


def test_it_says_whether_it_is_healthy(container: Container) -> None:
    asked = container.execute("nbdjobs", "health")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout == f"healthy: nbdjobs {__version__}, 2 exports\n"
    run("podman", "healthcheck", "run", container.name)
    run("podman", "kill", "--signal", "STOP", container.name)
    asked = container.execute("nbdjobs", "health", "--timeout", "0.5")
    assert asked.returncode == 1
    assert "did not answer within 0.5 s" in asked.stderr
    run("podman", "kill", "--signal", "CONT", container.name)
    run("podman", "healthcheck", "run", container.name)


def test_a_stop_answers_clients_ends_jobs_and_keeps_the_data(
    container: Container, tmp_path: Path
) -> None:
    new = random.Random(2).randbytes(SIZE)
    (tmp_path / "new.img").write_bytes(new)
    run("nbdcopy", tmp_path / "new.img", container.uri("disk"))  # and no flush
    words = ["nbdjobs", "backup", "disk", "b.img", "--json", "--no-progress", "--speed", "64k"]
    with client(container) as writer, container.begin(*words) as job:
        assert job.stdout is not None
        assert json.loads(job.stdout.readline())["type"] == "started"
        writer.write_until(lambda: writer.counts.writes >= BEFORE)
        assert container.stop() == 0, f"killed after {GRACE_S} s: {container.log}"
        writer.drain()  # every write that was under way has its answer
        assert job.wait() != 0
    messages = [record["message"] for record in container.log]
    assert "told to stop by SIGTERM" in messages
    assert messages[-1].startswith("stopped")
    changes = [record for record in container.log if record.get("event") == "JOB_STATUS_CHANGE"]
    assert changes[-1]["data"]["status"] == "null"
    disk = (container.images / "disk.img").read_bytes()
    blocks = [slice(start, start + BLOCK) for start in range(0, SIZE, BLOCK)]
    changed = [disk[block] for block in blocks if disk[block] != new[block]]
    assert changed
    # The writer fills each block with a number: everything else is what was copied before.
    assert all(content == content[:8] * (BLOCK // 8) for content in changed)


def test_a_folder_without_images_is_one_sentence(tmp_path: Path, bridged: str) -> None:
    folder = tmp_path / "none"
    folder.mkdir()
    with Container(folder, bridged) as container:
        _, said = container.process.communicate()
    assert container.process.returncode == 1
    assert said.splitlines()[-1].startswith("nbdjobs: there is no disk image in /images: ")


def test_arguments_are_options_of_serve(images: Path, bridged: str) -> None:
    with Container(images, bridged, "--read-only", "--name", "root") as container:
        container.ready()
        assert "is_read_only: true" in run("nbdinfo", container.uri("root"))
        assert container.stop() == 0
