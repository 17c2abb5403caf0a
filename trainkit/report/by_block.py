"""What was measured block by block, at every look: the numbers behind figures by depth."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

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


def name_places(axis: Any, names: list[str], label: str = "block  (input → output)") -> None:
    """Ticks at places 0, 1, …, with at most 13 of their names."""
    axis.set_label_text(label)
    step = -(-len(names) // 13)
    axis.set_ticks(range(0, len(names), step), names[::step])
