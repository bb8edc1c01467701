# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Building the image and running it with Podman, as the manual says."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tests.docker.files import ROOT
from tests.interop.tools import require, run, run_for_result

TAG = "localhost/nbdjobs:test"

#: Seconds after which a build is taken for hung: the base image may have to be made first.
BUILD_PATIENCE_S = 1800

#: Seconds that the engine waits before it kills the container.
GRACE_S = 30

#: A tool beside the repository that builds with Podman where no registry can be reached: it
#: installs Podman, and makes Debian's base image itself.
BUILDER = ROOT.parent / "shared" / "tools" / "container-check"

USER_ID = 10809

PORT = 10809


def build() -> str:
    """Build the image and return its tag, or skip the test by name where this is not wanted."""
    if os.environ.get("NBDJOBS_CONTAINER_TEST") != "1":
        pytest.skip("the container is built and run on request only: make test-container")
    if BUILDER.exists():
        command = [str(BUILDER), "docker/Dockerfile", ".", TAG]
    else:
        command = [require("podman"), "build", "--format", "docker", "-f", "docker/Dockerfile"]
        command += ["-t", TAG, "."]
    built = subprocess.run(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BUILD_PATIENCE_S,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return TAG


def network() -> str:
    """`bridge`, which can publish ports, or `host` where the kernel has no bridges."""
    words = ["--rm", "--pull=never", "--network=bridge", "--entrypoint=true", TAG]
    return "bridge" if run_for_result("podman", "run", *words).returncode == 0 else "host"


class Container:
    """A running container with the image's limits; a context manager that removes it.

    Attributes:
        name: Its name.
        images: The folder on the host that it serves.
        log: What it has logged so far, as far as `read_until` has read.
        process: `podman run`, whose standard error is the log and whose end is the container's.
    """

    def __init__(self, images: Path, network: str, *words: str):
        self.name = f"nbdjobs-test-{uuid.uuid4()}"
        self.images = images
        self.log: list[dict[str, Any]] = []
        self._network = network
        os.chown(images, USER_ID, USER_ID)
        for image in images.iterdir():
            os.chown(image, USER_ID, USER_ID)
        publish = ["--publish", f"127.0.0.1::{PORT}"] if network == "bridge" else []
        self.process = subprocess.Popen(
            [
                *(require("podman"), "run", "--name", self.name, "--pull=never"),
                *("--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp"),
                *("--cap-drop", "all", "--security-opt", "no-new-privileges"),
                *("--network", network, *publish),
                *("--volume", f"{images}:/images", "--volume", f"{self.name}:/state"),
                *(TAG, *words),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        run_for_result("podman", "rm", "--force", "--time", "0", self.name)
        run_for_result("podman", "volume", "rm", "--force", self.name)
        with self.process:
            self.process.kill()

    def read_until(self, message: str) -> None:
        """Read the log up to a record; every line of it is a JSON object."""
        assert self.process.stderr is not None
        while not self.log or not self.log[-1]["message"].startswith(message):
            line = self.process.stderr.readline()
            assert line, f"the container ended: {self.log}"
            self._take(line)

    def ready(self) -> Self:
        """Wait until it serves."""
        self.read_until("ready")
        return self

    @property
    def port(self) -> int:
        """The port on the host that leads to the server."""
        if self._network == "host":
            return PORT
        return int(run("podman", "port", self.name, f"{PORT}/tcp").strip().rpartition(":")[2])

    def uri(self, export: str) -> str:
        return f"nbd://127.0.0.1:{self.port}/{export}"

    def execute(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a program inside and return what it said and how it ended."""
        return run_for_result("podman", "exec", self.name, *words)

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """Run a program inside without waiting for it."""
        command = [require("podman"), "exec", self.name, *words]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )

    def copy_out(self, path: str, target: Path) -> None:
        """Copy a file from inside to the host."""
        run("podman", "cp", f"{self.name}:{path}", target)

    def stop(self) -> int:
        """Stop it as an operator does, read the rest of the log, and return its exit code.

        That code is 137 when the grace time was over and the engine killed it.
        """
        run("podman", "stop", "--time", str(GRACE_S), self.name)
        _, rest = self.process.communicate()
        for line in rest.splitlines():
            self._take(line)
        return self.process.returncode

    def _take(self, line: str) -> None:
        # Where there is no systemd, Podman complains on the same stream that it has no timer for
        # the health check.
        if not line.startswith('time="'):
            self.log.append(json.loads(line))
