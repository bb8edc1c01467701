# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Words for people about images. Pure, but for the time zone."""

from __future__ import annotations

from datetime import datetime

from nbdjobs.qmp.commands.snapshot_info import SnapshotInfo


def date_of(snapshot: SnapshotInfo) -> str:
    """When a snapshot was taken, in local time."""
    return datetime.fromtimestamp(snapshot.date_sec).strftime("%Y-%m-%d %H:%M:%S")
