"""A user's mistake in at most three lines: what, where, and the likely intention."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

LINES, WIDTH = 3, 240


class UserError(ValueError):
    """A mistake in the command line or in a YAML file; its message has at most three lines and says all there is."""

    exit_code = 2

    def __init__(self, *lines: str):
        kept = [shorten(line) for line in lines if line][:LINES]
        super().__init__("\n".join(kept))


def shorten(line: str, width: int = WIDTH) -> str:
    """`line` as one line of at most `width` characters."""
    line = " ".join(line.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def nearest(word: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name that `word` was probably meant to be, ignoring case; cutoff: how alike, up to 1."""
    by_lower = {name.lower(): name for name in names}
    close = get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[close[0]] if close else None


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """The clause `; did you mean 'peri'?`, or nothing where no name is near."""
    near = nearest(word, names)
    return f"; did you mean '{near}'?" if near else ""


def shown(value: object) -> str:
    """A value as it is written in YAML and on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def listed(title: str, names: Iterable[str], limit: int = 30) -> str:
    """The line `title: a, b, c`; nothing where there are no names, and where to read them where there are many."""
    names = sorted(names)
    return f"{title}: {', '.join(names) if len(names) <= limit else 'see python run.py --help'}" if names else ""


@contextmanager
def explained(context: str) -> Iterator[None]:
    """Runs Hydra's, OmegaConf's or a parser's code; what it raises becomes a UserError about `context`.

    Only foreign calls stand inside of such a block, so a defect of ours is never taken for a user's mistake.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(*explain(error, context)) from error


def explain(error: BaseException, context: str) -> list[str]:
    """The lines that say what a foreign exception means."""
    for cause in _chain(error):
        mark = getattr(cause, "problem_mark", None)
        if mark is not None:
            problem = getattr(cause, "problem", None) or "cannot be read"
            return [f"{display(mark.name)}:{mark.line + 1}: not valid YAML: {problem}", _yaml_hint(problem)]
        if isinstance(cause, UnicodeDecodeError):
            return [f"{context}: a YAML file is not UTF-8 text: {cause.reason} at byte {cause.start}"]
    if isinstance(error, RecursionError):
        return [f"{context}: nested too deeply to be read"]
    missing = re.search(r"Could not find '(?:(.*)/)?([^']*)'", str(error))
    if missing:
        options = re.findall(r"^\t([^\s=,]+)$", str(error), re.MULTILINE)
        return [
            f"{context}: {missing[1] or 'conf'} has no option '{missing[2]}'{did_you_mean(missing[2], options)}",
            listed(f"options of {missing[1]}", options),
        ]
    told = [line.strip() for line in str(error).splitlines() if line.strip() and not _is_noise(line)]
    return [f"{context}: {told[0] if told else type(error).__name__}", " ".join(told[1:])]


def display(path: str | Path) -> str:
    """`path` from the project's folder or the current one where it lies below, else in full."""
    path = Path(path)
    for folder in (Path(__file__).resolve().parents[2], Path.cwd()):
        if path.is_relative_to(folder):
            return str(path.relative_to(folder))
    return str(path)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_noise(line: str) -> bool:
    return line.lstrip().startswith(("full_key", "object_type", "reference_type", "See http", "Config search path"))


def _yaml_hint(problem: str) -> str:
    if "mapping values" in problem:
        return "a text that contains ': ' must be quoted, and each key stands on a line of its own"
    if "cannot start any token" in problem or "tab character" in problem:
        return "indent with spaces, not with tabs; quote texts that begin with @ ` % or *"
    return ""
