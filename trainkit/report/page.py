"""report.html: what a sweep or a set of runs found, as one file that opens without a network.

Written at the end of every sweep, and by
  python -m trainkit.report DIR [--out FILE]              a sweep or a run; into DIR/report.html unless told otherwise
  python -m trainkit.report compare RUN RUN … [--out FILE]    runs and sweeps side by side; into ./report.html
The numbers of every chart stand in full precision beside it, in the folder of the same name: report/*.csv.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from trainkit.launch.rundir import write_text
from trainkit.report import blocks, curves, tables
from trainkit.report.canvas import write_csv
from trainkit.report.collect import Collection, Run, collect, gather, relative
from trainkit.report.findings import Findings, find, ranked
from trainkit.report.wording import chapter, of_kind, of_site, title, unit

COLOURED = 12  # groups with a colour of their own: the best ones
CONCLUSIONS = {"lr_sensitivity": "Loss against learning rate", "search": "Search"}  # by what draws them
PNG = b"\x89PNG"
LOSSES = ("val/loss", "train/loss", "train/current_loss")
DIGITS = 5  # of a number in the page; the CSV has all


def main(argv: Sequence[str]) -> int:
    """Writes the report and prints where; returns the exit code, 2 for the user's mistake."""
    compare = list(argv[:1]) == ["compare"]
    parser = argparse.ArgumentParser(
        prog="python -m trainkit.report" + " compare" * compare, description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("dirs", metavar="DIR", nargs="+" if compare else 1, type=Path, help="of a sweep or of a run")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="the page to write; its CSVs go into the folder FILE names"
    )
    asked = parser.parse_args(argv[1:] if compare else argv)
    try:
        if asked.out is not None and asked.out.suffix != ".html":
            raise ValueError(f"--out {asked.out} is to be a page; name it *.html")
        if compare:
            missing = [str(path) for path in asked.dirs if not path.is_dir()]
            if missing:
                raise ValueError(f"{', '.join(missing)}: no such directory")
            print(write(gather(asked.dirs), asked.out or Path("report.html")))
        else:
            print(of_directory(asked.dirs[0], asked.out))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def of_directory(directory: Path, out: Path | None = None) -> Path:
    """The report of a sweep or of a run, in its directory unless told otherwise; the path of the page."""
    return write(collect(directory), out or Path(directory) / "report.html")


def write(collection: Collection, out: Path) -> Path:
    """The page and, in the folder of its name, the CSVs."""
    found = find(collection.runs)
    numbers = out.with_suffix("")
    data = _data(found, collection, numbers)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, _html(found, collection, data, out).encode("utf-8", "replace").decode())
    return out


# --- the charts' numbers, in the page and as CSV -------------------------------------------------------------------


def _data(found: Findings, collection: Collection, folder: Path) -> dict[str, Any]:
    """What page.js draws; every number of it goes into a CSV in `folder` too."""
    order = ranked(found)
    coloured = {id(group): place for place, group in enumerate(order[:COLOURED])}
    if len(order) <= COLOURED:  # all have a colour: in the order of the command line, as in the tables
        coloured = {id(group): place for place, group in enumerate(found.groups)}
    shown = [g for g, group in enumerate(found.groups) if id(group) in coloured]
    names = curves.names(collection.runs)
    losses = [name for name in LOSSES if name in names]
    rest = [name for name in names if name not in losses]
    made = {name: curves.lines(found.groups, name, curves.length(len(found.groups), 1)) for name in losses}
    spare, left = curves.IN_A_PAGE, 0
    for name in rest:
        if spare <= 0:
            left += 1
        elif found_lines := curves.lines(found.groups, name, curves.length(len(found.groups), len(rest))):
            made[name] = found_lines
            spare -= sum(len(line.steps) for line in found_lines)
    measures, unmapped = blocks.measures(found.groups, shown)
    matrices = _matrices(found, shown)
    _write_numbers(found, collection, folder, made, losses, measures, matrices)
    return {
        "groups": [
            {"label": group.label, "runs": len(group.runs), "colour": coloured.get(id(group), -1)}
            for group in found.groups
        ],
        "losses": [_series(name, made[name]) for name in losses if made.get(name)],
        "series": [_series(name, made[name]) for name in rest if name in made],
        "left": left,
        "unmapped": unmapped,
        "measures": [_measure(one, [other.kind for other in measures].count(one.kind) > 1) for one in measures],
        "matrices": [{"group": g, "runs": runs, "cells": _rows(100 * cells)} for g, cells, runs in matrices],
    }


