# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Passwords and keys by the names that options have for them.

Source: QEMU `include/crypto/secret.h` for what is a secret, and its storage daemon for the words.
"""

from __future__ import annotations

from nbdjobs.errors import CommandError


class Secrets:
    """What user-created objects tell in confidence; never shown, never logged."""

    def __init__(self) -> None:
        self._contents: dict[str, bytes | None] = {}

    def add(self, name: str, content: bytes | None) -> None:
        """Enter an object; `content` is None for one that is no secret."""
        self._contents[name] = content

    def remove(self, name: str) -> None:
        """Forget an object that was entered."""
        del self._contents[name]

    def find(self, name: str) -> bytes:
        """The content of a secret.

        Raises:
            CommandError: There is no object of that name, or it is no secret.
        """
        if name not in self._contents:
            raise CommandError(f"No secret with id '{name}'")
        content = self._contents[name]
        if content is None:
            raise CommandError(f"Object with id '{name}' is not a secret")
        return content

    def find_required_password(self, name: str | None, prefix: str = "") -> bytes:
        """Like `find_password`, where something encrypted cannot do without.

        Args:
            name: What the option `key-secret` says.
            prefix: What stands before the name of that option, such as "encrypt.".
        """
        if name is None:
            raise CommandError(f"Parameter '{prefix}key-secret' is required for cipher")
        return self.find_password(name)

    def find_password(self, name: str) -> bytes:
        """The content of a secret that has to be text: UTF-8 without zero bytes.

        Raises:
            CommandError: As for `find`, or it is no text.
        """
        content = self.find(name)
        try:
            content.decode()
        except UnicodeDecodeError:
            is_text = False
        else:
            is_text = b"\0" not in content
        if not is_text:
            raise CommandError(f"Data from secret {name} is not valid UTF-8")
        return content
