"""Norm layers without state: every call sees its own input alone."""

import torch
from torch import Tensor, nn

from trainkit.norm_layer.qk import qk_norm

from ..registry import File, Layer, adapter, build

GAIN = {"weight": "gain"}


def width(file: File) -> int:
    return file["x/1"].shape[-1]


@adapter("LayerNorm")
def layer(file: File) -> Layer:
    settings = {"eps": file.hyperparameters["eps"], "bias": "param/bias" in file}
    return Layer(build("norm_layer", "layer", settings, width(file)), params=GAIN)


@adapter("RMSNorm")
def rms(file: File) -> Layer:
    return Layer(build("norm_layer", "rms", {"eps": file.hyperparameters["eps"]}, width(file)), params=GAIN)


@adapter("CRMSNorm")
def crms(file: File) -> Layer:
    return Layer(build("norm_layer", "crms", {"eps": file.hyperparameters["eps"]}, width(file)))


@adapter("SimpleRMSNorm (no gain)")
def srms(file: File) -> Layer:
    return Layer(build("norm_layer", "srms", {"eps": file.hyperparameters["eps"]}, width(file)))


@adapter("L1 layer normalization (mean absolute deviation)")
def l1(file: File) -> Layer:
    settings = {"eps": file.hyperparameters["eps"], "constant": file.hyperparameters["scale_constant"]}
    return Layer(build("norm_layer", "l1", settings, width(file)), params=GAIN)


@adapter("Dynamic Tanh (DyT)")
def dyt(file: File) -> Layer:
    settings = {"alpha": file.hyperparameters["alpha_init_value"], "bias": "param/bias" in file}
    return Layer(build("norm_layer", "dyt", settings, width(file)), params=GAIN)


@adapter("SeeDNorm (single head)", "SeeDNorm (multi-head)")
def seed(file: File) -> Layer:
    settings = {"eps": file.hyperparameters["eps"], "heads": file.hyperparameters["num_heads"]}
    return Layer(build("norm_layer", "seed", settings, width(file)), params={"gamma": "gain"})


@adapter("GatedNorm (RMSNorm then low-rank sigmoid self-gate)")
def gated(file: File) -> Layer:
    settings = {"eps": file.hyperparameters["eps"], "rank": file.hyperparameters["rank"]}
    names = {**GAIN, "w_down": "down", "w_up": "up"}
    return Layer(build("norm_layer", "gated", settings, width(file)), params=names)


@adapter("PreAffineRMSNorm")
def pre_affine(file: File) -> Layer:
    settings = {"eps": file.hyperparameters["eps"]}
    return Layer(build("norm_layer", "pre_affine", settings, width(file)), params={**GAIN, "pre_weight": "pre_gain"})


@adapter("QK-norm over the full projected width (OLMo 2)", "QK-norm per head")
def qk(file: File) -> Layer:
    hyper = file.hyperparameters
    norm_layer = build("norm_layer", "rms", {"eps": hyper["eps"]})
    mode = "head" if file.algorithm == "QK-norm per head" else "full"
    q, k = (qk_norm(norm_layer, mode, heads=hyper["heads"], head_dim=hyper["head_dim"]) for _ in "qk")
    gain = "gain" if mode == "head" else "norm.gain"
    return Layer(Joined(q, k, hyper["heads"]), params={"q_weight": f"q.{gain}", "k_weight": f"k.{gain}"})


class Joined(nn.Module):
    """The file stores q and k side by side in one array, (B, T, 2 · heads · head_dim)."""

    def __init__(self, q: nn.Module, k: nn.Module, heads: int):
        super().__init__()
        self.q, self.k, self.heads = q, k, heads

    def forward(self, x: Tensor) -> Tensor:
        q, k = (part.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in x.chunk(2, -1))
        return torch.cat([part.transpose(-3, -2).flatten(-2) for part in (self.q(q), self.k(k))], -1)