def _series(name: str, lines: Sequence[curves.Line]) -> dict[str, Any]:
    return {
        "name": name,
        "title": title(name),
        "unit": unit(name),
        "chapter": chapter(name),
        "lines": [
            {"group": line.group, "x": line.steps.tolist(), "y": _short(line.mean)}
            | ({"half": _short(line.half), "runs": line.runs.tolist()} if np.isfinite(line.half).any() else {})
            for line in lines
        ],
    }


def _measure(measure: blocks.Measure, sites: bool) -> dict[str, Any]:
    """sites: whether parts of blocks were measured too, so that the title has to say which."""
    measured = unit(f"{measure.kind}/")
    return {
        "name": measure.name,
        "title": of_kind(measure.kind) + (f" · {of_site(measure.site)}" if sites else ""),
        "kind": of_kind(measure.kind),
        "log": measure.logarithmic,
        "axis": of_kind(measure.kind).lower() + (f" ({measured})" if measured else ""),
        "maps": [
            {
                "group": one.group,
                "blocks": one.blocks,
                "steps": one.steps.tolist(),
                "cells": _rows(one.cells),
                "profiles": [{"step": step, "values": _short(values)} for step, values in one.profiles],
            }
            for one in measure.maps
        ],
    }


def _matrices(found: Findings, shown: Sequence[int]) -> list[tuple[int, np.ndarray, int]]:
    """(group, mean accuracy matrix over its runs, their number); runs of another number of tasks are another group.

    Over the finished runs, where there are any: what is half done would shift the first rows alone.
    """
    made = []
    for g in shown:
        runs = [run for run in found.groups[g].runs if run.accuracy is not None]
        finished = [run for run in runs if run.status == "finished"]
        known = [run.accuracy for run in finished or runs if run.accuracy is not None]
        for shape in dict.fromkeys(matrix.shape for matrix in known):
            alike = np.stack([matrix for matrix in known if matrix.shape == shape])
            made.append((g, curves.over_runs(alike)[0], len(alike)))
    return made


def _short(values: np.ndarray) -> list[float | str | None]:
    """Numbers as they stand in the page: of DIGITS digits, null where there is none, "inf" where it is not finite."""
    return [
        float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None if math.isnan(value) else "inf"
        for value in values.tolist()
    ]


def _rows(values: np.ndarray) -> list[list[float | str | None]]:
    return [_short(row) for row in values]


def _write_numbers(
    found: Findings,
    collection: Collection,
    folder: Path,
    made: dict[str, list[curves.Line]],
    losses: Sequence[str],
    measures: Sequence[blocks.Measure],
    matrices: Sequence[tuple[int, np.ndarray, int]],
) -> None:
    """The CSVs: what is drawn, in full precision, and the tables."""
    labels = [group.label for group in found.groups]

    def drawn(names: Iterable[str]) -> Iterable[list[Any]]:
        for name in names:
            for line in made.get(name, []):
                columns = (line.steps, line.runs, line.mean, line.half)
                for step, runs, mean, half in zip(*(column.tolist() for column in columns), strict=True):
                    yield [name, labels[line.group], step, runs, _known(mean), _known(half)]

    head = ["metric", "group", "step", "runs", "mean", "ci95_half_width"]
    write_csv(folder / "loss.csv", head, drawn(losses))
    write_csv(folder / "series.csv", head, drawn(name for name in made if name not in losses))
    maps = [(measure, one) for measure in measures for one in measure.maps]
    write_csv(
        folder / "blocks.csv",
        ["measure", "group", "block", "step", "value"],
        (
            [measure.name, labels[one.group], block, step, _known(cell)]
            for measure, one in maps
            for block, row in zip(one.blocks, one.cells.tolist(), strict=True)
            for step, cell in zip(one.steps.tolist(), row, strict=True)
        ),
    )
    write_csv(
        folder / "profiles.csv",
        ["measure", "group", "at", "step", "block", "value"],
        (
            [measure.name, labels[one.group], at, step, block, _known(value)]
            for measure, one in maps
            for at, (step, values) in zip(("first", "middle", "last"), one.profiles, strict=True)
            for block, value in zip(one.blocks, values.tolist(), strict=True)
        ),
    )
    write_csv(
        folder / "accuracy.csv",
        ["group", "runs", "trained", "task", "accuracy"],
        (
            [labels[g], runs, trained, task, _known(value)]
            for g, cells, runs in matrices
            for trained, row in enumerate(cells.tolist())
            for task, value in enumerate(row)
        ),
    )
    metrics = list(dict.fromkeys(name for run in collection.runs for name in run.metrics))
    write_csv(
        folder / "runs.csv",
        ["run", "status", *found.keys, *metrics, "parameters", "seconds", "optimizer_state_bytes", "reason"],
        (_run_row(run, found.keys, metrics) for run in collection.runs),
    )
    write_csv(
        folder / "seeds.csv",
        ["group", "metric", "seeds", "mean", "ci95_half_width", "difference_to_best", "its_ci95_half_width", "pairs"],
        (
            [one.group.label, found.criterion, one.seeds, one.mean, one.half, *(one.less or (None, None, None))]
            for one in found.spreads
        ),
    )


