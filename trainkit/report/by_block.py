"""What was measured block by block, at every look: the numbers behind figures by depth."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.report.canvas import write_csv
from trainkit.report.metrics_file import Row

FIRST = "embed"  # what the first block reads, before block 0


@dataclass(frozen=True)
class ByBlock:
    """values: (places, steps), NaN where nothing was logged; places in the order of the network."""

    steps: np.ndarray
    places: list[str]
    values: np.ndarray

    def names(self) -> list[str]:
        """Places as people count them: embed, 0, 1, …"""
        return [place if place == FIRST else ".".join(re.findall(r"\d+", place)) for place in self.places]


def collect(rows: list[Row], kind: str) -> ByBlock | None:
    """Of <kind>/embed, <kind>/blocks.0, …; None where no block's was logged."""
    label = re.compile(rf"{kind}/(?P<place>{FIRST}|blocks\.\d+)$")
    logged = [row for row in rows if any(label.match(name) for name in row)]
    found = {match["place"] for row in logged for name in row if (match := label.match(name))}
    if not found - {FIRST}:
        return None
    places = sorted(found, key=lambda place: -1 if place == FIRST else int(place.removeprefix("blocks.")))
    values = np.array([[float(row.get(f"{kind}/{place}", math.nan)) for row in logged] for place in places])
    return ByBlock(np.array([row["step"] for row in logged]), places, values)


def collect_kinds(rows: list[Row], kinds: Iterable[str]) -> dict[str, ByBlock]:
    """Those of the kinds that were logged."""
    return {kind: one for kind in kinds if (one := collect(rows, kind)) is not None}


def write_looks(path: Path, rows: list[Row], found: Mapping[str, ByBlock]) -> None:
    """All looks as CSV: a column per kind and place."""
    names = [f"{kind}/{place}" for kind, one in found.items() for place in one.places]
    logged = [row for row in rows if any(name in row for name in names)]
    write_csv(path, ["step", *names], ([row["step"], *map(row.get, names)] for row in logged))


def name_places(axis: Any, names: list[str], label: str = "block  (input → output)") -> None:
    """Ticks at places 0, 1, …, with at most 13 of their names."""
    axis.set_label_text(label)
    step = -(-len(names) // 13)
    axis.set_ticks(range(0, len(names), step), names[::step])
