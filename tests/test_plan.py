"""mode=plan: its numbers beside those of real steps and real runs."""

import json
import os
import resource
import subprocess
import sys
from math import ceil, prod
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import trainkit
from trainkit.bench.timing import kept_bytes, peak_bytes
from trainkit.launch.explain import UserError
from trainkit.launch.job import build_task
from trainkit.launch.mode.planner import Device, facts, prepare
from trainkit.launch.mode.remedies import remedies
from trainkit.launch.preflight import check
from trainkit.launch.process import room
from trainkit.model.parts.recompute import blocks_of, recompute
from trainkit.optimizer.dct import basis, dct
from trainkit.optimizer.partition import by_role, roles, split
from trainkit.plan.ledger import imitating
from trainkit.plan.memory import GIB, Layout, memory, shard, traffic
from trainkit.plan.optimizer import optimizer_memory
from trainkit.plan.step import measure_pass
from trainkit.task.lm import LanguageModeling

ROOT = Path(__file__).parents[1]
GPT = ["model=gpt", "data.batch_size=8"]
LLAMA = ["model=llama_9m", "data.vocab=2000", "model.context=64", "data.batch_size=4"]
RESNET = ["model=resnet18", "data.batch_size=64", "data.image=[3,32,32]", "data.classes=10", "model.width=16"]
STEPS = {
    "gpt, 2 blocks": [*GPT, "model.depth=2"],
    "gpt, 6 blocks": [*GPT, "model.depth=6"],
    "gpt, autocast": [*GPT, "model.depth=4", "trainer.precision=bf16-mixed"],
    "gpt, bfloat16": [*GPT, "model.depth=2", "trainer.precision=bf16-true"],
    "gpt, placements that differ by layer": [*GPT, "model.depth=6", "norm=mix"],
    "gpt, a pair of streams": [*GPT, "model.depth=4", "norm=residual_dual"],
    "llama, 2 blocks": [*LLAMA, "model.depth=2"],
    "llama, 8 blocks": [*LLAMA, "model.depth=8"],
    "llama, accumulated": [*LLAMA, "model.depth=4", "trainer.accumulate_grad_batches=2"],
    "llama, muon": [*LLAMA, "model.depth=4", "optimizer=muon"],
    "resnet18": RESNET,
}


def config(*words: str):
    return check(["mode=plan", *words]).configs[0]


class Real:
    """The same step with real tensors: forward, old gradients freed, backward, optimizer, as Lightning orders them."""

    def __init__(self, cfg):
        facts(cfg)
        precision = str(cfg.trainer.precision)
        self.task = build_task(cfg)
        if precision == "bf16-true":
            self.task.model.to(torch.bfloat16)
        self.mixed = precision == "bf16-mixed"
        self.accumulate = cfg.trainer.accumulate_grad_batches
        size = cfg.data.batch_size // self.accumulate
        if "context" in cfg.data:
            tokens = torch.randint(cfg.data.vocab, (2, size, cfg.data.context))
            self.batch = (tokens[0].clone(), tokens[1].clone())
        else:
            self.batch = (torch.randn(size, *cfg.data.image), torch.randint(cfg.data.classes, (size,)))
        factory, words = split(self.task.optimizer_factory)
        self.optimizer = by_role(self.task.model, factory, **words)

    def loss(self):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
            return self.task.loss(self.task.model, self.batch)

    def step(self):
        for micro in range(self.accumulate):
            loss = self.loss()
            if micro == 0:
                self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()

    def peak(self):
        """Bytes beyond what is there between two steps; the profiler's first measurement is off."""
        self.step()
        peak_bytes(self.step)
        return peak_bytes(self.step)


@pytest.mark.parametrize("words", STEPS.values(), ids=STEPS)
def test_the_peak_is_that_of_a_real_step(words):
    cfg = config(*words)
    planner = prepare(cfg.copy())
    real = Real(cfg)
    needed = planner.memory
    standing = needed.weights + needed.gradients + needed.state + planner.numbers.step.batch
    assert needed.peak - standing == pytest.approx(real.peak(), rel=0.1)


