"""The command line as words: flags, `key=value` overrides, and the jobs that a sweep expands to."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING

from trainkit.launch.explain import UserError, explained, listed, nearest
from trainkit.launch.sources import Folders

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

SWITCHES = {
    "-h": "help", "--help": "help", "-m": "multirun", "--multirun": "multirun", "-r": "run", "--run": "run",
    "--resolve": "resolve", "--hydra-help": "hydra_help", "--version": "version",
    "-sc": "shell_completion", "--shell-completion": "shell_completion",
}  # fmt: skip
TAKES_VALUE = {"-c": "cfg", "--cfg": "cfg", "-p": "package", "--package": "package", "-i": "info", "--info": "info"}
VALUES = {
    "cfg": ("job", "hydra", "all"),
    "info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
REFUSED = {
    "-cp": "there is one configuration, conf/",
    "--config-path": "there is one configuration, conf/",
    "-cn": "there is one configuration, conf/config.yaml",
    "--config-name": "there is one configuration, conf/config.yaml",
    "-cd": "a folder of your own YAML files is named by hydra.searchpath=[FOLDER]",
    "--config-dir": "a folder of your own YAML files is named by hydra.searchpath=[FOLDER]",
    "--experimental-rerun": "a run goes on with resume=DIR",
}


@dataclass
class CommandLine:
    """What was typed: overrides in order, and flags by name (a switch is True, others hold their value)."""

    overrides: list[str] = field(default_factory=list)
    flags: dict[str, str | bool] = field(default_factory=dict)

    @property
    def multirun(self) -> bool:
        return "multirun" in self.flags

    @property
    def for_hydra(self) -> bool:
        """Whether the answer is Hydra's own, not a run and not ours."""
        asked = {"hydra_help", "version", "shell_completion", "info"} & set(self.flags)
        return bool(asked) or self.flags.get("cfg") in ("hydra", "all")


def read(argv: list[str]) -> CommandLine:
    """Splits flags from overrides, in any order."""
    line, rest = CommandLine(), list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            line.overrides.append(word)
            continue
        flag, equals, value = word.partition("=")
        if flag in SWITCHES and not equals:
            line.flags[SWITCHES[flag]] = True
        elif flag in TAKES_VALUE:
            line.flags[TAKES_VALUE[flag]] = value if equals else _value_of(flag, rest)
        else:
            raise UserError(*_unknown_flag(flag, equals + value, rest))
    if {"resolve", "package"} & set(line.flags) and "cfg" not in line.flags:
        raise UserError("--resolve and --package go with --cfg: they say how much of the configuration is shown")
    return line


def _value_of(flag: str, rest: list[str]) -> str:
    name = TAKES_VALUE[flag]
    legal = VALUES.get(name)
    if name == "info" and (not rest or rest[0] not in VALUES["info"]):
        return "all"
    if not rest or (legal and rest[0] not in legal):
        got = f", not {rest[0]!r}" if rest else ""
        raise UserError(f"{flag} takes a value{got}: {', '.join(legal) if legal else 'a key of the configuration'}")
    return rest.pop(0)


def _unknown_flag(flag: str, value: str, rest: list[str]) -> list[str]:
    if flag in REFUSED:
        return [f"{flag} is not used here: {REFUSED[flag]}"]
    near = nearest(flag, [*SWITCHES, *TAKES_VALUE], cutoff=0.75)
    if near and not value:
        return [f"no such flag: {flag}; did you mean '{near}'?"]
    follows = f"={rest[0]}" if not value and rest and "=" not in rest[0] else value or "=VALUE"
    return [f"no such flag: {flag}", f"settings are written without dashes: {flag.lstrip('-')}{follows}"]


def parse(words: list[str], folders: Folders) -> list[Override]:
    """The words read by Hydra's own grammar. Raises UserError for a word that is no `key=value`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create(config_loader=folders)  # type: ignore[arg-type]  # glob() only lists options
    parsed = []
    for word in words:
        _check_shape(word, folders)
        with explained(f"cannot read {word!r}"):
            parsed.append(_parse_one(parser, word))
    return parsed


def _parse_one(parser, word: str) -> Override:
    from hydra.errors import OverrideParseException

    try:
        return parser.parse_overrides([word])[0]
    except OverrideParseException as error:
        value = word.partition("=")[2]
        quoted = f'{word.partition("=")[0]}="{value}"'
        raise UserError(
            f"cannot read {word!r}: {str(error).splitlines()[0]}",
            f"close every bracket and quote, or quote the whole value for Hydra and the shell: '{quoted}'",
        ) from error


def _check_shape(word: str, folders: Folders) -> None:
    key, equals, value = word.partition("=")
    if not word.strip():
        raise UserError("an empty word on the command line; is there a stray pair of quotes, or an unset variable?")
    if equals and not key.strip("+~ "):
        raise UserError(f"{word!r} has no key: write key=value without spaces around '='")
    if word.startswith("~"):
        return
    if not equals:
        raise UserError(*_bare(word, folders))
    if not value.strip():
        none = "null" if key.strip("+") not in folders.groups else "OPTION"
        raise UserError(f"{word!r} has no value: write {key}={none}", _options_line(key.strip("+"), folders))


def _bare(word: str, folders: Folders) -> list[str]:
    """A word without '=': an option, a group, a key, or YAML's colon."""
    if word in folders.groups:
        return [f"{word!r} has no value: write {word}=OPTION", _options_line(word, folders)]
    key, colon, value = word.partition(":")
    if colon and key.replace(".", "").isidentifier():
        return [f"{word!r} is no key=value; did you mean '{key}={value.strip() or 'VALUE'}'?"]
    everywhere = {option: group for group in reversed(folders.groups) for option in folders.options(group)}
    near = nearest(word, [*everywhere, *folders.groups])
    if near in everywhere:
        return [f"{word!r} is no key=value; did you mean '{everywhere[near]}={near}'?"]
    if near:
        return [f"{word!r} is no key=value; did you mean '{near}=OPTION'?", _options_line(near, folders)]
    return [f"{word!r} is no key=value: settings look like optimizer.lr=1e-3", "python run.py --help lists them"]


def of_a_launcher(word: str) -> bool:
    """Whether a word chooses a launcher or is about one."""
    return word.lstrip("+~").startswith(("hydra/launcher", "hydra.launcher"))


def quoted(text: str) -> str:
    """A text as the value of a word, whatever characters it has."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _options_line(group: str, folders: Folders) -> str:
    return listed(f"options of {group}", folders.options(group))


def jobs(overrides: list[Override]) -> list[list[str]]:
    """The grid of a sweep, one list of words per job, ordered as by Hydra's BasicSweeper: the last key runs fastest."""
    columns: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            columns[key] = [override.input_line or ""]
            continue
        if not override.is_discrete_sweep():
            raise UserError(
                f"{override.input_line}: an interval has no finite list of values",
                f"write {key}=choice(a,b,c) or {key}=range(start,stop,step)",
            )
        with explained(f"cannot expand {override.input_line!r}"):
            columns[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        if not columns[key]:
            raise UserError(f"{override.input_line} expands to nothing", "a sweep needs at least one value")
    return [list(job) for job in product(*columns.values())]
