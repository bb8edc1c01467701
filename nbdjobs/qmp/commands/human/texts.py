# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""How the human monitor writes about devices, nodes, images and jobs. Pure.

Scripts read these lines, so they are QEMU's to the letter. Times of snapshots are local ones.

Source: output of QEMU 7.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import datetime
from typing import Final

from nbdjobs.jobs.status import JobType
from nbdjobs.nodes.config import DetectZeroes
from nbdjobs.nodes.error_policy import IoStatus
from nbdjobs.qapi.visitor import to_qapi
from nbdjobs.qmp.commands.block_info import BlockDeviceInfo, BlockInfo, BlockStats, ImageInfo
from nbdjobs.qmp.commands.jobs import BlockJobInfo
from nbdjobs.qmp.commands.snapshot_info import SnapshotInfo

_PREFIXES: Final = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")

_LIMITS: Final = (
    *("bps", "bps_rd", "bps_wr", "bps_max", "bps_rd_max", "bps_wr_max"),
    *("iops", "iops_rd", "iops_wr", "iops_max", "iops_rd_max", "iops_wr_max", "iops_size"),
)
_COUNTERS: Final = (
    *("rd_bytes", "wr_bytes", "rd_operations", "wr_operations", "flush_operations"),
    *("wr_total_time_ns", "rd_total_time_ns", "flush_total_time_ns", "rd_merged", "wr_merged"),
    "idle_time_ns",
)


def device_text(info: BlockInfo, *, is_verbose: bool) -> str:
    """A device, and what is in it."""
    title = info.device or info.qdev or "<anonymous>"
    if info.inserted is None:
        lines = [f"{title}: [not inserted]"]
    elif info.device:
        lines = [_title(f"{title} ({info.inserted.node_name})", info.inserted)]
    else:
        lines = [_title(info.inserted.node_name or title, info.inserted)]
    if info.qdev is not None:
        lines.append(f"    Attached to:      {info.qdev}")
    if info.io_status not in (None, IoStatus.OK):
        lines.append(f"    I/O status:       {info.io_status}")
    if info.removable:
        locked = "locked" if info.locked else "not locked"
        lines.append(
            f"    Removable device: {locked}, tray {'open' if info.tray_open else 'closed'}"
        )
    if info.inserted is not None:
        lines += _inserted(info.inserted, is_verbose=is_verbose)
    return "".join(f"{line}\n" for line in lines)


def node_text(info: BlockDeviceInfo, *, is_verbose: bool) -> str:
    """A node."""
    lines = [_title(info.node_name or "<anonymous>", info)]
    lines += _inserted(info, is_verbose=is_verbose)
    return "".join(f"{line}\n" for line in lines)


def _title(name: str, info: BlockDeviceInfo) -> str:
    marks = ", read-only" if info.ro else ""
    marks += ", encrypted" if info.encrypted else ""
    return f"{name}: {info.file} ({info.drv}{marks})"


def _inserted(info: BlockDeviceInfo, *, is_verbose: bool) -> Iterator[str]:
    cache = info.cache
    mode = "writeback" if cache.writeback else "writethrough"
    mode += ", direct" if cache.direct else ""
    mode += ", ignore flushes" if cache.no_flush else ""
    yield f"    Cache mode:       {mode}"
    if info.backing_file is not None:
        yield (
            f"    Backing file:     {info.backing_file} (chain depth: {info.backing_file_depth})"
        )
    if info.detect_zeroes is not DetectZeroes.OFF:
        yield f"    Detect zeroes:    {info.detect_zeroes}"
    if any((info.bps, info.bps_rd, info.bps_wr, info.iops, info.iops_rd, info.iops_wr)):
        limits = " ".join(f"{name}={getattr(info, name) or 0}" for name in _LIMITS)
        yield f"    I/O throttling:   {limits} group={info.group}"
    if not is_verbose:
        return
    yield ""
    yield "Images:"
    image: ImageInfo | None = info.image
    while image is not None:
        yield from _image(image)
        image = image.backing_image


def _image(image: ImageInfo) -> Iterator[str]:
    yield f"image: {image.filename}"
    yield f"file format: {image.format}"
    yield f"virtual size: {size_text(image.virtual_size)} ({image.virtual_size} bytes)"
    if image.actual_size is None:
        yield "disk size: unavailable"
    else:
        yield f"disk size: {size_text(image.actual_size)}"
    if image.encrypted:
        yield "encrypted: yes"
    if image.cluster_size is not None:
        yield f"cluster_size: {image.cluster_size}"
    if image.dirty_flag:
        yield "cleanly shut down: no"
    if image.backing_filename is not None:
        full = image.full_backing_filename
        actual = f" (actual path: {full})" if full not in (None, image.backing_filename) else ""
        yield f"backing file: {image.backing_filename}{actual}"
        if image.backing_filename_format is not None:
            yield f"backing file format: {image.backing_filename_format}"
    if image.snapshots:
        yield "Snapshot list:"
        yield _snapshot_row("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
        yield from (_snapshot(each) for each in image.snapshots)
    specific = to_qapi(image).get("format-specific")
    if specific is not None:
        yield "Format specific information:"
        yield from tree_lines(specific["data"])


def _snapshot(snapshot: SnapshotInfo) -> str:
    seconds = snapshot.vm_clock_sec
    return _snapshot_row(
        snapshot.id,
        snapshot.name,
        size_text(snapshot.vm_state_size),
        datetime.fromtimestamp(snapshot.date_sec).strftime("%Y-%m-%d %H:%M:%S"),
        f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        f".{snapshot.vm_clock_nsec // 1_000_000:03d}",
        "" if snapshot.icount is None else str(snapshot.icount),
    )


def _snapshot_row(*words: str) -> str:
    number, name, size, date, clock, count = words
    return f"{number:<9} {name:<16} {size:>8}{date:>20}{clock:>13}{count:>11}"


def tree_lines(value: object, depth: int = 1) -> Iterator[str]:
    """What a format has to tell of itself: members and elements, each level further in."""
    if isinstance(value, dict):
        titles = [(name.replace("-", " "), held) for name, held in value.items()]
    elif isinstance(value, list):
        titles = [(f"[{number}]", held) for number, held in enumerate(value)]
    else:
        return
    for title, held in titles:
        has_more = isinstance(held, dict | list)
        yield f"{'    ' * depth}{title}:{'' if has_more else f' {_scalar(held)}'}"
        yield from tree_lines(held, depth + 1)


def _scalar(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def size_text(size: int) -> str:
    """Bytes with three digits, in a unit that leaves less than 1000: `0.977 MiB`."""
    # The exponent of size * 1.024, so that 1000 of a unit are written in the next one.
    power = max(math.frexp(size * 1.024)[1] - 1, 0) // 10
    return f"{size / (1 << 10 * power):.3g} {_PREFIXES[power]}B"


def stats_text(stats: BlockStats) -> str:
    """What was done to a device, in one line."""
    counters = " ".join(f"{name}={getattr(stats.stats, name) or 0}" for name in _COUNTERS)
    return f"{stats.device or stats.qdev}: {counters}\n"


def job_text(info: BlockJobInfo) -> str:
    """A job, in one line."""
    progress = f"Completed {info.offset} of {info.len} bytes, speed limit {info.speed} bytes/s\n"
    if info.type is JobType.STREAM:
        return f"Streaming device {info.device}: {progress}"
    return f"Type {info.type}, device {info.device}: {progress}"
