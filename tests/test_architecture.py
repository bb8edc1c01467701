# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The folders are the architecture: imports go downwards only, and every file says its licence."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nbdjobs"

LAYERS = (
    ("errors",),
    ("qapi", "eager"),
    ("protocol",),
    ("nodes",),
    ("jobs",),
    ("daemon",),
    ("qmp",),
    ("cli",),
    ("__main__",),
)
"""From the bottom to the top; what stands in one line does not know each other."""

HEADER = "# SPDX-FileCopyrightText: The nbdjobs authors\n# SPDX-License-Identifier: Apache-2.0\n"

RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def layer_of(module: str) -> str:
    """`nbdjobs.nodes.graph` is in the layer `nodes`."""
    return module.split(".")[1]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """The modules of nbdjobs that a file imports, wherever in it, also for types only."""
    package = module_name(path)
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match statement:
            case ast.Import(names=names):
                yield from (name.name for name in names if name.name.startswith("nbdjobs."))
            case ast.ImportFrom(module=module, level=level, names=names):
                base = absolute(package, module, level)
                if base == "nbdjobs":
                    yield from (f"nbdjobs.{name.name}" for name in names)
                elif base.startswith("nbdjobs."):
                    yield base


def absolute(package: str, module: str | None, level: int) -> str:
    """What `from ..module import` means in a package."""
    if not level:
        return module or ""
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - level + 1], *([module] if module else [])])


def forbidden_imports(path: Path) -> list[str]:
    own = layer_of(module_name(path))
    return [
        imported
        for imported in imports(path)
        if layer_of(imported) in RANK
        and layer_of(imported) != own
        and RANK[layer_of(imported)] >= RANK[own]
    ]


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
OURS = sorted(
    path
    for folder in ("nbdjobs", "tests", "benchmarks", "docker", "docs")
    for path in chain((ROOT / folder).rglob("*.py"), (ROOT / folder).rglob("*.sh"))
)


def test_every_module_belongs_to_a_layer() -> None:
    assert {layer_of(module_name(path)) for path in MODULES} <= set(RANK)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_down_only(path: Path) -> None:
    assert not forbidden_imports(path)


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_begins_with_its_licence(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if text.startswith("#!"):
        text = text.partition("\n")[2]
    assert text.startswith(HEADER)


@pytest.mark.parametrize(
    ("statement", "is_forbidden"),
    [
        ("import nbdjobs.jobs.job", True),
        ("from nbdjobs.cli import main", True),
        ("from nbdjobs import jobs", True),
        ("from ..jobs import job", True),
        ("def late():\n    from nbdjobs.daemon import objects", True),
        ("from nbdjobs.errors import NodeError", False),
        ("from nbdjobs import errors, eager", False),
        ("from . import graph", False),
        ("from ..protocol.export import Export", False),
        ("from nbdjobs.nodes.node import Node", False),
        ("import asyncio", False),
    ],
)
def test_the_check_itself_sees_imports_of_every_form(
    statement: str, is_forbidden: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "nbdjobs" / "nodes" / "example.py"
    path.parent.mkdir(parents=True)
    path.write_text(statement, encoding="utf-8")
    assert bool(forbidden_imports(path)) == is_forbidden
