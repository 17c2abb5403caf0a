"""What needs several GPUs: python -m pytest -m gpu."""

import pytest
import torch

from tests.test_fsdp import checkpoint, numbers, ran, trained
from tests.test_ranks import words  # noqa: F401  # a fixture
from tests.test_runs import door

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"needs 2 GPUs of one machine, and this one has {GPUS}"),
]
SHORT = ["logger=none", "trainer.max_steps=6", "trainer.val_check_interval=3", "data.batch_size=8"]
DOUBLE = ["trainer.precision=64-true"]
TWO = ["trainer.devices=2", "trainer.accelerator=gpu"]


@pytest.mark.parametrize(
    "way",
    [
        ["trainer=fsdp"],
        ["trainer=fsdp", "trainer.checkpoint=sharded"],
        ["trainer=fsdp", "trainer.reshard_after_forward=false", "trainer.accumulate_grad_batches=2"],
        ["trainer=fsdp", "trainer.activation_checkpointing=true"],
        ["trainer=ddp"],
        ["trainer=ddp", "trainer.static_graph=true"],
        ["trainer=ddp", "trainer.accumulate_grad_batches=2"],
    ],
)
def test_two_gpus_are_one(words, tmp_path, way):  # noqa: F811
    one = ran(tmp_path / "one", *words, *SHORT, *DOUBLE, "trainer=gpu")
    two = ran(tmp_path / "two", *words, *SHORT, *DOUBLE, *way, *TWO)
    for name, value in numbers(one).items():
        assert torch.allclose(numbers(two)[name].cpu(), value.cpu(), rtol=1e-9, atol=1e-10), name
    for mine, theirs in zip(trained(tmp_path / "two"), trained(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("engine", ["fsdp", "ddp"])
def test_bfloat16_stays_close_to_one_gpu(words, tmp_path, engine):  # noqa: F811
    half = ["trainer.precision=bf16-mixed", *(["trainer.gradient_compression=bf16"] if engine == "ddp" else [])]
    ran(tmp_path / "one", *words, *SHORT, "trainer=gpu", "trainer.precision=bf16-mixed")
    two = ran(tmp_path / "two", *words, *SHORT, f"trainer={engine}", *TWO, *half)
    assert {v.dtype for v in numbers(two).values()} == {torch.float32}
    for mine, theirs in zip(trained(tmp_path / "two"), trained(tmp_path / "one"), strict=True):
        losses = [line.get("train/loss", 0.0) for line in (mine, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_a_stopped_run_goes_on_bit_for_bit(words, tmp_path):  # noqa: F811
    base = [
        *words,
        *SHORT,
        "trainer=fsdp",
        *TWO,
        "schedule=constant",
        "model.dropout=0.1",
        "trainer.deterministic=true",
    ]
    settings = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    for run, steps in (("whole", 6), ("half", 3)):
        done = door(*base, f"trainer.max_steps={steps}", f"paths.run_dir={tmp_path / run}", **settings)
        assert done.returncode == 0, done.stderr
    folders = [word for word in words if word.startswith("paths.")]
    done = door(f"resume={tmp_path / 'half'}", "trainer.max_steps=6", *folders, **settings)
    assert done.returncode == 0, done.stderr
    whole, half = (numbers(checkpoint(tmp_path / run)) for run in ("whole", "half"))
    assert all(torch.equal(half[name], value) for name, value in whole.items())


def test_more_gpus_than_there_are_is_one_line(words, tmp_path):  # noqa: F811
    done = door(*words, "logger=none", "trainer=fsdp", f"trainer.devices={GPUS + 1}", "trainer.accelerator=gpu")
    assert done.returncode == 2
    assert f"trainer.devices={GPUS + 1}" in done.stderr
    assert not list((tmp_path / "logs").rglob("result.json"))