def _run_row(run: Run, keys: Sequence[str], metrics: Sequence[str]) -> list[Any]:
    measured = [run.result.get("parameters"), run.seconds, run.result.get("optimizer_state_bytes")]
    words = [run.words.get(key, "") for key in keys]
    return [run.name, run.status, *words, *(run.metrics.get(name) for name in metrics), *measured, run.reason]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


# --- the page ------------------------------------------------------------------------------------------------------


def _html(found: Findings, collection: Collection, data: dict[str, Any], out: Path) -> str:
    from plotly.offline import get_plotlyjs

    plotly, code = get_plotlyjs(), _part("page.js")
    broken = curves.not_finite(found.groups, LOSSES)
    wrong = tables.problems(collection)
    concluded = _concluded(collection)
    beside = "" if collection.folder is None else relative(collection.folder, out.parent)
    return Template(_part("page.html")).substitute(
        policy=" ".join(f"'sha256-{_digest(script)}'" for script in (plotly, code)),
        style=_part("page.css"),
        title=escape(collection.title),
        headline=escape(found.headline),
        detail=escape(found.detail),
        facts=escape(_facts(found, collection)),
        warning=_warning(collection),
        links="".join(f'<a href="#{name}">{CONCLUSIONS[name]}</a>' for name in concluded),
        conclusions="\n".join(_conclusion(name, picture, beside) for name, picture in concluded.items()),
        folder=escape(out.with_suffix("").name),
        broken="".join(f'<p class="note">{escape(text)}</p>' for text in broken),
        runs=tables.runs(found, collection, out.parent) if collection.runs else "<p>There is none.</p>",
        seeds=tables.seeds(found) if found.spreads else "<p>No group has finished with a finite number.</p>",
        settings=tables.settings(collection),
        problems=wrong or "<p>Nothing: every run finished, and every file could be read.</p>",
        versions=tables.versions(collection),
        data=_embedded(data),
        plotly=plotly,
        code=code,
    )


def _concluded(collection: Collection) -> dict[str, bytes]:
    """What a sweep was for, as far as it has been drawn: the pictures by name."""
    if collection.folder is None:
        return {}
    found = {}
    for name in CONCLUSIONS:
        with suppress(OSError):  # there is none, or it cannot be read
            picture = (collection.folder / f"{name}.png").read_bytes()
            found |= {name: picture} if picture.startswith(PNG) else {}
    return found


def _conclusion(name: str, picture: bytes, folder: str) -> str:
    links = ", ".join(f'<a href="{escape(folder)}/{name}{suffix}">{name}{suffix}</a>' for suffix in (".md", ".csv"))
    return (
        f'<section id="{name}">\n<h2>{CONCLUSIONS[name]}</h2>\n'
        f'<img src="data:image/png;base64,{base64.b64encode(picture).decode()}" alt="{CONCLUSIONS[name]}">\n'
        f'<p class="csv">Tables and numbers: {links}</p>\n</section>'
    )


def _facts(found: Findings, collection: Collection) -> str:
    counts: dict[str, int] = {}
    for run in collection.runs:
        counts[run.status] = counts.get(run.status, 0) + 1
    parts = [f"{len(collection.runs)} run{'s' * (len(collection.runs) != 1)}"]
    parts += [f"{count} {status}" for status, count in counts.items()] if len(collection.runs) > 1 else list(counts)
    parts += [f"{len(found.groups)} groups"] if len(found.groups) > 1 else []
    return " · ".join([*parts, time.strftime("written %Y-%m-%d %H:%M")])


def _warning(collection: Collection) -> str:
    """A line near the top where something went wrong, so that nobody reads past it."""
    failed = sum(run.status not in ("finished", "diverged", "running", "waiting") for run in collection.runs)
    odd = sum(bool(run.remarks) for run in collection.runs if run.status == "finished") + len(collection.left_out)
    told = [f"{failed} run{'s' * (failed != 1)} did not finish"] if failed else []
    told += [f"{odd} thing{'s' * (odd != 1)} could not be shown as a run or in full"] if odd else []
    return f'<p class="warning"><a href="#problems">{"; ".join(told)}: see why</a></p>' if told else ""


def _embedded(data: dict[str, Any]) -> str:
    """JSON that may stand between script tags: no < that could close them, none of JavaScript's own line ends."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII: every other character as an escape
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _part(name: str) -> str:
    return files("trainkit.report").joinpath(name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    """What the browser checks a script against: others, from wherever they got into the page, are not run."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
