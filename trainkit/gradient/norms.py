"""The lengths of gradients, for treatments that look at them."""

from functools import reduce

import torch
from torch import Tensor


def norms(gradients: list[Tensor]) -> list[Tensor]:
    """‖g‖ of each, 0-d, all of one dtype of at least float32: squares overflow in half precision."""
    wide = reduce(torch.promote_types, (g.dtype for g in gradients), torch.float32)
    return list(torch._foreach_norm(gradients, 2, wide))


def total(lengths: list[Tensor]) -> Tensor:
    """The length of several gradients taken as one vector."""
    return torch.linalg.vector_norm(torch.stack(lengths))
