# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""From measured values to a markdown table, with ratios and marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.peers import OURS
from benchmarks.rows import Better, Row

#: Stands where a peer cannot take part.
NOTHING = "—"
BELOW = "**below**"


@dataclass(frozen=True, slots=True)
class Line:
    """A row with what was measured: each peer's values, one for each round."""

    row: Row
    values: Mapping[str, Sequence[float]]

    def cell(self, peer: str) -> float | None:
        """Return the median of a peer's values, or None when it has none."""
        values = self.values.get(peer)
        return median(values) if values else None

    def ratio(self) -> float | None:
        """Return how far nbdjobs is ahead of the best peer: above 1 is better, in every row."""
        ours = self.cell(OURS)
        others = [cell for peer in self.values if peer != OURS and (cell := self.cell(peer))]
        if not ours or not others:
            return None
        if self.row.better is Better.HIGHER:
            return ours / max(others)
        return min(others) / ours

    def is_below_target(self) -> bool:
        """Whether nbdjobs was measured and misses what the row asks for."""
        ours, ratio = self.cell(OURS), self.ratio()
        misses_ratio = self.row.target is not None and ratio is not None and ratio < self.row.target
        misses_limit = self.row.limit is not None and ours is not None and ours > self.row.limit
        return misses_ratio or misses_limit


def markdown(lines: Sequence[Line], peers: Sequence[str]) -> str:
    """Return the table; columns in the order of ``peers``."""
    header = ["", "unit", *peers, "ratio", "target", ""]
    alignment = ["---", "---", *("---:" for _ in peers), "---:", "---:", "---"]
    body = [_cells(line, peers) for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, alignment, *body])


def _cells(line: Line, peers: Sequence[str]) -> list[str]:
    ratio = line.ratio()
    return [
        line.row.title,
        line.row.unit,
        *(number(line.cell(peer)) for peer in peers),
        NOTHING if ratio is None else f"{ratio:.2f}",
        _target(line.row),
        BELOW if line.is_below_target() else "",
    ]


def _target(row: Row) -> str:
    if row.limit is not None:
        return f"≤ {row.limit:g} {row.unit}"
    return NOTHING if row.target is None else f"≥ {row.target:.1f}"


def number(value: float | None) -> str:
    """Return a value with as many digits as mean something."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
