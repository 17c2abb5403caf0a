"""Guards of constructors are read from source and evaluated before anything is imported."""

import inspect
import sys

import pytest
import torch

from trainkit.launch.check.guards import refusal
from trainkit.launch.preflight import UserError, check

SOURCE = """
from dataclasses import dataclass
from os.path import exists
import torch
LIMITS = (1, 8)
MODES = {"a": 1, "b": 2}

def positive(**settings):
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive; got {value!r}")

def half(n, *, least=1):
    if n % 2 or n < least:
        raise ValueError(f"{n} has no half of at least {least}")
    return n // 2

class Base:
    def __init__(self, width, heads=1, **rest):
        if width % heads:
            raise ValueError(f"width={width} by heads={heads:.1f}")
        positive(**rest)

class Child(Base):
    def __init__(self, width, *, heads=2, rate=0.5, mode="a", model=None):
        super().__init__(width, heads, rate=rate)
        if mode not in MODES:
            raise ValueError("mode is one of " + ", ".join(MODES))

class Heir(Child):
    pass

@dataclass
class Data:
    size: int
    parts: int = 2

    def __post_init__(self):
        for name in ("size", "parts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if not LIMITS[0] <= self.parts <= LIMITS[1]:
            raise ValueError(f"parts must be in {LIMITS}")

def branches(n, path="", model=None):
    if model is None and n < 0:
        raise ValueError("no model")
    if exists(path):
        return None
    if n > 5:
        raise ValueError("not certain: the function may be over")

def changed(n):
    seen = []
    for item in open(n):
        seen.append(item)
    if not seen:
        raise ValueError("not certain: the loop may have filled it")
    other = [1]
    other.append(n)
    if len(other) == 1:
        raise ValueError("not certain: append")

def total(n, weights=(0.5, 0.5)):
    if isinstance(n, torch.Tensor):
        raise ValueError("never: a configuration holds no tensors")
    if not all(0 <= w < 1 for w in weights) or sum(weights) > 1:
        raise ValueError(f"weights {weights} of {n}")
    try:
        n = int(n)
    except ValueError:
        raise TypeError("other errors are not ours") from None
    if n > 3:
        raise ValueError("not certain: n was set where it may fail")

def loops(n):
    while n > 0:
        n -= 1
    if n == 0:
        raise ValueError("not certain: a loop without known end")

def endless(n):
    if sum(1 for _ in range(n)) < 0 or 9 ** 9 ** 9 < 0:
        raise ValueError("never evaluated")
    endless(n)
    raise ValueError(f"after {half(n)}")
"""


@pytest.fixture(autouse=True)
def guarded(tmp_path, monkeypatch):
    (tmp_path / "guarded.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("target", "given", "message"),
    [
        ("half", {"n": 3}, "3 has no half of at least 1"),
        ("half", {"n": 4, "least": 8}, "4 has no half of at least 8"),
        ("half", {"n": 8}, None),
        ("Base", {"width": 7, "heads": 2}, "width=7 by heads=2.0"),
        ("Child", {"width": 7}, "width=7 by heads=2.0"),
        ("Child", {"width": 8, "rate": 0}, "rate must be positive; got 0"),
        ("Child", {"width": 8, "mode": "c"}, "mode is one of a, b"),
        ("Child", {"width": 8}, None),
        ("Child", {}, None),  # the width comes later
        ("Heir", {"width": 8, "mode": "c"}, "mode is one of a, b"),
        ("Data", {"size": 0}, "size must be at least 1"),
        ("Data", {"size": 1, "parts": 9}, "parts must be in (1, 8)"),
        ("Data", {"size": 1}, None),
        ("branches", {"n": -1}, "no model"),
        ("branches", {"n": 6}, None),
        ("changed", {"n": "x"}, None),
        ("total", {"n": 1, "weights": [0.5, 1.0]}, "weights [0.5, 1.0] of 1"),
        ("total", {"n": 4}, None),
        ("loops", {"n": 4}, None),
        ("nothing", {"n": 4}, None),
    ],
)
def test_what_certainly_is_refused(target, given, message):
    assert refusal(f"guarded.{target}", given) == message
    assert "guarded" not in sys.modules


def test_evaluation_ends():
    assert refusal("guarded.endless", {"n": 10**12}) == "after …"  # as deep as calls are followed


@pytest.mark.parametrize(
    "argv",
    [
        ["model.heads=3"],
        ["model=llama", "model.heads=4", "model.kv_heads=3"],
        ["model=vit", "model.width=100", "model.heads=3"],
        ["model.depth=0"],
        ["norm=mix", "norm.alpha=2"],
        ["gradient.max_norm=-1"],
        ["optimizer=lion", "optimizer.lr=-1"],
        ["optimizer=lion", "optimizer.betas=[0.9,1.0]"],
        ["schedule.warmup=-3"],
        ["trainer.max_steps=-1"],
        ["trainer.threads=0"],
        ["data.batch_size=0"],
        ["callbacks.checkpoint.mode=best"],
    ],
    ids=" ".join,
)
def test_a_setting_that_cannot_work_is_refused_before_the_run_in_one_line(argv):
    with pytest.raises(UserError) as caught:
        check(argv)
    assert argv[-1].split("=")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_jobs_of_a_sweep_are_looked_at():
    with pytest.raises(UserError, match=r"model\.width must be a multiple of model\.heads"):
        check(["-m", "model.heads=2,3"])
    assert len(check(["-m", "model.heads=2,4"]).configs) == 2


def test_the_sentence_is_that_of_the_constructor():
    parameter = [torch.nn.Parameter(torch.zeros(1))]
    for name, keywords in {"AdamW": {"lr": -1.0}, "SGD": {"lr": 0.1, "momentum": -0.5}}.items():
        with pytest.raises(ValueError) as real:
            getattr(torch.optim, name)(parameter, **keywords)
        assert refusal(f"torch.optim.{name}", keywords) == str(real.value)
    assert "params" in inspect.signature(torch.optim.AdamW).parameters  # which stay unknown here


def test_batches_that_cannot_be_shared_out_are_seen_before_the_data():
    with pytest.raises(UserError, match=r"data\.batch_size=32 must be a multiple of 2 processes x .*=3; try 36"):
        check(["trainer=ddp", "trainer.devices=2", "trainer.accumulate_grad_batches=3", "data.batch_size=32"])
    check(["trainer=ddp", "trainer.devices=auto", "trainer.accumulate_grad_batches=3", "data.batch_size=32"])
