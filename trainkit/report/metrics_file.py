"""metrics.jsonl: one JSON object per logging step, `step` and the metrics' names; written while a run trains."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # strings, as JSON has no such numbers
Row = dict[str, Any]


def line(row: Mapping[str, Any]) -> str:
    """A row as it stands in the file, with its newline."""
    return json.dumps({name: writable(value) for name, value in row.items()}, allow_nan=False) + "\n"


def read(path: str | Path) -> list[Row]:
    """The rows of a metrics file in order; a last line that was torn while being written is left out.

    Raises ValueError where another line is no JSON object with a `step`.
    """
    lines = Path(path).read_bytes().split(b"\n")
    rows = []
    for number, text in enumerate(lines, start=1):
        row = parse(text)
        if row is not None:
            rows.append(row)
        elif text.strip() and any(rest.strip() for rest in lines[number:]):
            raise ValueError(f"{path}:{number} is no JSON object with a step: {text[:60]!r}. Is it a metrics.jsonl?")
    return rows


def readable(path: str | Path) -> list[Row]:
    """The rows of a metrics file in order, without the lines that are none; no file has no rows."""
    path = Path(path)
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    return [row for row in map(parse, lines) if row is not None]


def parse(text: bytes) -> Row | None:
    """One line as a row, or None where it is not one."""
    try:
        row = json.loads(text)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return meant(row)


def series(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric, where it was logged."""
    found = [(row["step"], float(row[name])) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def writable(value: Any) -> Any:
    """A value, with all that is inside of it, as JSON can hold it: numbers that are not finite as strings."""
    if type(value) is float and math.isfinite(value):  # nearly all are
        return value
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): writable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [writable(inner) for inner in value]
    if not isinstance(value, SupportsFloat):
        return str(value)
    number = float(value)
    if math.isnan(number):
        return "NaN"
    return number if math.isfinite(number) else ("Infinity" if number > 0 else "-Infinity")


def meant(value: Any) -> Any:
    """What `writable` was given, for what was read from JSON."""
    if isinstance(value, str):
        return NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: meant(inner) for key, inner in value.items()}
    return [meant(inner) for inner in value] if isinstance(value, list) else value
