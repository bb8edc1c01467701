# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Commands about chains of images, to be sent to both daemons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tests.interop.command_cases import (
    JOBS,
    MIB,
    Ask,
    Step,
    Until,
    add,
    ask,
    delete,
    export,
    gone,
    serve,
    unexport,
    until,
)


def stream(job: str | None = "job", /, **options: Any) -> Ask:
    named = {} if job is None else {"job_id": job}
    return ask("block-stream", **named, **{"device": "top", **options})


def commit(job: str | None = "job", /, **options: Any) -> Ask:
    named = {} if job is None else {"job_id": job}
    return ask("block-commit", **named, **{"device": "top", **options})


def drive(**options: Any) -> Ask:
    given = {"job_id": "job", "device": "top", "target": "target.qcow2", **options}
    return ask("drive-backup", **given)


def snapshot(node: str, overlay: str, /, **options: Any) -> Ask:
    """A new overlay in a file of its node's name."""
    return ask(
        "blockdev-snapshot-sync",
        node_name=node,
        snapshot_file=f"{overlay}.qcow2",
        snapshot_node_name=overlay,
        **options,
    )


#: Three images above a raw one, and a node that has nothing to do with them.
CHAIN: Final = [
    add("raw", "base", file={"driver": "file", "filename": "disk.img"}),
    serve(),
    export("base", writable=True),
    snapshot("base", "low"),
    snapshot("low", "mid"),
    snapshot("mid", "top"),
    add("null-co", "x", size=MIB),
]

SCENARIOS: Final[Mapping[str, Sequence[Step]]] = {
    "refusals of stream": [
        *CHAIN,
        stream(device="nope"),
        stream(base="a", base_node="b"),
        stream(base="a", bottom="b"),
        stream(base_node="a", bottom="b"),
        stream(base="nope"),
        stream(base_node="nope"),
        stream(base_node="x"),
        stream(base_node="top"),
        stream(bottom="nope"),
        stream(bottom="x"),
        stream(backing_file="f"),
        stream(bottom="mid", backing_file="f"),
        stream(None),
        stream("1"),
        stream(speed=-1),
        stream(filter_node_name="mid"),
        stream(on_error="nonsense"),
        Ask("block-stream", {"job-id": "j"}),
    ],
    "streaming": [
        *CHAIN,
        stream(base_node="mid"),
        until("null"),
        stream(speed=1, filter_node_name="flt"),
        stream("other"),
        stream("other", device="mid"),
        *JOBS,
        ask("block-job-cancel", device="job"),
        until("null"),
        stream(base="base"),
        stream(base="disk.img", backing_file="disk.img"),
        until("null"),
        stream(),
        until("null"),
        unexport(),
        gone(),
        delete("base"),
    ],
    "refusals of commit": [
        *CHAIN,
        commit(device="nope"),
        commit(top="a", top_node="b"),
        commit(top_node="nope"),
        commit(top_node="x"),
        commit(top="nope"),
        commit(base="a", base_node="b"),
        commit(base="nope"),
        commit(base_node="nope"),
        commit(base_node="x"),
        commit(base_node="top"),
        commit(top_node="base", base_node="base"),
        commit(top_node="base"),
        commit(device="x"),
        commit(device="mid"),
        commit(backing_file="f"),
        commit(None),
        commit(None, top_node="mid"),
        commit(speed=-1),
        commit(top_node="mid", speed=-1),
        commit(filter_node_name="mid"),
        commit(on_error="nonsense"),
        Ask("block-commit", {"job-id": "j"}),
    ],
    "committing": [
        *CHAIN,
        commit(top_node="mid", base_node="low"),
        until("null"),
        commit(top="low.qcow2", base="disk.img"),
        until("null"),
        commit(),
        Until("BLOCK_JOB_READY", {"device": "job"}),
        *JOBS,
        ask("block-job-cancel", device="job"),
        until("null"),
        commit(auto_dismiss=False, auto_finalize=False),
        Until("BLOCK_JOB_READY", {"device": "job"}),
        ask("job-complete", id="job"),
        Until("BLOCK_JOB_PENDING", {"id": "job"}),
        ask("job-finalize", id="job"),
        until("concluded"),
        *JOBS,
        ask("job-dismiss", id="job"),
        unexport(),
        gone(),
        delete("base"),
    ],
    "snapshots by overlays": [
        *CHAIN,
        ask("blockdev-snapshot", node="nope", overlay="top"),
        ask("blockdev-snapshot", node="top", overlay="nope"),
        ask("blockdev-snapshot", node="top", overlay="top"),
        ask("blockdev-snapshot", node="top", overlay="x"),
        ask("blockdev-snapshot", node="low", overlay="top"),
        ask("blockdev-snapshot", node="top", overlay="mid"),
        ask("blockdev-snapshot-sync", snapshot_file="a"),
        ask("blockdev-snapshot-sync", snapshot_file="a", device="nope"),
        ask("blockdev-snapshot-sync", snapshot_file="a", node_name="nope"),
        ask("blockdev-snapshot-sync", snapshot_file="a", node_name="top"),
        snapshot("top", "mid"),
        snapshot("top", "1"),
        snapshot("top", "new", format="nope"),
        snapshot("top", "new", format="raw"),
        snapshot("top", "new", mode="existing"),
        snapshot("top", "new", mode="nonsense"),
        snapshot("low", "new"),
        ask(
            "blockdev-snapshot-sync",
            node_name="top",
            snapshot_file="nowhere/new",
            snapshot_node_name="new",
        ),
        snapshot("x", "new"),
        delete("x"),
    ],
    "names of backing files": [
        *CHAIN,
        ask("change-backing-file", device="nope", image_node_name="top", backing_file="f"),
        ask("change-backing-file", device="top", image_node_name="nope", backing_file="f"),
        ask("change-backing-file", device="top", image_node_name="x", backing_file="f"),
        ask("change-backing-file", device="top", image_node_name="base", backing_file="f"),
        ask("change-backing-file", device="mid", image_node_name="mid", backing_file="f"),
        ask("change-backing-file", device="top", image_node_name="mid", backing_file="f"),
        ask("change-backing-file", device="top", image_node_name="mid", backing_file="y" * 1024),
        ask("change-backing-file", device="top", image_node_name="top", backing_file=""),
    ],
    "backups of chains to files": [
        *CHAIN,
        drive(sync="top", format="raw"),
        drive(sync="top"),
        until("null"),
        drive(sync="top", mode="existing"),
        until("null"),
        drive(sync="none"),
        ask("block-job-cancel", device="job"),
        until("null"),
        drive(sync="none", format="raw", mode="existing", target="target.img"),
    ],
    "copy-on-read": [
        *CHAIN,
        add("copy-on-read", "cor", file="top", bottom="nope"),
        add("copy-on-read", "cor", file="top", bottom="mid"),
        add("copy-on-read", "other", file="cor", bottom="cor"),
        add("copy-on-read", "cor"),
        delete("cor"),
    ],
}
