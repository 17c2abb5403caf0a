"""Whole runs: the statistics of norm layers that follow the optimizer's steps do move, and by those steps."""

import pytest
import torch

import trainkit
from tests.test_runs import corpus, words  # noqa: F401  # fixtures

MOVING = {"batch": ("running_mean", "running_var"), "power": ("running_square", "running_gradient")}
COUNTERS = {"batch": "num_batches_tracked", "power": "steps"}


@pytest.mark.filterwarnings("ignore:.*leaks the future")
@pytest.mark.parametrize("norm_layer", MOVING)
def test_statistics_move_once_per_optimizer_step(words, norm_layer):  # noqa: F811
    run = trainkit.run(
        [
            *words,
            f"norm_layer={norm_layer}",
            "norm_layer.count=step",
            "trainer.accumulate_grad_batches=2",
            "callbacks.checkpoint.every_n_steps=3",
        ]
    ).dir
    states = [
        torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
        for name in ("previous", "last")
    ]
    for name in MOVING[norm_layer]:
        keys = [key for key in states[0] if key.endswith(f".{name}")]
        assert keys
        for key in keys:
            start = torch.ones if name in ("running_var", "running_square") else torch.zeros
            before, after = (state[key] for state in states)
            assert not torch.equal(before, start(before.shape, dtype=before.dtype)), f"{key} has not moved by step 3"
            assert not torch.equal(before, after), f"{key} has not moved from step 3 to 6"
    for step, state in zip((3, 6), states, strict=True):
        assert {int(value) for key, value in state.items() if key.endswith(f".{COUNTERS[norm_layer]}")} == {step}
