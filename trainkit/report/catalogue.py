"""The README's catalogue of plugins, made from the menu and docstrings by `python -m trainkit.report catalogue`."""

from __future__ import annotations

from pathlib import Path

from trainkit.launch.menu import catalogue

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- catalogue: made by `python -m trainkit.report catalogue` -->", "<!-- end of catalogue -->"
GROUPS = {
    "norm": "Placements",
    "norm_layer": "Norm layers",
    "model": "Models",
    "optimizer": "Optimizers",
    "schedule": "Schedules",
    "gradient": "Gradient treatments",
    "projection": "Weight projections",
    "learner": "Continual learners",
    "continual": "Strategies for batch norm and plasticity",
    "data": "Data",
    "task": "Tasks",
}


def tables() -> str:
    """One Markdown table per group: the word, what it is, the paper."""
    parts = []
    for group, title in GROUPS.items():
        rows = [f"| `{e.group}={e.option}` | {e.line} | {_link(e.arxiv)} |" for e in catalogue() if e.group == group]
        parts.append("\n".join([f"**{title}**", "", "| word | what it is | paper |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _link(arxiv: str | None) -> str:
    return f"[{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else ""


def updated(readme: str) -> str:
    """The README's text with the catalogue between its two marks replaced."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{tables()}\n\n{END}{tail}"


def main() -> None:
    README.write_text(updated(README.read_text()))
