"""Optimizers that take two gradients per step, in training: a second pass like the first, at other weights."""

from functools import partial

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

import trainkit
from tests.callbacks.toy import WIDTH, Network, Toy, fit, rows
from tests.test_runs import corpus, door, losses, words  # noqa: F401
from trainkit.gradient.clip import Clip
from trainkit.launch.explain import UserError
from trainkit.norm_layer.batch import BatchNorm
from trainkit.optimizer.sam import SAM

BASE = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


class Counting(nn.Module):
    """Batch norms that count forwards and optimizer steps, dropout, and what each training forward drew and met."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([BatchNorm(WIDTH), BatchNorm(WIDTH, count="step")])
        self.dropout = nn.Dropout(0.5)
        self.met: list[tuple] = []

    def forward(self, x):
        for norm in self.norms:
            x = norm(x)
        dropped = self.dropout(torch.ones_like(x))
        if self.training:
            self.met.append((dropped.tolist(), self.norms[0].running_mean.tolist()))
        return x * dropped


def toy(optimizer, **changed):
    task = Toy(optimizer=optimizer, **changed)
    torch.manual_seed(0)
    task.model = Network()
    task.model.blocks.append(Counting())
    return task


def buffers(task):
    return {name: value.clone() for name, value in task.model.named_buffers()}


@pytest.mark.parametrize("batches", [1, 3])
def test_with_rho_zero_it_is_the_base_bit_for_bit(tmp_path, batches):
    """So the random numbers, the buffers before each forward, and all that follows are those of the first pass."""
    runs = []
    for name, factory in (("base", BASE), ("sam", partial(SAM, base=BASE, rho=0.0))):
        task = toy(factory, gradient=Clip(0.5))
        fit(tmp_path / name, [], task=task, accumulate_grad_batches=batches)
        runs.append((task, [row["train/loss"] for row in rows(tmp_path / name)]))
    (base, logged), (sam, logged_too) = runs
    assert logged == logged_too
    for (name, value), (_, other) in zip(base.state_dict().items(), sam.state_dict().items(), strict=True):
        assert torch.equal(value, other), name
    met, met_too = base.model.blocks[-1].met, sam.model.blocks[-1].met
    assert len(met_too) == 2 * len(met) == 2 * 12 * batches
    for step in range(0, len(met), batches):
        expected = met[step : step + batches]
        assert met_too[2 * step : 2 * (step + batches)] == expected + expected


def test_statistics_and_the_logged_loss_are_those_of_the_first_pass(tmp_path):
    tasks = [toy(BASE), toy(partial(SAM, base=BASE, rho=0.5))]
    for name, task in zip(("base", "sam"), tasks, strict=True):
        fit(tmp_path / name, [], task=task, max_steps=1)
    assert rows(tmp_path / "base")[0]["train/loss"] == rows(tmp_path / "sam")[0]["train/loss"]
    one, two = (buffers(task) for task in tasks)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert two["blocks.2.norms.1.num_batches_tracked"] == 1  # told of the optimizer's step
    assert not torch.equal(*(torch.cat([p.flatten() for p in task.model.parameters()]) for task in tasks))


def test_the_gradient_that_is_treated_is_the_second(tmp_path):
    seen = []

    def treatment(gradients):
        seen.append(torch.cat([g.flatten() for g in gradients]))
        return {"grad_norm/clipped": seen[-1].norm()}

    task = toy(partial(SAM, base=BASE, rho=0.5), gradient=treatment)
    first = []
    task.on_before_optimizer_step = lambda *_: first.append(
        torch.cat([p.grad.flatten() for p in task.model.parameters()])
    )
    fit(tmp_path, [], task=task, max_steps=2, accumulate_grad_batches=2)
    assert len(seen) == len(first) == 2
    assert not any(torch.allclose(a, b) for a, b in zip(seen, first, strict=True))
    assert rows(tmp_path)[0]["grad_norm/clipped"] == pytest.approx(seen[0].norm().item())


def test_half_precision_with_a_scaled_loss_is_refused(tmp_path):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="Try bf16-mixed or 32-true"):
        fit(tmp_path, [], task=toy(partial(SAM, base=BASE)), plugins=[plugin], precision=None)


def test_gradients_are_treated_unscaled_under_fused_optimizers(tmp_path):
    norms = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=128.0))]):
        seen = []

        def treatment(gradients, seen=seen):
            seen.append(torch.stack(torch._foreach_norm(gradients)).norm().item())
            return {}

        task = Toy(optimizer=partial(torch.optim.AdamW, fused=True), gradient=treatment)
        options = {"precision": None} if plugins else {}
        fit(tmp_path / str(len(plugins)), [], task=task, max_steps=3, plugins=plugins, **options)
        norms.append(seen)
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


# --- whole runs --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_accumulation_gives_the_same_training(words):  # noqa: F811
    words = [*words, "optimizer=sam", "optimizer/base=sgd", "trainer.precision=64-true", "optimizer.rho=0.5"]
    whole, parts = (trainkit.run([*words, f"trainer.accumulate_grad_batches={n}"]).dir for n in (1, 2))
    plain = trainkit.run([*words, "optimizer.rho=0"]).dir
    assert losses(plain)[0] == losses(whole)[0]
    assert losses(plain)[-1][1] != pytest.approx(losses(whole)[-1][1], rel=1e-4)
    for (step, a), (other, b) in zip(losses(whole), losses(parts), strict=True):
        assert step == other
        assert a == pytest.approx(b, rel=1e-9)


@pytest.mark.filterwarnings("ignore:PowerNorm in a causal model leaks")
@pytest.mark.slow
def test_resume_continues_as_if_never_stopped(words):  # noqa: F811
    words = [
        *words,
        "optimizer=asam",
        "optimizer/base=lion",
        "schedule=constant",
        "model.dropout=0.1",
        "norm_layer=power",
    ]
    unbroken = trainkit.run([*words, "trainer.max_steps=8"]).dir
    run = trainkit.run([*words, "trainer.max_steps=4"]).dir
    with pytest.raises(UserError, match=r"optimizer\.base\._target_"):
        trainkit.run([f"resume={run}", "trainer.max_steps=8", "optimizer=asam", "optimizer/base=sgd"])
    trainkit.run([f"resume={run}", "trainer.max_steps=8"])
    assert losses(run) == losses(unbroken)
    a, b = (torch.load(d / "checkpoints" / "last.ckpt", weights_only=True) for d in (run, unbroken))
    assert all(torch.equal(a["state_dict"][k], v) for k, v in b["state_dict"].items())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_two_processes_give_the_training_of_one(words, tmp_path, optimizer):  # noqa: F811
    """Both gradients are averaged, and halves of the batch are the same ones among ranks and among micro-batches."""
    words = [*words, f"optimizer={optimizer}", "trainer.precision=64-true", "data.batch_size=8"]
    words += ["optimizer/base=sgd", "optimizer.rho=0.5"] if optimizer == "sam" else []
    words += ["gradient=agvm", "gradient.start=2", "gradient.interval=2", "gradient.momentum=0.5"]
    logs = []
    for name, more in (
        ("one", ["trainer.accumulate_grad_batches=2"]),
        ("two", ["trainer=ddp", "trainer.accelerator=cpu"]),
    ):
        done = door(*words, *more, f"paths.run_dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        logs.append(rows(tmp_path / name, "agvm/head"))
    assert len(logs[0]) == len(logs[1]) == 3
    assert all(logs[0][1][f"agvm/blocks.{i}"] != 1 for i in (0, 1))
    for row, twin in zip(*logs, strict=True):
        for key in ("train/loss", "agvm/embed", "agvm/blocks.0", "agvm/blocks.1", "agvm/head"):
            assert twin[key] == pytest.approx(row[key], rel=1e-8), (key, row["step"])
