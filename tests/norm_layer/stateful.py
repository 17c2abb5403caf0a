"""The layers with a memory, and how the tests train them."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from trainkit.norm_layer.batch import batch
from trainkit.norm_layer.power import PowerNorm
from trainkit.norm_layer.power_v import PowerNormV
from trainkit.norm_layer.prep_batch import PRepBN
from trainkit.norm_layer.rep_batch import RepBN
from trainkit.norm_layer.unified import UnifiedNorm

WIDTH = 8
# Short warm-ups, so that a handful of steps reaches every branch.
LAYERS = {
    "batch": batch,
    "power": partial(PowerNorm, warmup=1, groups=2),
    "power_v": PowerNormV,
    "unified": partial(UnifiedNorm, warmup=1, window=[2, 3]),
    "unified_filtered": partial(UnifiedNorm, warmup=2, window=2, filtration=True),
    "rep_batch": RepBN,
    "prep_batch": partial(PRepBN, warm=1, steps=3),
}
COUNTS = ("step", "call")

layers = pytest.mark.parametrize("name", LAYERS)
counts = pytest.mark.parametrize("count", COUNTS)


@pytest.fixture(autouse=True)
def float64():
    """Numbers that are compared, on one thread: the tensors are too small for more."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def make(name: str, **knobs) -> nn.Module:
    """A layer whose parameters are not at their neutral starting values."""
    layer = LAYERS[name](WIDTH, **knobs)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in layer.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k].double(), b[k].double(), **tolerance) for k in a)


def counters(stored: dict[str, Tensor]) -> list[int]:
    return [int(b) for b in stored.values() if not b.is_floating_point()]


def train(layer: nn.Module, x: Tensor, gy: Tensor, **inputs) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x, **inputs)
    y.backward(gy)
    return y.detach(), x.grad


def data(count: int, *shape: int) -> list[tuple[Tensor, Tensor]]:
    shape = shape or (3, 5, WIDTH)
    return [(torch.randn(shape) * (1 + t), torch.randn(shape)) for t in range(count)]
