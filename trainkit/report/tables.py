"""The tables of a report as HTML. Everything that comes from a run passes through `escape`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from trainkit.launch.summary import STAGES, clock, size
from trainkit.report.collect import Collection, Run, relative
from trainkit.report.findings import Difference, Findings, config_differences
from trainkit.report.wording import title, unit, width

VALUES = 12  # of one setting are listed; the CSV has them all
SIGNS = {"finished": "✓", "failed": "✗", "diverged": "∞", "interrupted": "◐", "running": "…", "waiting": "○"}
PACKAGES = ("python", "torch", "lightning", "git", "platform")  # stand first

# What of each stage the tables have room for.
SHORT = ("loss", "accuracy", "final_average_accuracy", "forgetting_chaudhry")


def final_metrics(runs: Sequence[Run]) -> list[str]:
    """The final metrics that a table has room for: losses and accuracies, stage by stage."""
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    return [n for stage in STAGES for n in names if n.startswith(stage) and n.removeprefix(stage) in SHORT]


def runs(found: Findings, collection: Collection, folder: Path) -> str:
    """One row per run; columns sort on a click."""
    metrics = final_metrics(collection.runs)
    best = {name: _best(collection.runs, name) for name in metrics}
    heads = [("run", False), ("status", False), *((key, False) for key in found.keys)]
    heads += [(_with_unit(name), True) for name in metrics]
    heads += [("parameters", True), ("time", True), ("optimizer state", True)]
    rows = []
    for run in collection.runs:
        link = f'<a href="{escape(relative(run.dir, folder))}">{escape(run.name)}</a>'
        number = run.name if run.name.isdigit() else ""
        cells = [_cell(link, number), _cell(_status(run), run.status)]
        cells += [
            _cell(f"<code class=differs>{escape(run.words.get(key, ''))}</code>", run.words.get(key, ""))
            for key in found.keys
        ]
        for name in metrics:
            value = run.metrics.get(name)
            shown = "" if value is None else f"{value:.4f}"
            mark = "num best" if value is not None and value == best[name] else "num"
            cells.append(_cell(shown, value, mark))
        parameters, state = (_whole(run.result.get(key)) for key in ("parameters", "optimizer_state_bytes"))
        cells += [
            _cell("" if parameters is None else f"{parameters:,}", parameters, "num"),
            _cell(clock(run.seconds) if run.seconds else "", run.seconds, "num"),
            _cell("" if state is None else size(state), state, "num"),
        ]
        rows.append(cells)
    return _table(heads, rows, sortable=True)


def seeds(found: Findings) -> str:
    """One row per group that finished, best first: mean and interval over seeds, and the difference to the best."""
    name = title(found.criterion or "").lower()
    heads = [("group", False), ("seeds", True), (f"{name}: mean", True), ("± 95 %", True)]
    heads += [("difference to the best, paired by seed", True), ("± 95 %", True), ("pairs", True)]
    rows = []
    for spread in found.spreads:
        total = len(spread.group.runs)
        count = str(spread.seeds) if spread.seeds == total else f"{spread.seeds} of {total}"
        less = spread.less or (None, None, None)
        rows.append(
            [
                _cell(f"<code>{escape(spread.group.label)}</code>", spread.group.label),
                _cell(count, spread.seeds, "num"),
                _cell(f"{spread.mean:.4f}", spread.mean, "num"),
                _cell("" if spread.half is None else width(spread.half), spread.half, "num"),
                _cell("" if less[0] is None else f"{less[0]:+.4f}", less[0], "num"),
                _cell("" if less[1] is None else width(less[1]), less[1], "num"),
                _cell("" if less[2] is None else str(less[2]), less[2], "num"),
            ]
        )
    return _table(heads, rows, sortable=True)


def settings(collection: Collection) -> str:
    """What differs between the configurations, and folded what does not."""
    differing, same = config_differences(collection.runs)
    parts = []
    if differing:
        parts.append(_table([("setting", False), ("value: runs", False)], [_difference(one) for one in differing]))
    elif len(collection.runs) > 1:
        parts.append("<p>No setting differs.</p>")
    if same:
        lines = "\n".join(f"{key}: {value}" for key, value in same.items())
        count = f"{len(same)} setting{'s' * (len(same) != 1)}"
        where = "are the same in all runs" if len(collection.runs) > 1 else "of this run"
        parts.append(f"<details><summary>{count} {where}</summary><pre>{escape(lines)}</pre></details>")
    return "\n".join(parts) or "<p>No configuration could be read.</p>"


def problems(collection: Collection) -> str:
    """Runs that did not finish, what is damaged, and what was left out, each with the reason."""
    rows = []
    for run in collection.runs:
        said = [run.reason] if run.status != "finished" and run.reason else []
        if said or run.remarks:
            words = " ".join(f"{key}={value}" for key, value in run.words.items())[:200]
            rows.append([_cell(escape(run.name)), _cell(_status(run)), _cell(f"<code>{escape(words)}</code>")])
            rows[-1].append(_cell("<br>".join(escape(text) for text in [*said, *run.remarks])))
    rows += [
        [_cell(escape(path)), _cell("left out"), _cell(""), _cell(escape(reason))]
        for path, reason in collection.left_out
    ]
    heads = [("run or file", False), ("status", False), ("words", False), ("reason", False)]
    return _table(heads, rows) if rows else ""


def versions(collection: Collection) -> str:
    """Versions and machine; more than one value where runs differ."""
    values: dict[str, dict[str, list[str]]] = {}
    for run in collection.runs:
        known = run.result.get("versions")
        facts = {str(k): str(v) for k, v in known.items()} if isinstance(known, dict) else {}
        facts |= {
            key: run.config[key]
            for key in ("trainer.accelerator", "trainer.devices", "trainer.threads", "trainer.precision")
            if key in run.config
        }
        for name, value in facts.items():
            values.setdefault(name, {}).setdefault(value, []).append(run.name)
    names = sorted(values, key=lambda name: PACKAGES.index(name) if name in PACKAGES else len(PACKAGES))
    rows = []
    for name in names:
        only = len(values[name]) == 1
        told = [escape(v) if only else f"{escape(v)}: {escape(numbered(who))}" for v, who in values[name].items()]
        rows.append([_cell(escape(name)), _cell("<br>".join(told[:VALUES]))])
    return _table([("", False), ("", False)], rows, head=False) if rows else "<p>No result.json says.</p>"


def numbered(names: Sequence[str]) -> str:
    """Runs in short: runs 0–3, 7."""
    if not all(name.isdigit() for name in names):
        return ", ".join(names[:VALUES]) + (f" and {len(names) - VALUES} more" if len(names) > VALUES else "")
    numbers = sorted(map(int, names))
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}–{b}" if b > a + 1 else f"{a}, {b}" for a, b in spans)
    return f"run{'s' * (len(numbers) > 1)} {text}"


def _difference(one: Difference) -> list[str]:
    values = [
        f"<div><code class=differs>{escape(v)}</code> {escape(numbered(who))}</div>" for v, who in one.values[:VALUES]
    ]
    if len(one.values) > VALUES:
        values.append(f"<div>and {len(one.values) - VALUES} more values</div>")
    more = ""
    if one.others:
        names = escape("\n".join(one.others))
        more = f"<details><summary>with it {len(one.others)} more</summary><pre>{names}</pre></details>"
    return [_cell(f"<code>{escape(one.key)}</code>{more}"), _cell("".join(values))]


def _status(run: Run) -> str:
    return f'<span class="status {escape(run.status)}">{SIGNS.get(run.status, "?")} {escape(run.status)}</span>'


def _best(runs: Iterable[Run], name: str) -> float | None:
    values = [run.metrics[name] for run in runs if math.isfinite(run.metrics.get(name, math.nan))]
    if not values:
        return None
    return max(values) if "accuracy" in name else min(values)


def _with_unit(name: str) -> str:
    return title(name) + (f" ({unit(name)})" if unit(name) else "")


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _cell(html: str, key: str | float | None = None, kind: str = "") -> str:
    """A cell whose content is HTML already; key: what it is sorted by."""
    data = "" if key is None else f' data-key="{escape(str(key))}"'
    return f"<td{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}{data}>{html}</td>"


def _table(
    heads: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]], *, sortable: bool = False, head: bool = True
) -> str:
    cells = []
    for name, number in heads:
        text = f'<button type="button">{escape(name)}</button>' if sortable else escape(name)
        cells.append(
            f'<th scope="col"{" class=num" if number else ""}{" aria-sort=none" if sortable else ""}>{text}</th>'
        )
    top = f"<thead><tr>{''.join(cells)}</tr></thead>" if head else ""
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    kind = "sortable" if sortable else "plain"
    return f'<div class="scroll" tabindex="0"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'
