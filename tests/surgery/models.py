"""Small float64 models with every parameter away from its start, so that a misplaced norm or bias shows."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from trainkit.model.gpt import GPT
from trainkit.model.llama import Llama
from trainkit.model.mlp import ResidualMLP
from trainkit.model.vit import ViT
from trainkit.norm.placement import Placement
from trainkit.norm.pre import Pre
from trainkit.norm_layer.layer import LayerNorm

SIZES = {"depth": 2, "width": 12}
IMAGE = (1, 4, 4)


def tokens() -> Tensor:
    return torch.randint(20, (3, 7), generator=torch.Generator().manual_seed(1))


def images() -> Tensor:
    return torch.randn(5, *IMAGE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


GPT2 = partial(GPT, 20, heads=3, context=7, **SIZES)
LLAMA = partial(Llama, 20, heads=6, kv_heads=2, hidden=16, context=7, **SIZES)
VIT = partial(ViT, IMAGE, 5, heads=3, patch=2, **SIZES)
MLP = partial(ResidualMLP, IMAGE, 5, hidden=9, **SIZES)
# name -> (what builds the model, what makes its input)
MODELS: dict[str, tuple[Callable[..., nn.Module], Callable[[], Tensor]]] = {
    "gpt": (GPT2, tokens),
    "gpt with biases, a head and QK-norm": (partial(GPT2, bias=True, tie=False, qk_norm="head", gelu="tanh"), tokens),
    "llama": (LLAMA, tokens),
    "vit": (VIT, images),
    "mlp": (MLP, images),
}


def build(name: str, placement: Callable[..., Placement] = Pre, layer: Callable[..., nn.Module] = LayerNorm, **knobs):
    """The model with some placement and norm layer, and an input for it."""
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make(placement(layer), **knobs).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, inputs()
