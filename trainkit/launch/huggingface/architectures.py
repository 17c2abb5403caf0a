"""What a Hugging Face GPT-2 or Llama is in our terms: the words of its architecture, and its tensors by our names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trainkit.launch.explain import UserError, shown

GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
# Their names within a block, and ours.
GPT2_NORMS = (("ln_1", "attn"), ("ln_2", "mlp"))
GPT2_LINEARS = (
    ("attn.c_attn", "attn.f.qkv"),
    ("attn.c_proj", "attn.f.out"),
    ("mlp.c_fc", "mlp.f.inp"),
    ("mlp.c_proj", "mlp.f.out"),
)
LLAMA_LINEARS = (
    ("self_attn", "qkv", "attn.f.qkv"),
    ("self_attn", "o", "attn.f.out"),
    ("mlp", ("gate", "up"), "mlp.f.inp"),
    ("mlp", ("down",), "mlp.f.out"),
)


class Source(Protocol):
    """Tensors by their name in the folder; `take` raises UserError for one that is missing."""

    def take(self, name: str, *, prefix: bool = True) -> Tensor: ...
    def discard(self, name: str) -> None: ...


# --- GPT-2 ------------------------------------------------------------------------------------------------------


def gpt2_words(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    _refuse(config, folder, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    width, activation = config.get("n_embd", 768), config.get("activation_function", "gelu_new")
    if activation not in GELU:
        raise UserError(f"init_from={folder}: model=gpt has the activations {', '.join(GELU)}; this has {activation}")
    return {
        "model": "gpt",
        "norm": "pre",
        "norm_layer": "layer",
        "norm_layer.eps": config.get("layer_norm_epsilon", 1e-5),
        "norm_layer.bias": True,
        "model.vocab": config.get("vocab_size", 50257),
        "model.width": width,
        "model.hidden": config.get("n_inner") or 4 * width,
        "model.depth": config.get("n_layer", 12),
        "model.heads": config.get("n_head", 12),
        "model.context": config.get("n_positions", 1024),
        "model.bias": True,
        "model.gelu": GELU[activation],
        "model.qk_norm": "none",
        "model.tie": config.get("tie_word_embeddings", True),
    }


def gpt2_state(given: Source, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Their linear weights are stored inputs first, and q, k and v as one, which is the order of ours."""
    yield "embed.weight", (embedding := given.take("wte.weight"))
    yield "position.weight", given.take("wpe.weight")
    for layer in range(config.get("n_layer", 12)):
        theirs, ours = f"h.{layer}", f"blocks.{layer}"
        for norm, sublayer in GPT2_NORMS:
            yield f"{ours}.{sublayer}.pre.gain", given.take(f"{theirs}.{norm}.weight")
            yield f"{ours}.{sublayer}.pre.bias", given.take(f"{theirs}.{norm}.bias")
        for linear, place in GPT2_LINEARS:
            yield f"{ours}.{place}.weight", given.take(f"{theirs}.{linear}.weight").T
            yield f"{ours}.{place}.bias", given.take(f"{theirs}.{linear}.bias")
    yield "after.gain", given.take("ln_f.weight")
    yield "after.bias", given.take("ln_f.bias")
    yield "head.weight", _head(given, embedding, tied=config.get("tie_word_embeddings", True))


# --- Llama ------------------------------------------------------------------------------------------------------


def llama_words(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    flat = {**config, "rope_type": rotary.get("rope_type", rotary.get("type", "default"))}
    _refuse(flat, folder, hidden_act="silu", attention_bias=False, mlp_bias=False, rope_type="default")
    width, heads = config.get("hidden_size", 4096), config.get("num_attention_heads", 32)
    _refuse(config, folder, head_dim=width // heads)
    return {
        "model": "llama",
        "norm": "pre",
        "norm_layer": "rms",
        "norm_layer.eps": config.get("rms_norm_eps", 1e-6),
        "model.vocab": config.get("vocab_size", 32000),
        "model.width": width,
        "model.hidden": config.get("intermediate_size", 11008),
        "model.depth": config.get("num_hidden_layers", 32),
        "model.heads": heads,
        "model.kv_heads": config.get("num_key_value_heads") or heads,
        "model.rope_base": float(rotary.get("rope_theta", config.get("rope_theta", 10000.0))),
        "model.qk_norm": "none",
        "model.tie": config.get("tie_word_embeddings", False),
    }


def llama_state(given: Source, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """q, k and v, and gate and up, are stored apart; the pairs of channels that positions turn are those of ours."""
    yield "embed.weight", (embedding := given.take("embed_tokens.weight"))
    for layer in range(config.get("num_hidden_layers", 32)):
        theirs, ours = f"layers.{layer}", f"blocks.{layer}"
        yield f"{ours}.attn.pre.gain", given.take(f"{theirs}.input_layernorm.weight")
        yield f"{ours}.mlp.pre.gain", given.take(f"{theirs}.post_attention_layernorm.weight")
        for block, parts, place in LLAMA_LINEARS:
            rows = [given.take(f"{theirs}.{block}.{part}_proj.weight") for part in parts]
            yield f"{ours}.{place}.weight", torch.cat(rows)
    yield "after.gain", given.take("norm.weight")
    yield "head.weight", _head(given, embedding, tied=config.get("tie_word_embeddings", False))


def _head(given: Source, embedding: Tensor, *, tied: bool) -> Tensor:
    """A tied head is the embedding, whether or not it was written as well."""
    if not tied:
        return given.take("lm_head.weight", prefix=False)
    given.discard("lm_head.weight")
    return embedding


def _refuse(config: dict[str, Any], folder: Path, **only: Any) -> None:
    for key, value in only.items():
        if config.get(key, value) not in (value, None):
            raise UserError(f"init_from={folder}: the models here have {key}={shown(value)}, not {shown(config[key])}")


ARCHITECTURES = {"gpt2": (gpt2_words, gpt2_state), "llama": (llama_words, llama_state)}
