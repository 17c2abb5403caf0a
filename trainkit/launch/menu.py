"""The menu: what `python run.py --help` prints, read from conf/ and from docstrings without importing anything."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from trainkit.launch.check.definition import docstring
from trainkit.launch.check.suggest import OURS
from trainkit.launch.sources import CONF, Folders, Source, default_groups, owners

WIDTH = 100
USAGE = """\
usage: python run.py [-m] [group=option ...] [key=value ...]

  python run.py model=gpt norm=peri                       one run
  python run.py norm=peri optimizer.lr=3e-4 seed=1        any key of the configuration is one word
  python run.py -m norm=pre,post,peri seed=0,1,2          a sweep: every combination, one run each
  python run.py -m hparams_search=lr_sensitivity          a sweep over learning rates
  python run.py mode=search hparams_search=optuna         search settings: hparams_search.space, …
  python run.py resume=last                               go on with the newest run
  python run.py mode=eval resume=last                     test it
  python run.py mode=sample resume=last                   write text with it: sample.prompt, …
  python run.py mode=export resume=last                   its model as a folder of safetensors
  python run.py mode=plan model=llama_7b trainer=fsdp     its memory, FLOPs and days, before it runs
  python run.py norm=mix --cfg job                        show the whole configuration, run nothing
  python run.py hydra.searchpath=[my_conf] norm=mine      options from a folder of your own"""


class Entry(NamedTuple):
    """One option of the menu: its group, its name, one line about it, and the paper's arXiv number if it names one."""

    group: str
    option: str
    line: str
    arxiv: str | None


@cache
def catalogue() -> tuple[Entry, ...]:
    """Every option of conf/, group by group in the order of conf/config.yaml."""
    folders = Folders()
    return tuple(_entry(group, option, folders) for group in groups() for option in folders.options(group))


def groups() -> list[str]:
    """The groups in the order of conf/config.yaml's defaults list, then those that it leaves out.

    Groups within groups, such as optimizer/base, are left out: they offer again what the outer one offers.
    """
    in_order = list(default_groups())
    return in_order + [group for group in Folders().groups if group not in in_order and "/" not in group]


def _entry(group: str, option: str, folders: Folders) -> Entry:
    path = folders.file(group, option)
    assert path is not None
    source = Source(f"{group}={option}", path, group)
    target = _own_target(source, group)
    module, own = docstring(target) if target else ("", "")
    named = f"trainkit.{group}.{option}."
    ours = target.startswith("trainkit.") and not target.startswith("trainkit.launch.")
    ours = ours and (target.startswith(named) or not _header(source))
    # A plugin speaks for itself; what several files share, or is another library's, is told apart by the file's header.
    line = (_first(module) if ours else _header(source)) or _first(own) or _header(source) or target
    arxiv = re.search(r"arXiv:(\d{4}\.\d{4,5})", f"{module}\n{own}" if ours else _header(source))
    return Entry(group, option, line, arxiv[1] if arxiv else None)


def _own_target(source: Source, group: str) -> str:
    """The target that an option stands for: its file's own, or that of the only node in it."""
    node = source.find(group) if source.package == "" else source.data
    if not isinstance(node, dict):
        return ""
    nodes = [value for value in node.values() if isinstance(value, dict) and "_target_" in value]
    return str(node.get("_target_") or (nodes[0]["_target_"] if len(nodes) == 1 else ""))


def _first(docstring: str) -> str:
    """The first paragraph as one line."""
    return " ".join(docstring.split("\n\n")[0].split()).rstrip(".")


def _header(source: Source) -> str:
    """The comment at the top of a file."""
    lines = (line for line in source.text.splitlines() if not line.startswith("# @package"))
    first = next(lines, "")
    return first[1:].strip().rstrip(".") if first.startswith("#") else ""


def menu(*, bold: bool = False) -> str:
    """The whole help text, at most 100 columns wide; bold: with emphasis for a terminal."""
    lines = [USAGE, "", *_group_lines(bold), *_key_lines(bold)]
    return "\n".join(lines)


def _group_lines(bold: bool) -> Iterator[str]:
    defaults = default_groups()
    yield f"{_strong('Groups', bold)} (* marks the default)"
    for group in groups():
        entries = [entry for entry in catalogue() if entry.group == group]
        width = max((len(entry.option) for entry in entries), default=0)
        yield ""
        yield f"{_strong(group, bold)}="
        for entry in entries:
            mark = "*" if entry.option == defaults.get(group) else " "
            yield cut(f"  {mark} {entry.option:{width}}  {_without_citation(entry.line)}")
        yield from _inner_lines(group)


def _inner_lines(group: str) -> Iterator[str]:
    """The groups within a group, for the options that have one: the names alone, as they are explained above them."""
    folders = Folders()
    for inner in (name for name in folders.groups if name.startswith(f"{group}/")):
        having = owners(inner, folders)
        lacking = [option for option in folders.options(group) if option not in having]
        few, word = (having, "with") if len(having) <= len(lacking) else (lacking, "with any but")
        yield f"    {word} {' or '.join(f'{group}={option}' for option in few)}:"
        names = textwrap.wrap(f"{inner}= {' '.join(folders.options(inner))}", WIDTH - 6, subsequent_indent="  ")
        yield from (f"      {line}" for line in names)


def _key_lines(bold: bool) -> Iterator[str]:
    """The keys at the top of conf/config.yaml with their comments."""
    source = Source("", CONF / "config.yaml")
    keys = [key for key in source.data if key not in ("defaults", "hydra", *OURS)]
    width = max(len(key) for key in keys)
    yield ""
    yield f"{_strong('Keys', bold)} (every key of every option: python run.py --cfg job)"
    for key in keys:
        yield cut(f"    {key:{width}}  {source.comment(key)}")


def _without_citation(line: str) -> str:
    return re.sub(r"\s*\([^()]*\d{4}[^()]*\)", "", line)


def _strong(text: str, bold: bool) -> str:
    return f"\033[1m{text}\033[0m" if bold else text


def cut(line: str) -> str:
    """`line` cut to the menu's width, its columns kept."""
    return line.rstrip() if len(line.rstrip()) <= WIDTH else line[: WIDTH - 1].rstrip() + "…"