@pytest.mark.parametrize(
    "words", [STEPS["gpt, 6 blocks"], STEPS["llama, 8 blocks"], RESNET], ids=["gpt", "llama", "r18"]
)
def test_activations_are_what_a_real_forward_saves(words):
    cfg = config(*words)
    real = Real(cfg)
    inputs = real.batch[0]
    saved = kept_bytes(real.task.model, inputs)
    found = measure_pass(real.task.model, lambda model, x: model(x).sum(), lambda: torch.zeros_like(inputs))
    planned = found.batch + sum(segment.kept for segment in found.segments)
    assert planned == pytest.approx(saved, rel=0.1)


@pytest.mark.parametrize("words", [[*GPT, "model.depth=8"], [*LLAMA, "model.depth=8"]], ids=["gpt", "llama"])
@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_checkpointing_saves_what_it_saves(words, precision):
    cfg = config(*words, f"trainer.precision={precision}", "trainer.activation_checkpointing=true")
    planner, real = prepare(cfg.copy()), Real(cfg)
    for block in blocks_of(real.task.model):
        recompute(block)
    needed = planner.memory
    standing = needed.weights + needed.gradients + needed.state + planner.numbers.step.batch
    assert needed.peak - standing == pytest.approx(real.peak(), rel=0.1)
    without = memory(planner.numbers, Layout())
    assert needed.activations < without.activations / 3


