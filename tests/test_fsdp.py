"""trainer=fsdp: what is sharded over two processes is what one of them does, or is refused in one sentence."""

import copy
import json
import math
import shutil

import pytest
import torch
from torch import multiprocessing, nn

import trainkit
from tests.launch import sharded
from tests.menu import build, options
from tests.test_ranks import words  # noqa: F401  # a fixture
from tests.test_runs import door
from trainkit.launch.preflight import UserError, check
from trainkit.launch.process.engine import check_devices, engine
from trainkit.launch.process.fsdp import refuse
from trainkit.launch.sharded_checkpoint import read
from trainkit.model.parts.recompute import blocks_of, recompute

WHOLE = {"adagrad_norm", "adamp", "asam", "auon", "conda", "dct_adamw", "fira", "galore", "hybrid_auon", "lamb", "lars"}
WHOLE |= {"muon", "sam", "sgdp", "sinkgd", "swan", "trion"}
ELEMENTWISE = {"adagrad", "adamw", "diffgrad", "hf_adamw", "lion", "sgd"}


def compared(folder, cases, other: str) -> dict[sharded.Case, str | None]:
    """Of each case the sentence by which it is refused; None where it is not, and equals the other way to train it."""
    nodes = [sharded.configured(case) for case in cases]
    ways = ["fsdp"] if other == "alone" else ["fsdp", other]
    multiprocessing.spawn(sharded.on_rank, (str(folder), nodes, ways), nprocs=sharded.RANKS)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(sharded.RANKS)]
    refused: dict[sharded.Case, str | None] = {}
    for case, made, *found in zip(cases, nodes, *ranks, strict=True):
        sentences = {one["fsdp"].get("refused") for one in found}
        assert len(sentences) == 1, (case, sentences)
        (refused[case],) = sentences
        if refused[case] is None:
            alone = sharded.outcome(made, "alone") if other == "alone" else None
            for one in found:
                same(case, one["fsdp"], alone or one[other])
    return refused


def same(case, found, expected) -> None:
    assert list(found["weights"]) == list(expected["weights"])
    for name, value in expected["weights"].items():
        assert torch.allclose(found["weights"][name], value, rtol=1e-9, atol=1e-11), (case, name)
    for mine, theirs in zip(found["said"], expected["said"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-11), case


@pytest.mark.slow
def test_optimizers_treatments_and_projections_are_those_of_one_process_or_refused(tmp_path):
    assert set(options("optimizer")) == WHOLE | ELEMENTWISE
    refused = compared(tmp_path, [*sharded.optimizers(), *sharded.treatments(), *sharded.projections()], "alone")
    names = {case[0].partition("=")[2] for case, sentence in refused.items() if sentence is not None}
    spectral = set(options("projection")) - {"none", "unit"}
    assert names == WHOLE | {"agvm"} | spectral
    for case, sentence in refused.items():
        assert sentence is None or ("shard" in sentence and "Try trainer=ddp" in sentence and "\n" not in sentence), (
            case
        )


@pytest.mark.slow
def test_norms_are_those_of_ddp(tmp_path):
    """Statistics of a batch are a rank's own, and running ones rank 0's; so there is no single process to compare."""
    refused = compared(tmp_path, sharded.norms(), "ddp")
    assert [case for case, sentence in refused.items() if sentence is not None] == [("norm=nap",)]  # its projection


# --- whole runs ------------------------------------------------------------------------------------------------------

FSDP = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2"]
DDP = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
SHORT = ["logger=none", "trainer.max_steps=6", "trainer.val_check_interval=3"]


def ran(run, *argv) -> dict:
    """The last checkpoint of a run that ended well."""
    done = door(*argv, f"paths.run_dir={run}")
    assert done.returncode == 0, done.stderr
    return checkpoint(run)


def checkpoint(run) -> dict:
    return read(run / "checkpoints" / "last.ckpt")


def logged(run) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "per_second" not in k} for line in lines]


def trained(run) -> list[dict]:
    """What is logged about training: of a validation set that is not even, two processes leave out an item."""
    return [{k: v for k, v in line.items() if not k.startswith(("val/", "test/"))} for line in logged(run)]


def numbers(state: dict) -> dict[str, torch.Tensor]:
    """All tensors of weights and of the optimizer, by name."""
    found = {k: v for k, v in state["state_dict"].items() if v.is_floating_point()}
    for i, of_one in state["optimizer_states"][0]["state"].items():
        found |= {f"{i}.{k}": v for k, v in of_one.items() if isinstance(v, torch.Tensor)}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["trainer.accumulate_grad_batches=2", "trainer.activation_checkpointing=true"]])
