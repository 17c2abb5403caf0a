"""Hugging Face folders of tiny models, and what those compute, written from the tensors by their names there."""

import json
from math import pi, sqrt
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

GPT2 = {
    "model_type": "gpt2", "vocab_size": 256, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 16,
    "n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 500.0, "hidden_act": "silu",
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
# The words that the two folders need; those of the model first.
GPT2_WORDS = ["model=gpt", "model.width=12", "model.depth=2", "model.heads=3", "model.context=16"]
GPT2_WORDS += ["model.bias=true", "model.gelu=tanh"]
LLAMA_WORDS = ["model=llama", "model.width=24", "model.hidden=20", "model.depth=2", "model.heads=6", "model.kv_heads=2"]
LLAMA_WORDS += ["model.rope_base=500", "norm_layer.eps=1e-5"]


def gpt2_tensors() -> dict[str, Tensor]:
    width, shapes = 12, {"wte.weight": (256, 12), "wpe.weight": (16, 12), "ln_f.weight": (12,), "ln_f.bias": (12,)}
    for layer in range(2):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{norm}.{kind}": (width,) for kind in ("weight", "bias")}
        linears = {"attn.c_attn": (12, 36), "attn.c_proj": (12, 12), "mlp.c_fc": (12, 48), "mlp.c_proj": (48, 12)}
        for linear, shape in linears.items():
            shapes |= {f"h.{layer}.{linear}.weight": shape, f"h.{layer}.{linear}.bias": shape[1:]}
    return drawn({f"transformer.{name}": shape for name, shape in shapes.items()})


def llama_tensors() -> dict[str, Tensor]:
    shapes = {"model.embed_tokens.weight": (256, 24), "model.norm.weight": (24,), "lm_head.weight": (256, 24)}
    linears = {"self_attn.q": (24, 24), "self_attn.k": (8, 24), "self_attn.v": (8, 24), "self_attn.o": (24, 24)}
    linears |= {"mlp.gate": (20, 24), "mlp.up": (20, 24), "mlp.down": (24, 20)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{linear}_proj.weight": shape for linear, shape in linears.items()}
        shapes |= {f"{at}.{norm}_layernorm.weight": (24,) for norm in ("input", "post_attention")}
    return drawn(shapes)


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(folder: Path, config: dict, tensors: dict[str, Tensor], *, shards: int = 1) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    index = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / name)
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v: (heads, T, head_dim), causal."""
    length = q.shape[1]
    scores = q @ k.transpose(1, 2) / sqrt(q.shape[2])
    return scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf")).softmax(-1) @ v


def gpt2(tensors: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits of one row of tokens, in float64."""
    w = {name.removeprefix("transformer."): value.double() for name, value in tensors.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def conv1d(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][tokens] + w["wpe.weight"][: len(tokens)]
    for layer in range(2):
        at = f"h.{layer}"
        heads = conv1d(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn").split(12, dim=-1)
        q, k, v = (t.reshape(len(tokens), 3, 4).transpose(0, 1) for t in heads)
        x = x + conv1d(softmax_attention(q, k, v).transpose(0, 1).reshape(len(tokens), 12), f"{at}.attn.c_proj")
        u = conv1d(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")
        u = 0.5 * u * (1 + torch.tanh(sqrt(2 / pi) * (u + 0.044715 * u**3)))
        x = x + conv1d(u, f"{at}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def llama(tensors: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits of one row of tokens, in float64."""
    w = {name.removeprefix("model."): value.double() for name, value in tensors.items()}
    angle = torch.outer(torch.arange(len(tokens)).double(), 500.0 ** (-torch.arange(0, 4, 2).double() / 4))
    cos, sin = (f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin))

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]

    def heads(x: Tensor, name: str) -> Tensor:
        return (x @ w[f"{name}_proj.weight"].T).reshape(len(tokens), -1, 4).transpose(0, 1)

    def turned(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., 2:], x[..., :2]], -1) * sin

    x = w["embed_tokens.weight"][tokens]
    for layer in range(2):
        at = f"layers.{layer}"
        u = norm(x, f"{at}.input_layernorm")
        q, k, v = (heads(u, f"{at}.self_attn.{part}") for part in "qkv")
        k, v = turned(k).repeat_interleave(3, 0), v.repeat_interleave(3, 0)
        y = softmax_attention(turned(q), k, v).transpose(0, 1).reshape(len(tokens), 24)
        x = x + y @ w[f"{at}.self_attn.o_proj.weight"].T
        u = norm(x, f"{at}.post_attention_layernorm")
        gate, up = (u @ w[f"{at}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ w[f"{at}.mlp.down_proj.weight"].T
    return norm(x, "norm") @ w.get("lm_head.weight", w["embed_tokens.weight"]).T
