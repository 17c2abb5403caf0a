"""vit and mlp against plain functional implementations."""

from math import sqrt

import torch
from torch import Tensor

from tests.menu import build

IMAGE, CLASSES = [1, 8, 8], 10
FACTS = [f"data.image={IMAGE}", f"data.classes={CLASSES}"]


def shaken(net):
    torch.manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net


def norm(w: dict[str, Tensor], x: Tensor, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.gain"] + w[f"{name}.bias"]


def affine(w: dict[str, Tensor], x: Tensor, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / sqrt(2)))


def test_vit_equals_a_plain_implementation():
    sizes = ["model.patch=4", "model.depth=2", "model.width=12", "model.heads=3"]
    net = shaken(build("model", "model=vit", *FACTS, *sizes).double())
    w = dict(net.named_parameters())
    images = torch.randn(2, *IMAGE, dtype=torch.float64)
    patches = [images[:, :, i : i + 4, j : j + 4].reshape(2, -1) for i in (0, 4) for j in (0, 4)]
    tokens = affine(w, torch.stack(patches, 1), "embed")
    h = torch.cat((w["class_token"].expand(2, -1, -1), tokens), 1) + w["position.weight"]
    for l in range(2):
        at = f"blocks.{l}.attn"
        q, k, v = affine(w, norm(w, h, f"{at}.pre"), f"{at}.f.qkv").split(12, -1)
        parts = [slice(n * 4, n * 4 + 4) for n in range(3)]
        heads = [(q[..., s] @ k[..., s].transpose(1, 2) / 2).softmax(-1) @ v[..., s] for s in parts]
        h = h + affine(w, torch.cat(heads, -1), f"{at}.f.out")
        at = f"blocks.{l}.mlp"
        h = h + affine(w, gelu(affine(w, norm(w, h, f"{at}.pre"), f"{at}.f.inp")), f"{at}.f.out")
    expected = affine(w, norm(w, h, "after")[:, 0], "head")
    torch.testing.assert_close(net(images), expected, rtol=1e-10, atol=1e-10)


def test_mlp_equals_a_plain_implementation():
    net = shaken(build("model", "model=mlp", "norm=post", *FACTS, "model.depth=2", "model.width=12").double())
    w = dict(net.named_parameters())
    images = torch.randn(3, *IMAGE, dtype=torch.float64)
    h = affine(w, images.flatten(1), "embed")
    for l in range(2):
        at = f"blocks.{l}.mlp"
        h = norm(w, h + affine(w, gelu(affine(w, h, f"{at}.f.inp")), f"{at}.f.out"), f"{at}.post")
    torch.testing.assert_close(net(images), affine(w, h, "head"), rtol=1e-10, atol=1e-10)
