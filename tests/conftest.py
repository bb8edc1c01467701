# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Lets the assertions in helper modules tell as much as those in tests do."""

from __future__ import annotations

import pytest

# Before any test module imports them, hence in the outermost conftest.
pytest.register_assert_rewrite(
    "tests.daemon.rig",
    "tests.docker.container",
    "tests.hardening.raw",
    "tests.hardening.victim",
    "tests.interop.daemon",
    "tests.interop.tools",
    "tests.jobs.rig",
    "tests.nodes.graphs",
    "tests.protocol.client",
    "tests.protocol.rig",
    "tests.stress.machine",
    "tests.stress.writers",
)
