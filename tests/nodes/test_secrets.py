# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The table of secrets that drivers look into."""

from __future__ import annotations

import pytest

from nbdjobs.errors import CommandError
from nbdjobs.nodes.secrets import Secrets


def refusal(secrets: Secrets, name: str) -> str:
    with pytest.raises(CommandError) as caught:
        secrets.find_password(name)
    return caught.value.description


def test_a_secret_is_found_until_it_is_removed() -> None:
    secrets = Secrets()
    secrets.add("s", b"\xff")
    assert secrets.find("s") == b"\xff"
    secrets.remove("s")
    assert refusal(secrets, "s") == "No secret with id 's'"


def test_other_objects_are_no_secrets() -> None:
    secrets = Secrets()
    secrets.add("thread", None)
    assert refusal(secrets, "thread") == "Object with id 'thread' is not a secret"


def test_a_password_is_text() -> None:
    secrets = Secrets()
    secrets.add("empty", b"")
    secrets.add("word", "schön".encode())
    assert secrets.find_password("empty") == b""
    assert secrets.find_password("word") == "schön".encode()
    for name, content in {"latin": b"sch\xf6n", "zero": b"a\0b"}.items():
        secrets.add(name, content)
        assert refusal(secrets, name) == f"Data from secret {name} is not valid UTF-8"
