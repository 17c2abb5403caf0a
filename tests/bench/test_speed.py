"""The benches of a whole run: train, overhead, startup, data and scaling."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from typing import Any

import pytest
import torch

from trainkit.bench import __main__ as bench
from trainkit.bench import scaling, startup
from trainkit.bench.bare import Bare
from trainkit.bench.beside import Beside, prepared
from trainkit.bench.nanogpt import Loop, NanoGPT
from trainkit.bench.peak import matmul_peak
from trainkit.bench.profile import FRAMEWORK, Shares, kind
from trainkit.bench.record import table
from trainkit.bench.timing import held_bytes
from trainkit.launch.sources import RUN
from trainkit.model.gpt import GPT
from trainkit.norm.pre import Pre
from trainkit.norm_layer.layer import LayerNorm

QUICK = ["--rounds", "1", "--threads", "1"]
FEW = ["model.width=8", "model.heads=1", "model.depth=2", "model.context=8", "data.batch_size=2", "data.val_batches=1"]
PLAIN = ["logger=none", "~callbacks.figures", "~callbacks.checkpoint"]  # neither is about a step, and both take seconds


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def said(capsys, *words):
    """The one object that a bench prints, and nothing else."""
    assert bench.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def with_the_weights_of(ours, **shape):
    """The plain model, float64, with the weights of trainkit's."""
    plain = NanoGPT(20, **shape).double()
    names = {"attn.f.qkv": "attn.qkv", "attn.f.out": "attn.out", "mlp.f.inp": "up", "mlp.f.out": "down"}
    names |= {"attn.pre": "norm_1", "mlp.pre": "norm_2", "after": "norm", "gain": "weight"}
    state = {}
    for name, value in ours.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = value
    plain.load_state_dict(state)
    return plain


