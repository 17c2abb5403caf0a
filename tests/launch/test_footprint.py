"""Parameters and optimizer state are measured, not guessed."""

from types import SimpleNamespace

import torch
from torch import nn

from trainkit.launch.footprint import footprint, state_bytes


def stepped(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def test_adamw_keeps_two_numbers_per_parameter_and_a_step_count_per_tensor():
    model = nn.Linear(10, 5)
    model.bias.requires_grad_(False)
    optimizer = stepped(torch.optim.AdamW([model.weight]))
    task = SimpleNamespace(model=model, flops_per_token=None, tokens_per_step=None)
    assert footprint(task, [optimizer], 3) == {"parameters": 50, "optimizer_state_bytes": 50 * 8 + 4}
    task.flops_per_token, task.tokens_per_step = 300, 64
    assert footprint(task, [optimizer], 3)["training_flops"] == 300 * 64 * 3


def test_plain_sgd_keeps_nothing():
    model = nn.Linear(10, 5)
    assert state_bytes([stepped(torch.optim.SGD(model.parameters(), lr=0.1))]) == 0


def test_memory_is_counted_once_and_found_in_any_depth():
    p = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([p], lr=0.1)
    shared = torch.zeros(100)
    optimizer.state[p] = {"views": [shared[:3], shared[50:]], "own": {"x": (torch.zeros(7, dtype=torch.bfloat16), 3)}}
    assert state_bytes([optimizer, optimizer]) == 400 + 14
