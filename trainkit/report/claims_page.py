"""docs/claims.md: what was measured of each claim, made of the records in docs/claims."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainkit.launch.rundir import read_json
from trainkit.launch.summary import clock, size

DOCS = Path(__file__).resolve().parents[2] / "docs"
MARKS = {"confirmed": "✓ confirmed", "not confirmed": "✗ not confirmed", "inconclusive": "? inconclusive"}


def page(names: Iterable[str]) -> str:
    """The verdicts, then each claim with its numbers; claims without a record are named as unmeasured."""
    records = {name: read_json(DOCS / "claims" / f"{name}.json") for name in names}
    measured = {name: record for name, record in records.items() if record}
    lines = [
        "# Claims, measured in miniature",
        "",
        "Made by `python -m trainkit.report claims` (`make claims`) from `conf/experiment/claims`. Small models, short",
        "runs: what is not confirmed here may hold at scale, and the other way round. Every arm stands at its own best",
        "value of one grid, by mean validation loss; differences are paired by seed; ± is half the width of the 95 %",
        "confidence interval (Student's t). A claim is confirmed where the interval of every difference lies wholly",
        "on the claimed side, not confirmed where one lies wholly on another, and inconclusive otherwise. A best value",
        "at the edge of its grid is marked: a wider grid may change the verdict. Values of the grid are chosen by the",
        "same runs that are then compared.",
        "",
        "| claim | verdict | runs | minutes |",
        "|---|---|---:|---:|",
    ]
    for name, record in measured.items():
        runs = sum(row["runs"] for row in record["outcome"]["arms"].values())
        verdict = MARKS[record["outcome"]["verdict"]]
        lines.append(f"| [{record['claim']}](#{name}) | {verdict} | {runs} | {record['minutes']:.0f} |")
    unmeasured = [name for name in records if name not in measured]
    if unmeasured:
        lines += ["", f"Not measured yet: {', '.join(f'`{name}`' for name in unmeasured)}."]
    for name, record in measured.items():
        lines += ["", *_section(name, record)]
    return "\n".join(lines) + "\n"


def _section(name: str, record: Mapping[str, Any]) -> list[str]:
    outcome, key = record["outcome"], next(iter(record["grid"]))
    first, *_ = record["arms"]
    lines = [
        f"## {name}",
        "",
        f"{record['claim']} ({record['source']}). **{MARKS[outcome['verdict']]}**.",
        "",
        f"Measured: {record['shown']}. Grid: `{key}={','.join(map(str, record['grid'][key]))}`, "
        f"seeds {', '.join(map(str, record['seeds']))}.",
        "",
        f"| arm | best {key} | measured | minus {first} | claimed | validation loss | failed | parameters "
        "| training FLOPs | time per run | optimizer state |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for arm, row in outcome["arms"].items():
        cells = [
            f"`{' '.join(row['words'])}`",
            f"{row[key]}{' (edge)' if row['edge'] else ''}",
            _spread(row["measured"]),
            _spread(outcome["differences"].get(arm), sign=True),
            record["expected"].get(arm, ""),
            _spread(row["loss"]),
            f"{row['failed']} of {row['runs']}",
            "" if row["parameters"] is None else f"{row['parameters']:,}",
            "" if row["training_flops"] is None else f"{row['training_flops']:.3g}",
            clock(row["seconds"]),
            "" if row["optimizer_state_bytes"] is None else size(row["optimizer_state_bytes"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if record.get("caveat"):
        lines += ["", record["caveat"]]
    source, torch = record["versions"].get("git", "unknown"), record["versions"].get("torch", "unknown")
    lines += ["", f"`python -m trainkit.report claims {name}` · {record['minutes']:.0f} minutes of runs"]
    lines[-1] += f" · {record['date']} · {record['hardware']} · torch {torch} · {source}"
    return lines


def _spread(pair: Sequence[float] | None, *, sign: bool = False) -> str:
    if pair is None:
        return ""
    mean, width = pair
    if not math.isfinite(mean):
        return str(mean)
    digits = 3 if not mean else max(0, min(6, 3 - math.floor(math.log10(abs(mean)))))
    return f"{mean:{'+' if sign else ''}.{digits}f} ± {width:.2g}"
