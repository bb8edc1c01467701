# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`host_device`: a disk that is a block device of this machine."""

from __future__ import annotations

from typing import ClassVar

from nbdjobs.nodes.file import FileNode
from nbdjobs.nodes.storage import DeviceStorage, FileStorage


class HostDeviceNode(FileNode):
    """The driver `host_device`; takes the same options as `file`."""

    driver: ClassVar[str] = "host_device"
    storage_type: ClassVar[type[FileStorage]] = DeviceStorage

    @property
    def is_rotational(self) -> bool:
        """Whether the kernel says that the device is a spinning disk."""
        return isinstance(self._storage, DeviceStorage) and self._storage.is_rotational