def test_the_plain_loop_has_the_mathematics_of_our_gpt():
    torch.manual_seed(0)
    shape: Any = {"depth": 2, "width": 16, "heads": 2, "context": 12}
    ours = GPT(20, Pre(LayerNorm), **shape).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # gains that are not 1 as well
    plain = with_the_weights_of(ours, **shape)
    tokens, targets = torch.randint(20, (2, 3, 12)).unbind()
    loss = torch.nn.functional.cross_entropy(ours(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(plain(tokens, targets), loss, rtol=1e-10, atol=1e-10)
    loss.backward()
    plain(tokens, targets).backward()
    torch.testing.assert_close(plain.embed.weight.grad, ours.embed.weight.grad, rtol=1e-10, atol=1e-10)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in ours.parameters())


def test_the_plain_loop_learns_and_its_rate_is_a_cosine_after_a_warm_up():
    torch.manual_seed(0)
    tokens = torch.randint(20, (2, 13))
    model = NanoGPT(20, depth=1, width=16, heads=2, context=12)
    loop = Loop(model, iter(lambda: (tokens[:, :-1], tokens[:, 1:]), None), lr=1e-2, warmup=2, total=42)
    factors = []
    before = model(tokens[:, :-1], tokens[:, 1:]).item()
    for _ in range(43):
        factors.append(loop.factor())
        loop()
    assert model(tokens[:, :-1], tokens[:, 1:]).item() < 0.5 * before
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors[22] == pytest.approx(0.55)  # half way from 1 to 0.1
    assert factors[42] == pytest.approx(0.1)


def test_a_run_and_the_other_loop_take_turns(monkeypatch):
    order = []
    beside = Beside(lambda: order.append("other"), interval=2, rounds=2, clock=time.perf_counter)
    with prepared([*FEW, *PLAIN, "trainer.threads=1", f"trainer.max_steps={Beside.steps(2, 2)}"]) as run:
        take = run.task.training_step
        monkeypatch.setattr(run.task, "training_step", lambda *args: (order.append("run"), take(*args))[1])
        run.fit(beside)
    assert order == ["other", "other", "run", "run"] * 3 + ["run"]
    assert len(beside.seconds) == len(beside.others) == 2
    assert min(beside.seconds) > 0


def test_the_plain_loop_of_overhead_takes_the_very_steps_of_the_run():
    steps = Beside.steps(1, 2, 0)
    words = [*FEW, *PLAIN, "trainer.threads=1", f"trainer.max_steps={steps}", "gradient.max_norm=0.1"]
    with prepared(words) as run:
        bare = Bare(run.cfg, run.data, steps=steps)
        run.fit(Beside(bare, interval=1, rounds=2, warmup=0, clock=time.perf_counter))
        bare()  # the run's last step has no other one before it
    for (name, ours), plain in zip(run.task.model.named_parameters(), bare.model.parameters(), strict=True):
        torch.testing.assert_close(plain, ours, msg=name)


def test_train_compares_speed_and_memory(capsys):
    size = ["--depth", "1", "--width", "64", "--batch", "2", "--context", "8", "--precision", "32-true", "--profile"]
    found = said(capsys, "train", *size, *QUICK, *PLAIN)
    assert found["hardware"]["threads"] == 1
    speed, memory, *shares = found["results"]
    assert speed["ratio"] == pytest.approx(speed["seconds_a"] / speed["seconds_b"])
    assert speed["tokens_per_second_b"] == pytest.approx(16 / speed["seconds_b"])
    assert speed["p10_b"] <= speed["p50_b"] <= speed["p90_b"]
    model = GPT(256, Pre(LayerNorm), depth=1, width=64, heads=1, context=8)
    assert speed["mfu_a"] * speed["peak_flops"] * speed["seconds_a"] == pytest.approx(16 * model.flops_per_token(8))
    assert "at_least" not in speed  # a limit belongs to the size that it was set for
    assert memory["ratio"] == pytest.approx(memory["mib_a"] / memory["mib_b"])
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert min(memory["mib_a"], memory["mib_b"]) * 2**20 > 4 * weights  # beside gradients and two moments
    assert len(shares) == 2
    for share in shares:
        assert sum(value for key, value in share.items() if key != "name") == pytest.approx(1, abs=0.01)


def test_overhead_names_what_it_compares(capsys):
    words = ["--depth", "1", "--width", "64", "--interval", "1", *QUICK, "data.batch_size=1", "model.context=8", *PLAIN]
    (found,) = said(capsys, "overhead", *words)["results"]
    assert found["name"] == "run / plain loop, 1 layers x 64"
    assert found["ratio"] == pytest.approx(found["seconds_a"] / found["seconds_b"])


def test_overhead_keeps_wandb_offline_and_restores_what_was_asked_of_it(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with prepared([*FEW, *PLAIN, "trainer.max_steps=1"]):
        assert os.environ["WANDB_MODE"] == "offline"
    assert os.environ["WANDB_MODE"] == "disabled"


def test_data_compares_the_loader_with_training(capsys):
    size = ["--batch", "2", "--context", "16", "--images", "4", "--batches", "3", "--workers", "0"]
    found = said(capsys, "data", *size, "--tokens-per-second", "1000", *QUICK)
    text, *images = found["results"]
    assert text["seconds_a"] == pytest.approx(32 / 1000)
    assert text["ratio"] == pytest.approx(text["seconds_a"] / text["seconds_b"])
    assert text["mb_per_second"] == pytest.approx(2 * 32 * 8 / text["seconds_b"] / 1e6)  # inputs and targets, int64
    assert [image["name"] for image in images] == ["images, workers 0", "images, crop_flip, workers 0"]
    assert images[0]["images_per_second"] == pytest.approx(4 / images[0]["seconds_b"])


def test_exponents_are_slopes_on_log_scales():
    assert scaling.exponent([1, 2, 4, 8], [3.0, 6.0, 12.0, 24.0]) == pytest.approx(1)
    assert scaling.exponent([1, 10], [5.0, 500.0]) == pytest.approx(2)
    assert scaling.exponent([1, 2, 4], [7.0, 7.0, 7.0]) == pytest.approx(0)


def test_scaling_fits_time_and_memory(capsys, monkeypatch):
    monkeypatch.setattr(scaling, "BASE", {"depth": 1, "width": 16, "context": 8, "vocab": 32, "batch": 2})
    monkeypatch.setitem(scaling.AXES, "depth", ("depth", [1, 2, 4]))
    found = said(capsys, "scaling", "--axes", "depth", "gradient norms", "--points", "3", *QUICK)
    time_by_depth, memory, norms = found["results"]
    assert time_by_depth["exponent"] == pytest.approx(scaling.exponent([1, 2, 4], time_by_depth["seconds"]))
    assert time_by_depth["within"] is (time_by_depth["exponent"] <= 1.05)
    assert memory["bytes"][0] < memory["bytes"][1] < memory["bytes"][2]
    assert 0 < memory["exponent"] < 1  # embeddings and logits are there at any depth
    assert len(norms["sizes"]) == 3


def test_startup_times_what_writes_its_mark(tmp_path, monkeypatch):
    given = Namespace(threads=1, clock="wall")
    mark = tmp_path / "mark"
    writing = "import time; time.sleep(0.2); open('mark', 'w').write(f'{time.time()} {time.process_time()}')"
    monkeypatch.setattr(startup, "TIMEOUT", 60)
    assert 0.2 < startup.start([sys.executable, "-c", writing], mark, given) < 60
    given.clock = "cpu"
    assert 0 < startup.start([sys.executable, "-c", writing], mark, given) < 10
    with pytest.raises(RuntimeError, match="no such thing"):
        startup.start([sys.executable, "-c", "raise SystemExit('no such thing')"], mark, given)


@pytest.mark.slow
def test_startup_reaches_the_first_step(capsys):
    (found,) = said(capsys, "startup", "--no-ranks", *QUICK)["results"]
    assert found["ratio"] == pytest.approx(found["seconds_a"] / found["seconds_b"])
    assert found["at_most"] == 1.15


def test_held_bytes_are_weights_gradients_and_state():
    model = torch.nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert held_bytes(model, optimizer) == 400
    model(torch.ones(1, 10)).sum().backward()
    assert held_bytes(model, optimizer) == 800
    optimizer.step()
    assert held_bytes(model, optimizer) == 1200


def test_the_peak_counts_every_linear_layer():
    now = iter(range(1000))  # each product takes one second
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    flops = 6 * 5 * (32 + 32 + 16)
    assert matmul_peak(model, 5, torch.float32, rounds=1, clock=lambda: next(now)) == pytest.approx(flops / 9)


def test_operations_have_a_class():
    names = {"aten::addmm": "matrix products", "aten::native_layer_norm": "norm", "aten::_fused_adamw_": "optimizer"}
    names |= {"aten::_scaled_dot_product_flash_attention_for_cpu": "attention", "aten::nll_loss_forward": "loss"}
    names |= {"aten::_foreach_norm": "clip and gradient norms", "aten::add": "elementwise and other"}
    assert {name: kind(name) for name in names} == names
    x = torch.randn(400, 400)
    shares = Shares()
    with shares:
        for _ in range(5):
            torch.matmul(x, x)
    assert max(shares.shares, key=lambda name: shares.shares[name] if name != FRAMEWORK else 0) == "matrix products"


def test_the_table_shows_limits_and_what_else_is_known():
    text = table([{"name": "x / y", "ratio": 1.5, "at_most": 2, "seconds_a": 3e-3, "seconds_b": 2e-3, "exponent": 1.0}])
    line = text.splitlines()[-1]
    for word in ("x / y", "1.500", "<= 2", "3.000", "2.000", "exponent 1"):
        assert word in line


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--width", "100"],
        ["train", "--vocab", "10"],
        ["train", "--rounds", "0"],
        ["overhead", "--depth", "2"],
        ["data", "--workers", "-1"],
        ["scaling", "--points", "1"],
        ["startup", "--rounds", "0"],
    ],
)
def test_mistakes_end_in_one_line(words, capsys):
    with pytest.raises(SystemExit) as caught:
        bench.main(words)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_run_of_wandb_starts_without_its_launch(tmp_path):
    script = """
import sys
from pathlib import Path
from trainkit.launch.wandb import WandB
logger = WandB(run_dir=Path("run"), log_dir=Path("logs"), run_id="abc", name="a", config={})
logger.log_metrics({"x": 1.0}, step=1)
logger.finish()
print(any(name.startswith("wandb.sdk.launch.inputs") for name in sys.modules), type(logger.experiment).__name__)
"""
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": str(RUN.parent)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.split() == ["False", "Run"]
    assert list(tmp_path.glob("logs/wandb/offline-run-*-abc/run-abc.wandb"))