def test_a_run_is_that_of_one_process(words, tmp_path, more):  # noqa: F811
    base = [*words, *SHORT, "trainer.precision=64-true", "data.batch_size=8", "optimizer=sgd"]
    one = ran(tmp_path / "one", *base)
    two = ran(tmp_path / "two", *base, *FSDP, *more)
    assert list(two["state_dict"]) == list(one["state_dict"])
    assert two["optimizer_states"][0]["param_groups"] == one["optimizer_states"][0]["param_groups"]
    for name, value in numbers(one).items():
        assert torch.allclose(numbers(two)[name], value, rtol=1e-9, atol=1e-12), name
    for mine, theirs in zip(trained(tmp_path / "two"), trained(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)  # all names, so gradient norms by site too
    network = trainkit.load(tmp_path / "two")
    weights = {k.removeprefix("model."): v for k, v in two["state_dict"].items()}
    assert all(torch.equal(v, weights[k].to(v.dtype)) for k, v in network.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["full", "sharded"])
def test_a_stopped_run_goes_on_bit_for_bit_also_in_one_process(words, tmp_path, form):  # noqa: F811
    base = [*words, *SHORT, *FSDP, "schedule=constant", "norm_layer=batch", "model.dropout=0.1"]
    whole = ran(tmp_path / "whole", *base)
    ran(tmp_path / "half", *base, f"trainer.checkpoint={form}", "trainer.max_steps=3")
    folder = tmp_path / "half" / "checkpoints" / "shards"
    assert sorted(path.name for path in folder.rglob("*.ckpt")) == (["0.ckpt", "1.ckpt"] if form == "sharded" else [])
    shutil.copytree(tmp_path / "half", tmp_path / "other")
    on = ["trainer.max_steps=6", *(word for word in words if word.startswith("paths."))]
    done = door(f"resume={tmp_path / 'half'}", *on)
    assert done.returncode == 0, done.stderr
    assert all(torch.equal(numbers(checkpoint(tmp_path / "half"))[k], v) for k, v in numbers(whole).items())
    whole_steps, half_steps = (
        {line["step"]: line for line in trained(tmp_path / run) if "train/loss" in line} for run in ("whole", "half")
    )
    assert {step: half_steps[step] for step in whole_steps} == whole_steps
    done = door(f"resume={tmp_path / 'other'}", "trainer=cpu", *on)
    assert done.returncode == 0, done.stderr
    assert checkpoint(tmp_path / "other")["global_step"] == 6
    done = door("mode=eval", f"resume={tmp_path / 'half'}", on[1], f"paths.run_dir={tmp_path / 'eval'}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "eval" / "result.json").read_text())["metrics"]
    assert found["val/loss"] == pytest.approx(logged(tmp_path / "half")[-1]["val/loss"], rel=1e-6)


@pytest.mark.slow
def test_a_rank_without_room_for_its_shard_ends_the_run_with_what_was_saved_before(words, tmp_path):  # noqa: F811
    full = ["plugins=[tests]", "+callbacks.full._target_=tests.launch.witness.FullDisk", "+callbacks.full.rank=1"]
    base = [*words, *SHORT, *FSDP, "trainer.checkpoint=sharded", *full, "+callbacks.full.step=6"]
    done = door(*base, f"paths.run_dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert "the disk is full; the run has stopped and its older checkpoints are intact" in done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], "the disk is full" in result["reason"]) == ("failed", True)
    assert checkpoint(tmp_path / "run")["global_step"] == 3
    (tag,) = (tmp_path / "run" / "checkpoints" / "shards").iterdir()
    assert tag.name.startswith("00000003_")
    alone = [
        "trainer=cpu",
        "plugins=[tests]",
        "callbacks.full.step=100",
        *(word for word in words if word.startswith("paths.")),
    ]
    done = door(f"resume={tmp_path / 'run'}", *alone)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_bfloat16_stays_close_to_one_process(words, tmp_path):  # noqa: F811
    base = [*words, *SHORT, "trainer.precision=bf16-mixed", "data.batch_size=8"]
    ran(tmp_path / "one", *base)
    two = ran(tmp_path / "two", *base, *FSDP)
    assert {v.dtype for v in numbers(two).values()} == {torch.float32}  # what is kept, and stepped
    for mine, theirs in zip(trained(tmp_path / "two"), trained(tmp_path / "one"), strict=True):
        losses = [line.get("train/loss", 0.0) for line in (mine, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.slow
def test_ddp_sends_once_per_step_and_its_options_change_no_number(words, tmp_path):  # noqa: F811
    base = [*words, *SHORT, *DDP, "trainer.precision=64-true", "data.batch_size=8", "trainer.accumulate_grad_batches=2"]
    sent = ["plugins=[tests]", "+callbacks.sent._target_=tests.launch.witness.Sent", "trainer.bucket_cap_mb=1000"]
    plain = ran(tmp_path / "plain", *base, *sent)
    buckets = [json.loads((tmp_path / "plain" / f"sent_{rank}.json").read_text()) for rank in range(2)]
    assert buckets == [6, 6]  # as many as steps, of twelve micro-batches
    other = ["trainer.gradient_as_bucket_view=false", "trainer.bucket_cap_mb=0.001", "trainer.static_graph=true"]
    changed = ran(tmp_path / "changed", *base, *other, "trainer.accumulate_grad_batches=1")
    half = ran(tmp_path / "half", *base, "trainer.gradient_compression=bf16")
    for name, value in numbers(plain).items():
        assert torch.allclose(numbers(changed)[name], value, rtol=1e-9, atol=1e-12), name
    assert any(not torch.equal(numbers(half)[name], value) for name, value in numbers(plain).items())
    assert logged(tmp_path / "half")[-1]["val/loss"] == pytest.approx(
        logged(tmp_path / "plain")[-1]["val/loss"], rel=1e-2
    )


# --- activation checkpointing ----------------------------------------------------------------------------------------


DIGITS = ["data=digits", "data.image=[1,8,8]", "data.classes=10"]


@pytest.mark.parametrize("model", ["gpt", "cnn", "vit", "mlp"])
def test_recomputed_blocks_give_the_same_bits_and_keep_less(model):
    small = {"gpt": [*sharded.SMALL, "model.dropout=0.2"], "vit": ["model.depth=2", "model.dropout=0.2", *DIGITS]}
    torch.manual_seed(0)
    plain = build("model", f"model={model}", *small.get(model, ["norm_layer=batch", *DIGITS]))
    twin = copy.deepcopy(plain)
    for block in blocks_of(twin):
        recompute(block)
        recompute(block)  # once is enough
    assert list(twin.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in twin.named_modules()] == [name for name, _ in plain.named_modules()]
    x = torch.randint(64, (4, sharded.LENGTH)) if model == "gpt" else torch.randn(4, 1, 8, 8)
    (bits, kept), (same_bits, less) = (measured(network, x) for network in (plain, twin))
    assert all(torch.equal(a, b) for a, b in zip(bits, same_bits, strict=True))  # type: ignore[arg-type]
    assert less < 0.75 * kept


def measured(network: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor | None], int]:
    """Gradients and buffers after a step, and the bytes that the forward keeps for the backward."""
    sizes: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if not isinstance(t, nn.Parameter):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = network(x).square().mean()
    kept = sum(sizes.values())
    loss.backward()
    return [*(p.grad for p in network.parameters()), *network.buffers()], kept


def test_blocks_are_the_declared_ones_or_the_longest_list():
    assert blocks_of(nn.Linear(2, 2)) == []
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))))
    assert blocks_of(net) == list(net[1].children())
    net.blocks = nn.ModuleList([nn.Linear(2, 2)])
    assert blocks_of(net) == list(net.blocks)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["trainer=fsdp", "trainer.devices=1"], "trainer=fsdp shards over several devices"),
        (["trainer=fsdp", "trainer.precision=16-mixed"], "trainer=fsdp has trainer.precision=32-true"),
        (
            ["trainer=ddp", "trainer.gradient_compression=fp8"],
            "is none or bf16; got 'fp8'",
        ),
        (["trainer=ddp", "trainer.bucket_cap_mb=0"], "trainer.bucket_cap_mb must be above 0"),
        (["trainer=fsdp", "trainer.static_graph=true"], "static_graph"),
        (["trainer=ddp", "trainer.static_graph=true", "trainer.accumulate_grad_batches=2"], "torch cannot accumulate"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_built(argv, says):
    with pytest.raises(UserError, match=says):
        check(argv)


def test_options_of_another_engine_are_refused():
    with pytest.raises(ValueError, match="static_graph is an option of trainer"):
        engine("auto", "32-true", static_graph=True)
    with pytest.raises(ValueError, match="reshard_after_forward is an option of trainer"):
        engine("ddp", "32-true", reshard_after_forward=False)
    with pytest.raises(ValueError, match=r"trainer\.checkpoint is one of full, sharded; got 'one'"):
        engine("fsdp", "32-true", checkpoint="one")


@pytest.mark.parametrize(("here", "remedy"), [(0, "trainer.accelerator=cpu"), (1, "trainer.devices=1"), (8, None)])
def test_more_gpus_than_there_are_is_one_line(monkeypatch, here, remedy):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for devices in ("auto", -1, [0], 1 if here else "auto"):
        check_devices("gpu", devices)
    check_devices("cpu", 9)
    if remedy is None:
        check_devices("gpu", 8)
        return
    with pytest.raises(ValueError, match=r"trainer\.devices=9 .* GPU") as caught:
        check_devices("gpu", 9)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", options("continual"))
def test_streams_of_tasks_are_refused(name):
    task = build("task", "model=cnn", f"continual={name}", "norm_layer=batch", "data=split_digits", *DIGITS[1:])
    with pytest.raises(ValueError, match="learners of a task stream copy and compare"):
        refuse(task)


def test_single_numbers_are_refused():
    task = build("task", "model=gpt", *sharded.SMALL)
    task.model.temperature = nn.Parameter(torch.tensor(math.pi))
    with pytest.raises(ValueError, match="temperature is a single number"):
        refuse(task)
