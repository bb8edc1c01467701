# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Where a backup goes: a new file, a block device, or a node that the server has already.

A file is written as `NAME.partial` and gets its name when the backup is complete and on stable
storage. So a file with the name of a backup always is one: neither a crash nor a failure leaves
half a backup under it, and with `--force` the old backup stays until the new one is there.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from nbdjobs.cli.exits import CliError
from nbdjobs.cli.locks import is_used
from nbdjobs.cli.units import format_size

#: What names a node instead of a path.
NODE_PREFIX: Final = "node:"

PARTIAL_SUFFIX: Final = ".partial"


class Target(Protocol):
    """A place for a backup, prepared; exactly one of `publish` and `discard` ends it."""

    @property
    def label(self) -> str:
        """What the user calls it."""

    def node_options(self, node_name: str) -> dict[str, object] | None:
        """Arguments of `blockdev-add` that open it; None when a node is there already."""

    def publish(self) -> None:
        """The backup is complete and the server has closed the target: keep it, durably."""

    def discard(self) -> None:
        """The backup failed or was cancelled: leave nothing that was made for it."""


@dataclass(frozen=True, slots=True)
class NodeTarget:
    """A node of the server; it belongs to whoever added it and stays as it is."""

    name: str

    @property
    def label(self) -> str:
        """What the user calls it."""
        return f"{NODE_PREFIX}{self.name}"

    def node_options(self, node_name: str) -> dict[str, object] | None:
        """It is open already."""
        return None

    def publish(self) -> None:
        """Nothing to do."""

    def discard(self) -> None:
        """Nothing to do."""


@dataclass(frozen=True, slots=True)
class DeviceTarget:
    """A block device as large as the source, whose content the user agreed to lose."""

    path: Path

    @property
    def label(self) -> str:
        """What the user calls it."""
        return str(self.path)

    def node_options(self, node_name: str) -> dict[str, object]:
        """Arguments of `blockdev-add` that open it."""
        return _options("host_device", node_name, self.path)

    def publish(self) -> None:
        """Wait until it is on the device."""
        _sync(self.path)

    def discard(self) -> None:
        """Nothing to do: what was on the device is lost already."""


@dataclass(frozen=True, slots=True)
class FileTarget:
    """A new sparse raw file.

    Attributes:
        path: Its name once the backup is complete.
        partial: Its name until then.
        is_replacing: A file that has the name is to be replaced.
    """

    path: Path
    partial: Path
    is_replacing: bool

    @property
    def label(self) -> str:
        """What the user calls it."""
        return str(self.path)

    def node_options(self, node_name: str) -> dict[str, object]:
        """Arguments of `blockdev-add` that open it."""
        return _options("file", node_name, self.partial)

    def publish(self) -> None:
        """Give it its name, after its content is on stable storage.

        Raises:
            CliError: The name was taken meanwhile, or the disk failed; the message says where
                the backup is.
        """
        try:
            _sync(self.partial)
            if self.is_replacing:
                self.partial.replace(self.path)
            else:
                _rename_new(self.partial, self.path)
            _sync(self.path.parent)
        except OSError as error:
            raise CliError(
                f"the backup is complete but could not be named '{self.path}'"
                f" ({error.strerror}): it is in '{self.partial}'"
            ) from error

    def discard(self) -> None:
        """Remove the half-written file."""
        self.partial.unlink(missing_ok=True)


def _options(driver: str, node_name: str, path: Path) -> dict[str, object]:
    # Unmap: what the source has as a hole is one on the target too.
    return {"driver": driver, "node-name": node_name, "filename": str(path), "discard": "unmap"}


def prepare(text: str, *, size: int, is_forced: bool, in_use: Collection[str]) -> Target:
    """Check a target and make its file.

    Args:
        text: What the user named: a path, or `node:NAME`.
        size: Bytes that it has to have.
        is_forced: An existing file or device may lose its content.
        in_use: Paths that the server has open.

    Raises:
        CliError: It cannot be the target of this backup; nothing was made.
    """
    target = look_at(text, size=size, is_forced=is_forced, in_use=in_use)
    if isinstance(target, DeviceTarget):
        _check_device(target.path, os.O_RDWR, size=size)
    if isinstance(target, FileTarget):
        _make(target, size=size)
    return target


