# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Latency histograms of devices: which ones are kept; `query-blockstats` shows them.

Source: QEMU qapi/block.json (block-latency-histogram-set).
"""

from __future__ import annotations

from dataclasses import dataclass

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.errors import CommandError
from nbdjobs.nodes.accounting import Account
from nbdjobs.nodes.latency import Histogram
from nbdjobs.qapi.types import Uint64
from nbdjobs.qmp.registry import command


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLatencyHistogramSet:
    """Arguments of block-latency-histogram-set.

    Attributes:
        id: An export, or a named device.
        boundaries: For all kinds of requests; in nanoseconds, ascending from above 0.
        boundaries_read: For reads instead.
        boundaries_write: For writes instead.
        boundaries_flush: For flushes instead.
    """

    id: str
    boundaries: list[Uint64] | None = None
    boundaries_read: list[Uint64] | None = None
    boundaries_write: list[Uint64] | None = None
    boundaries_flush: list[Uint64] | None = None


@command("block-latency-histogram-set")
def block_latency_histogram_set(daemon: Daemon, arguments: BlockLatencyHistogramSet) -> None:
    """Begin histograms, with empty bins, or end all of them if no boundaries are given.

    A kind without boundaries keeps what it has; nothing has changed after an error.
    """
    device = daemon.find_device(arguments.id)
    accounts = device.accounting
    asked = {
        "read": (accounts.read, arguments.boundaries_read),
        "write": (accounts.write, arguments.boundaries_write),
        "flush": (accounts.flush, arguments.boundaries_flush),
    }
    new: list[tuple[Account, Histogram]] = []
    for kind, (account, own) in asked.items():
        boundaries = arguments.boundaries if own is None else own
        if boundaries is None:
            continue
        try:
            new.append((account, Histogram(boundaries)))
        except ValueError as error:
            raise CommandError(f"Device '{arguments.id}' set {kind} boundaries fail") from error
    for account, histogram in new:
        account.histogram = histogram
    if not new:
        for account, _ in asked.values():
            account.histogram = None
