"""Every golden file below --vectors DIR, number for number; test id = the file's relative path without its ending."""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest

from . import adapters
from .registry import File, find
from .runner import check

NOT_YET = Path(__file__).with_name("not_yet.txt")

for module in iter_modules(adapters.__path__):
    import_module(f"{adapters.__name__}.{module.name}")


def not_yet() -> set[str]:
    """Algorithms that wait for their plugin: one per line, # begins a comment line."""
    lines = (line.strip() for line in NOT_YET.read_text().splitlines())
    return {line for line in lines if line and not line.startswith("#")}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" not in metafunc.fixturenames:
        return
    directory: Path = metafunc.config.getoption("vectors")
    paths = sorted(directory.rglob("*.npz"))
    if not paths:
        raise pytest.UsageError(f"--vectors needs a directory with .npz files; {directory.resolve()} has none")
    waiting = not_yet()
    metafunc.parametrize("path", [parameter(path, directory, waiting) for path in paths])


def parameter(path: Path, directory: Path, waiting: set[str]):
    name = path.relative_to(directory).with_suffix("").as_posix()
    marks = []
    if File(path).algorithm in waiting:
        marks = [pytest.mark.xfail(strict=True, raises=LookupError, reason="listed in not_yet.txt")]
    return pytest.param(path, id=name, marks=marks)


def test_golden(path: Path) -> None:
    check(File(path))


def test_what_waits_has_no_adapter() -> None:
    built = [algorithm for algorithm in sorted(not_yet()) if find(algorithm)]
    assert not built, f"these have an adapter, take them off not_yet.txt: {built}"
