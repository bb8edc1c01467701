# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs info`: the tree that is drawn, and that it is the server's."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console

from nbdjobs.cli.exits import ExitCode
from nbdjobs.cli.job_table import JobWatch
from nbdjobs.cli.overview import Edges, Overview, draw, name_of_server
from nbdjobs.cli.session import BlockNode
from tests.cli.conftest import SIZE, Operated

MIB = 1 << 20


def node(name: str, driver: str = "raw", filename: str = "", **more: Any) -> BlockNode:
    options: dict[str, Any] = {"size": MIB, "allocated": 0, "is_read_only": False, **more}
    return BlockNode(name=name, driver=driver, filename=filename, **options)


def graph(*edges: tuple[str, str, str]) -> Mapping[str, Any]:
    """An answer of x-debug-query-block-graph; names of jobs begin with `job:`."""
    names = list(dict.fromkeys(name for parent, _, child in edges for name in (parent, child)))
    numbers = {name: number for number, name in enumerate(names, 1)}
    nodes = [
        {
            "id": numbers[name],
            "type": "block-job" if name.startswith("job:") else "block-driver",
            "name": name.removeprefix("job:"),
        }
        for name in names
    ]
    return {
        "nodes": [*nodes, {"id": 99, "type": "block-backend", "name": ""}],
        "edges": [
            *(
                {"parent": numbers[parent], "child": numbers[child], "name": edge}
                for parent, edge, child in edges
            ),
            *({"parent": 99, "child": 1, "name": "root"} for _ in range(1)),
        ],
    }


def lines(
    nodes: list[BlockNode],
    edges: Mapping[str, Any] | None,
    *,
    exports: tuple[str, ...] = (),
    jobs: tuple[str, ...] = (),
) -> list[str]:
    overview = Overview(
        server="server",
        exports=[
            {"id": f"e-{name}", "type": "nbd", "node-name": name, "shutting-down": False}
            for name in exports
        ],
        jobs=JobWatch().rows(
            0.0,
            [
                {
                    "id": name,
                    "type": "backup",
                    "status": "running",
                    "current-progress": 1,
                    "total-progress": 4,
                }
                for name in jobs
            ],
            [],
        ),
        nodes={each.name: each for each in nodes},
        edges=Edges.from_qmp(edges),
    )
    output = io.StringIO()
    Console(file=output, width=200).print(draw(overview))
    return [line.rstrip() for line in output.getvalue().splitlines()]


def test_an_export_leads_down_to_the_file() -> None:
    nodes = [node("disk"), node("f", "file", "/a.img", is_read_only=True)]
    assert lines(nodes, graph(("disk", "file", "f")), exports=("disk",)) == [
        "server",
        "└── export e-disk (nbd)",
        "    └── disk: raw, 1.0 MiB",
        "        └── file ▸ f: file, 1.0 MiB, read-only, /a.img",
    ]


def test_a_job_shows_each_of_its_nodes_once_and_points_at_what_is_above() -> None:
    edges = graph(
        ("disk", "file", "f"),
        ("job:j", "main node", "disk"),
        ("job:j", "target", "t"),
        ("job:j", "source", "disk"),
    )
    nodes = [node("disk"), node("f", "file"), node("t", "null-co", "json:{}")]
    assert lines(nodes, edges, exports=("disk",), jobs=("j",)) == [
        "server",
        "├── export e-disk (nbd)",
        "│   └── disk: raw, 1.0 MiB",
        "│       └── file ▸ f: file, 1.0 MiB",
        "└── job j (backup, running, 25 %)",
        "    ├── main node ▸ disk (see above)",
        "    └── target ▸ t: null-co, 1.0 MiB",
    ]


def test_nodes_that_nobody_uses_are_drawn_last_from_their_tops() -> None:
    nodes = [node("f", "file"), node("disk"), node("lone", "null-co")]
    assert lines(nodes, graph(("disk", "file", "f"))) == [
        "server",
        "└── not used by an export or job",
        "    ├── disk: raw, 1.0 MiB",
        "    │   └── file ▸ f: file, 1.0 MiB",
        "    └── lone: null-co, 1.0 MiB",
    ]


def test_without_edges_all_nodes_are_still_there() -> None:
    assert lines([node("disk"), node("f", "file")], None, exports=("disk",)) == [
        "server",
        "├── export e-disk (nbd)",
        "│   └── disk: raw, 1.0 MiB",
        "└── not used by an export or job",
        "    └── f: file, 1.0 MiB",
    ]


def test_an_export_whose_node_has_just_gone_is_drawn() -> None:
    assert lines([], graph(("a", "file", "b")), exports=("gone",))[-1] == "    └── gone"


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("nbdjobs 0.1.0", "nbdjobs 0.1.0"),
        ("Debian 1:7.2", "QEMU 7.2.0 Debian 1:7.2"),
        ("", "QEMU 7.2.0"),
    ],
)
def test_servers_have_names(package: str, name: str) -> None:
    version = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": package}
    assert name_of_server(version) == name


def test_the_tree_of_a_server(operated: Operated, capsys: pytest.CaptureFixture[str]) -> None:
    assert operated.run("info") == ExitCode.DONE
    first, *rest = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert first.endswith(f" at {operated.socket}")
    assert first.startswith("nbdjobs " if operated.is_ours else "QEMU ")
    path = operated.disk.path
    assert rest == [
        "└── export export-disk0 (nbd)",
        "    └── disk0: raw, 4.0 MiB",
        f"        └── file ▸ disk0-file: file, 4.0 MiB, {path}",
    ]


def test_a_running_backup_is_in_the_tree(
    operated: Operated, capsys: pytest.CaptureFixture[str]
) -> None:
    operated.start_job(filter_node_name="cbw")
    assert operated.run("info") == ExitCode.DONE
    text = capsys.readouterr().out
    assert "job j (backup, running, " in text
    assert "cbw: copy-before-write, 4.0 MiB" in text
    assert "nowhere: null-co, 4.0 MiB" in text
    assert text.count("disk0-file: file") == 1


def test_what_holds_clients_up_is_in_the_tree(
    operated: Operated, capsys: pytest.CaptureFixture[str]
) -> None:
    if not operated.is_ours:
        pytest.skip("qemu-storage-daemon neither stops clients nor limits them")
    rates = dict.fromkeys(("bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    operated.execute("block_set_io_throttle", {"id": "export-disk0", "bps": MIB, **rates})
    operated.execute("stop")
    assert operated.run("info") == ExitCode.DONE
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith(f" at {operated.socket} (clients are stopped)")
    assert second == "└── export export-disk0 (nbd, at most 1.0 MiB/s)"
    assert operated.run("info", "--json") == ExitCode.DONE
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "paused"
    [export] = found["exports"]
    assert export["limits"] == {"bps": MIB, "group": "export-disk0"}
    assert export["io-status"] is None


def test_programs_read_json(operated: Operated, capsys: pytest.CaptureFixture[str]) -> None:
    assert operated.run("info", "--json") == ExitCode.DONE
    found = json.loads(capsys.readouterr().out)
    assert found["jobs"] == []
    assert found["status"] == ("running" if operated.is_ours else None)
    [export] = found["exports"]
    assert (export["id"], export["node-name"]) == ("export-disk0", "disk0")
    nodes = {each["node-name"]: each for each in found["nodes"]}
    assert nodes["disk0"]["children"] == [{"name": "file", "node-name": "disk0-file"}]
    assert nodes["disk0-file"]["size"] == SIZE
    assert nodes["disk0-file"]["driver"] == "file"
