"""The three steps of CONTRIBUTING.md, taken in a copy of the project and from outside of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_runs import SMALL

ROOT = Path(__file__).parents[1]
LAYER = '''"""A norm layer of one's own: the sign of each channel."""

import torch
from torch import Tensor, nn


class Mine(nn.Module):
    """y = gain · tanh(x / temperature)."""

    def __init__(self, width: int, *, axis: int = -1, temperature: float = 1.0):
        super().__init__()
        self.axis, self.temperature = axis, temperature
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(x / self.temperature).movedim(self.axis, -1) * self.gain).movedim(-1, self.axis)
'''
YAML = "_target_: {target}\n_partial_: true\ntemperature: 2.0\n"
TEST = """import torch

from trainkit.norm_layer.mine import Mine


def test_formula():
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(Mine(4, temperature=2.0).double()(x), torch.tanh(x / 2))
"""


def run(cwd: Path, *words: str, tmp_path: Path, path: str = "") -> subprocess.CompletedProcess:
    (tmp_path / "corpus.txt").write_text("to be or not to be, that is the question\n" * 200)
    folders = [f"paths.log_dir={tmp_path / 'logs'}", f"paths.cache_dir={tmp_path / 'cache'}"]
    rest = ["data=text", f"data.path={tmp_path / 'corpus.txt'}", "trainer.max_steps=2", "logger=none", *folders]
    argv = [sys.executable, "run.py", "norm=peri", "norm_layer=mine", *words, *SMALL, *rest]
    env = os.environ | {"PYTHONPATH": path or str(cwd)}
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_in_the_project_three_new_files_are_enough(tmp_path):
    copy = tmp_path / "project"
    for name in ("trainkit", "callbacks", "conf", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "vectors"))
    for name in ("run.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy / name)
    (copy / "trainkit/norm_layer/mine.py").write_text(LAYER)
    (copy / "conf/norm_layer/mine.yaml").write_text(YAML.format(target="trainkit.norm_layer.mine.Mine"))
    (copy / "tests/norm_layer/test_mine.py").write_text(TEST)

    assert (
        "mine"
        in subprocess.run(
            [sys.executable, "run.py", "--help"],
            cwd=copy,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(copy)},
        ).stdout
    )
    done = run(copy, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    tests = [sys.executable, "-m", "pytest", "-q", "tests/norm_layer/test_mine.py", "tests/test_pairing.py"]
    checked = subprocess.run(
        tests, cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.slow
def test_from_outside_a_package_and_a_folder_are_enough(tmp_path):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/__init__.py").touch()
    (tmp_path / "my_package/mine.py").write_text(LAYER)
    (tmp_path / "my_conf/norm_layer").mkdir(parents=True)
    (tmp_path / "my_conf/norm_layer/mine.yaml").write_text(YAML.format(target="my_package.mine.Mine"))
    words = [f"hydra.searchpath=[{tmp_path / 'my_conf'}]"]

    refused = run(ROOT, *words, tmp_path=tmp_path, path=str(tmp_path))
    assert refused.returncode == 2
    assert "plugins" in refused.stderr
    done = run(ROOT, *words, "plugins=[my_package]", tmp_path=tmp_path, path=str(tmp_path))
    assert done.returncode == 0, done.stderr
