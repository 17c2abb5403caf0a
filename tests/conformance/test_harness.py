"""The harness itself: a wrong number, a forgotten array and an unknown algorithm must each fail."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from .registry import File, Layer, adapter, build, find
from .runner import check, equal


class Affine(torch.nn.Module):
    """y = weight · x, and a count of training calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
        return self.weight * x


@adapter("harness:affine")
def affine(file: File) -> Layer:
    return Layer(Affine())


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    w, arrays = rng.normal(size=3), {}
    for t in (1, 2):
        x, gy = rng.normal(size=(2, 4, 3))
        arrays |= {f"x/{t}": x, f"gy/{t}": gy, f"expect/y/{t}": w * x, f"expect/gx/{t}": w * gy}
        arrays |= {f"expect/gparam/{t}/weight": (x * gy).sum(0), f"expect/buffer/{t}/calls": np.array(t)}
    x = rng.normal(size=(5, 3))
    return arrays | {"param/weight": w, "buffer/calls": np.array(0), "x_eval": x, "expect/y_eval": w * x}


def write(path: Path, arrays: dict[str, np.ndarray], algorithm: str = "harness:affine") -> File:
    meta = {"algorithm": algorithm, "hyperparameters": {}, "steps": 2, "dtype": "float64"}
    np.savez(path / "file.npz", meta=json.dumps(meta), **arrays)
    return File(path / "file.npz")


def test_right_numbers_pass(arrays, tmp_path):
    assert check(write(tmp_path, arrays)) == 9


@pytest.mark.parametrize(
    "name", ["expect/y/2", "expect/gx/1", "expect/gparam/2/weight", "expect/buffer/2/calls", "expect/y_eval"]
)
def test_a_wrong_number_fails(arrays, tmp_path, name):
    arrays[name] = arrays[name] * 2 + 1
    with pytest.raises(AssertionError, match=name):
        check(write(tmp_path, arrays))


def test_an_array_nobody_compared_fails(arrays, tmp_path):
    arrays["expect/eta/1"] = np.zeros(1)
    with pytest.raises(AssertionError, match=r"never compared: \['expect/eta/1'"):
        check(write(tmp_path, arrays))


def test_a_parameter_without_a_value_fails(arrays, tmp_path):
    del arrays["param/weight"]
    with pytest.raises(AssertionError, match="no value for the parameters"):
        check(write(tmp_path, arrays))


def test_an_unknown_algorithm_is_a_failure(arrays, tmp_path):
    with pytest.raises(LookupError, match="no adapter for algorithm 'harness:other'"):
        check(write(tmp_path, arrays, "harness:other"))


def test_an_adapter_cannot_read_what_is_expected(arrays, tmp_path):
    with pytest.raises(AssertionError, match="is an expected array"):
        write(tmp_path, arrays)["expect/y/1"]


def test_an_exact_name_wins_over_a_prefix():
    @adapter("harness:prefix*")
    def prefix(file):
        return iter(())

    assert find("harness:prefix:any").function is prefix
    assert find("harness:affine").function is affine


@pytest.mark.parametrize(
    ("actual", "expected", "passes"),
    [
        ([1.0, 2.0], [1.0, 2.0 + 1e-9], True),
        ([1.0, 2.0], [1.0, 2.0 + 1e-8], False),
        ([1e-17, 0.0], [0.0, 0.0], True),
        ([1e-9, 0.0], [0.0, 0.0], False),
        ([1.0, float("nan")], [1.0, float("nan")], True),
        ([1.0, float("nan")], [1.0, 2.0], False),
        ([[1.0, 2.0]], [1.0, 2.0], True),
        ([1.0], [1.0, 1.0], False),
        ([3], [3], True),
        ([3], [4], False),
    ],
)
def test_compare(actual, expected, passes):
    values = torch.tensor(actual, dtype=None if isinstance(expected[0], int) else torch.float64)
    try:
        equal("a", values, torch.tensor(expected, dtype=values.dtype), 1e-9)
    except AssertionError:
        assert not passes
    else:
        assert passes


def test_a_setting_that_the_menu_lacks_is_refused():
    with pytest.raises(AssertionError, match=r"conf/norm_layer/rms.yaml has no key epsilon"):
        build("norm_layer", "rms", {"epsilon": 1.0}, 8)