def look_at(text: str, *, size: int, is_forced: bool, in_use: Collection[str]) -> Target:
    """Check a target as far as that is possible without making or writing anything.

    Arguments and errors are those of `prepare`.
    """
    if text.startswith(NODE_PREFIX):
        return NodeTarget(text.removeprefix(NODE_PREFIX))
    path = Path(os.path.realpath(text))
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return _check_new(path, is_replacing=False)
    except OSError as error:
        raise CliError(f"the target '{path}' cannot be used: {error.strerror}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise CliError(f"the target '{path}' must be a new file, a regular file or a block device")
    if any(_is_same(path, other) for other in in_use):
        raise CliError(f"the target '{path}' is in use by the server itself: choose another file")
    if not is_forced:
        raise CliError(f"the target '{path}' exists: choose a new file, or replace it with --force")
    if stat.S_ISBLK(mode):
        return _check_device(path, os.O_RDONLY, size=size)
    if _is_in_use(path):
        raise CliError(f"the target '{path}' is in use by another program: choose another file")
    return _check_new(path, is_replacing=True)


def _check_new(path: Path, *, is_replacing: bool) -> FileTarget:
    """Look whether a file can be made, and whether its name until it is complete is free."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    if os.path.lexists(partial):
        raise _is_running(partial)
    try:
        path.parent.stat()
    except OSError as error:
        raise _cannot_be_made(path, error) from error
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _cannot_be_made(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return FileTarget(path, partial, is_replacing)


def _make(target: FileTarget, *, size: int) -> None:
    path, partial = target.path, target.partial
    try:
        # Only its owner may read it: it holds whatever the disk held.
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise _is_running(partial) from error
    except OSError as error:
        raise _cannot_be_made(path, error) from error
    try:
        os.truncate(descriptor, size)
    except OSError as error:
        partial.unlink()
        raise CliError(
            f"the target '{path}' cannot be made {format_size(size)} large: {error.strerror}"
        ) from error
    finally:
        os.close(descriptor)


def _is_running(partial: Path) -> CliError:
    return CliError(
        f"'{partial}' exists: a backup to this file is running or was cut off;"
        " remove it if none is running"
    )


def _cannot_be_made(path: Path, error: OSError) -> CliError:
    return CliError(f"the target '{path}' cannot be made: {error.strerror}")


def _check_device(path: Path, mode: int, *, size: int) -> DeviceTarget:
    try:
        # For a block device O_EXCL means: refused while it is mounted or part of another device.
        descriptor = os.open(path, mode | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        raise CliError(f"the target '{path}' cannot be opened: {error.strerror}") from error
    try:
        found = os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)
    if found != size:
        raise CliError(f"the target '{path}' has {found} bytes: expected {size} as the source")
    return DeviceTarget(path)


def _is_same(path: Path, other: str) -> bool:
    try:
        first, second = path.stat(), Path(other).stat()
    except (OSError, ValueError):
        return False  # the name of a node that is no file: a URI, JSON, or gone
    if stat.S_ISBLK(first.st_mode) and stat.S_ISBLK(second.st_mode):
        return first.st_rdev == second.st_rdev
    return os.path.samestat(first, second)


def _is_in_use(path: Path) -> bool:
    try:
        return is_used(path)
    except OSError as error:
        raise CliError(f"the target '{path}' cannot be opened: {error.strerror}") from error


def _rename_new(old: Path, new: Path) -> None:
    """Rename, and fail if the new name is taken: a link never replaces, a rename always does."""
    try:
        os.link(old, new)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        # A file system without hard links: the moment between look and rename has to be accepted.
        if new.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        old.rename(new)
    else:
        old.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