@pytest.mark.parametrize(
    "words", [STEPS["gpt, 6 blocks"], STEPS["llama, 8 blocks"], RESNET], ids=["gpt", "llama", "r18"]
)
def test_flops_are_those_of_a_real_step(words):
    cfg = config(*words)
    planner, real = prepare(cfg.copy()), Real(cfg)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # which counts no CPU's attention
        real.loss().backward()
    assert planner.flops * planner.samples == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize(
    "optimizer",
    ["adamw", "muon", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sinkgd", "galore", "dct_adamw"))],
)
def test_optimizer_state_is_that_of_a_real_run(optimizer, tmp_path):
    words = ["model=llama_9m", "model.depth=3", "model.width=32", "model.hidden=80", "model.context=32"]
    words += [f"optimizer={optimizer}", "data.batch_size=4", f"paths.log_dir={tmp_path}", "trainer.threads=1"]
    words += ["logger=none", "callbacks=none", "trainer.max_steps=2", "data.val_batches=1", "data.test_batches=1"]
    result = trainkit.run(words)
    recorded = json.loads((result.dir / "result.json").read_text())
    planned = sum(prepare(config(*words)).numbers.optimizer.state.values())
    assert planned == pytest.approx(recorded["optimizer_state_bytes"], rel=1e-3)


def test_copies_beside_the_state_are_counted():
    task = Real(config(*GPT, "optimizer=sam", "model.depth=2")).task
    weights = sum(p.numel() for p in task.model.parameters()) * 4
    found = optimizer_memory(roles(task.model), task.optimizer_factory)
    assert found.beside == pytest.approx(weights, rel=0.01)


def test_imitated_tensors_are_not_remembered():
    with imitating():
        basis("dct3", 8, torch.device("cpu"), torch.float32)
    rows = dct(8, torch.device("cpu"), torch.float64)
    torch.testing.assert_close(rows @ rows.T, torch.eye(8, dtype=torch.float64))


def test_depth_costs_what_it_costs_without_being_measured():
    """A deep model is measured by two of its blocks; all of them give the same."""
    cfg = config(*GPT, "model.depth=6")
    facts(cfg)
    planner = prepare(cfg.copy())
    task = build_task(cfg)
    import trainkit.plan.step as step

    before, step.ENOUGH = step.ENOUGH, 99
    try:
        full = step.measure_pass(task.model, task.loss, lambda: (torch.zeros(8, 128, dtype=torch.int64),) * 2)
    finally:
        step.ENOUGH = before
    assert [s.kept for s in full.blocks] == [s.kept for s in planner.numbers.step.blocks]
    assert full.flops == planner.numbers.step.flops


def test_shards_are_the_fullest_devices_share():
    shapes = [(10, 3), (4,), (128, 7)]
    held = sum(ceil(shape[0] / 4) * prod(shape[1:]) for shape in shapes)
    assert shard(shapes, 4) == held / sum(prod(shape) for shape in shapes)
    assert shard(shapes, 1) == 1


def test_layouts_by_hand():
    numbers = prepare(config(*LLAMA, "model.depth=4")).numbers
    count = sum(prod(shape) for shape in numbers.shapes)
    block = numbers.block
    assert numbers.outside + 4 * block == count
    one = memory(numbers, Layout())
    assert (one.weights - numbers.buffers, one.gradients, one.state) == (4 * count, 4 * count, numbers.optimizer.kept)
    ddp = memory(numbers, Layout("ddp", 8, bucket_view=False))
    assert ddp.peak == one.peak + 4 * count
    assert traffic(numbers, Layout("ddp", 8)) == round(2 * 7 / 8 * 4 * count)
    assert traffic(numbers, Layout("ddp", 8, gradient=2)) == round(2 * 7 / 8 * 2 * count)
    fsdp = Layout("fsdp", 8, accumulate=2, block_weight=2)
    sharded = memory(numbers, fsdp)
    assert sharded.weights - numbers.buffers == pytest.approx(4 * count / 8, rel=0.01)
    assert sharded.state == pytest.approx(numbers.optimizer.kept / 8, rel=0.01)
    assert sharded.gathered == 2 * block * 2 + numbers.outside * 4 + block * 4
    assert traffic(numbers, fsdp) == round(7 / 8 * 2 * (2 * 4 * block * 2 + numbers.outside * 4 + count * 4))
    assert memory(numbers, Layout("fsdp", 1)).peak == one.peak


@pytest.mark.slow
def test_what_a_remedy_promises_a_plan_with_it_finds():
    words = [*LLAMA, "model.depth=8", "data.batch_size=8", "trainer.precision=32-true"]
    planner = prepare(config(*words))
    planner.device = Device("small", round(0.8 * planner.memory.peak), 1e12)
    found = {remedy.words.partition(" (")[0]: remedy.peak for remedy in remedies(planner, ["mode=plan", *words])}
    assert any(name.startswith("trainer.accumulate_grad_batches") for name in found)
    assert {"trainer.activation_checkpointing=true", "optimizer=lion"} < found.keys()
    assert any(name.startswith("trainer=fsdp") for name in found)
    assert next(iter(found.values())) <= planner.device.bytes
    for name, peak in found.items():
        typed = [w for w in words if w.split("=")[0] not in name] + name.split()
        again = prepare(config(*typed, "trainer.precision=32-true") if "precision" not in name else config(*typed))
        assert again.memory.peak == pytest.approx(peak, rel=0.02), name


# --- through the door ------------------------------------------------------------------------------------------------


def door(*argv: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    return subprocess.run([sys.executable, "run.py", *argv], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_7b_on_128_gpus_is_planned_on_a_laptop(tmp_path):
    argv = ["mode=plan", "model=llama_7b", "trainer=fsdp", "trainer.devices=8", "trainer.num_nodes=16"]
    argv += ["trainer.precision=bf16-mixed", "data.batch_size=512", "data.vocab=32000", "model.context=2048"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = door(*argv, f"paths.log_dir={tmp_path / 'logs'}", f"paths.cache_dir={tmp_path / 'cache'}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("FITS: ")
    assert "6,738,415,616" in done.stdout
    assert not list(tmp_path.iterdir())  # a plan creates nothing
    assert after.ru_maxrss < 2 * 2**20  # KiB
    assert after.ru_utime - before.ru_utime < 30


@pytest.mark.slow
def test_7b_on_one_gpu_does_not_fit_and_says_what_would(tmp_path):
    words = ["model=llama_7b", "trainer=gpu", "data.vocab=32000", "plan.device=H100", f"paths.run_dir={tmp_path / 'p'}"]
    result = trainkit.run(["mode=plan", *words])
    record = json.loads((tmp_path / "p" / "plan.json").read_text())
    count = 6_738_415_616  # embedding and head 2·32000·4096, 32 blocks of 4·4096² + 3·4096·11008 + 2·4096, one norm
    assert record["parameters"] == count == 2 * 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    # weights, gradients, two moments, all of 4 bytes (a step count of 4 bytes per tensor besides)
    assert record["optimizer_state_bytes"] == pytest.approx(8 * count, rel=1e-6)
    assert record["peak_bytes"] > 16 * count
    assert not record["fits"]
    weights = count - 32000 * 4096 - (2 * 32 + 1) * 4096  # a lookup and gains multiply no matrix
    assert record["flops_per_sample"] == 6 * weights + 12 * 32 * 4096 * 256
    assert any(line["words"].startswith("trainer=fsdp") and line["peak"] < 80e9 for line in record["remedies"])
    assert record["days"] == pytest.approx(record["flops"] / (0.4 * 989.4e12) / 86400)
    assert result.metrics["plan/parameters"] == count


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan.device=H99"], "H100"),
        (["plan.mfu=2"], "plan.mfu=2"),
        (["plan.memory_gib=0"], "plan.memory_gib=0"),
        (["resume=logs/gpt/1"], "leave out resume="),
        (["model=resnet18", "data=images", "data.name=any"], "data.image="),
        (["trainer.precision=transformer-engine"], "trainer.precision"),
    ],
)
def test_mistakes_are_told_in_a_sentence(words, said):
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        trainkit.run(["mode=plan", *words])


def test_logits_are_held_as_the_planned_device_holds_them():
    words = ["model=gpt", "model.depth=1", "data.vocab=50304", "data.batch_size=16"]
    here = prepare(config(*words, "trainer=cpu"))
    there = prepare(config(*words, "plan.device=H100", "trainer.precision=32-true"))
    logits = 4 * here.samples * 50304  # more than two pieces for a CPU, less than one for a GPU
    pieces, whole = here.numbers.step.last, there.numbers.step.last
    assert whole.kept > logits > 4 * pieces.forward
    assert pieces.flops == whole.flops  # each makes three products of all logits


def test_a_gpu_that_is_not_listed_is_still_a_gpu():
    planner = prepare(config("plan.device=Some GPU", "plan.memory_gib=24"))
    assert (planner.device.peak, planner.cfg.trainer.precision) == (None, "bf16-mixed")


def test_the_vocabulary_is_what_the_settings_say():
    assert "256" in facts(config())
    for words, vocab in ((["data.tokenizer=bpe"], 4096), (["data.vocab=50257"], 50257)):
        cfg = config(*words)
        assert f"{vocab:,}" in facts(cfg)
        assert cfg.data.vocab == vocab


# --- a run without room ----------------------------------------------------------------------------------------------

TINY = ["model.depth=2", "model.width=32", "model.context=16", "data.batch_size=4", "logger=none", "trainer.threads=1"]
TINY += ["data.val_batches=1", "data.test_batches=1", "trainer.max_steps=2", "callbacks=none"]


def test_a_model_too_large_for_the_gpu_is_refused_before_it_is_moved(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "room_of", lambda device: 300_000)
    with pytest.raises(UserError) as refused:
        trainkit.run([*TINY, f"paths.log_dir={tmp_path}"])
    said = str(refused.value)
    assert "optimizer state" in said
    assert "weights" in said
    assert "gradients" in said
    assert "trainer=fsdp" in said
    assert said.count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_a_model_with_room_is_not_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "room_of", lambda device: 600_000)
    assert trainkit.run([*TINY, f"paths.log_dir={tmp_path}"]).status == "finished"


def test_running_out_of_memory_names_what_took_it(tmp_path, monkeypatch):
    def out(self, model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(room, "room_of", lambda device: 80 * GIB)
    monkeypatch.setattr(LanguageModeling, "loss", out)
    with pytest.raises(UserError) as failed:
        trainkit.run([*TINY, f"paths.log_dir={tmp_path}"])
    said = str(failed.value)
    assert "weights" in said
    assert "80.0 GiB" in said
    assert said.count("\n") == 2
    remedies_said = ["accumulate_grad_batches=2", "activation_checkpointing=true", "precision=bf16-mixed"]
    assert all(word in said for word in remedies_said)
    result = next(tmp_path.rglob("result.json"))
    record = json.loads(result.read_text())
    assert record["status"] == "failed"
    assert record["reason"] == said
    assert "OutOfMemoryError" in (result.parent / "run.log").read_text()
