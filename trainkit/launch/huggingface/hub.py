"""A model of ours as a Hugging Face GPT-2 or Llama: config.json and tensors by their names there.

The inverse of architectures.py. Written is what reads back as the same function: a bias that our model leaves out is
written as zeros where the layout wants one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from trainkit.launch.explain import UserError
from trainkit.launch.huggingface.architectures import ARCHITECTURES, GELU, GPT2_LINEARS, GPT2_NORMS, LLAMA_LINEARS
from trainkit.launch.huggingface.pretrained import differing

State = dict[str, Tensor]


# --- GPT-2 ------------------------------------------------------------------------------------------------------


def gpt2_config(cfg: DictConfig) -> dict[str, Any]:
    model = cfg.model
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab,
        "n_embd": model.width,
        "n_inner": model.hidden,
        "n_layer": model.depth,
        "n_head": model.heads,
        "n_positions": model.context,
        "activation_function": next(theirs for theirs, ours in GELU.items() if ours == model.gelu),
        "layer_norm_epsilon": cfg.norm_layer.get("eps", 1e-5),
        "tie_word_embeddings": model.tie,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.dropout),
    }


def gpt2_tensors(state: State, config: dict[str, Any]) -> State:
    """Their linear weights are stored inputs first."""
    tensors = {"wte.weight": state["embed.weight"], "wpe.weight": state["position.weight"]}
    for layer in range(config["n_layer"]):
        theirs, ours = f"h.{layer}", f"blocks.{layer}"
        for norm, sublayer in GPT2_NORMS:
            tensors |= _norm(state, f"{ours}.{sublayer}.pre", f"{theirs}.{norm}")
        for linear, place in GPT2_LINEARS:
            weight = state[f"{ours}.{place}.weight"]
            tensors[f"{theirs}.{linear}.weight"] = weight.T
            tensors[f"{theirs}.{linear}.bias"] = state.get(f"{ours}.{place}.bias", torch.zeros_like(weight[:, 0]))
    tensors |= _norm(state, "after", "ln_f")
    tensors = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    return tensors if config["tie_word_embeddings"] else tensors | {"lm_head.weight": state["head.weight"]}


def _norm(state: State, ours: str, theirs: str) -> State:
    gain = state[f"{ours}.gain"]
    return {f"{theirs}.weight": gain, f"{theirs}.bias": state.get(f"{ours}.bias", torch.zeros_like(gain))}


# --- Llama ------------------------------------------------------------------------------------------------------


def llama_config(cfg: DictConfig) -> dict[str, Any]:
    model = cfg.model
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab,
        "hidden_size": model.width,
        "intermediate_size": model.hidden,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "head_dim": model.width // model.heads,
        "max_position_embeddings": model.context,
        "rope_theta": float(model.rope_base),
        "rms_norm_eps": cfg.norm_layer.get("eps", 1e-6),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": model.dropout,
        "tie_word_embeddings": model.tie,
    }


def llama_tensors(state: State, config: dict[str, Any]) -> State:
    """q, k and v, and gate and up, are stored apart."""
    heads, shared, size = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    rows = {"attn.f.qkv": [heads * size, shared * size, shared * size]}
    tensors = {"model.embed_tokens.weight": state["embed.weight"], "model.norm.weight": state["after.gain"]}
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        tensors[f"{theirs}.input_layernorm.weight"] = state[f"{ours}.attn.pre.gain"]
        tensors[f"{theirs}.post_attention_layernorm.weight"] = state[f"{ours}.mlp.pre.gain"]
        for block, parts, place in LLAMA_LINEARS:
            weight = state[f"{ours}.{place}.weight"]
            split = weight.split(rows.get(place, [len(weight) // len(parts)] * len(parts)))
            tensors |= {f"{theirs}.{block}.{part}_proj.weight": w for part, w in zip(parts, split, strict=True)}
    return tensors if config["tie_word_embeddings"] else tensors | {"lm_head.weight": state["head.weight"]}


WRITERS: dict[str, tuple[str, Callable[[DictConfig], dict[str, Any]], Callable[[State, dict[str, Any]], State]]] = {
    "trainkit.model.gpt.GPT": ("gpt2", gpt2_config, gpt2_tensors),
    "trainkit.model.llama.Llama": ("llama", llama_config, llama_tensors),
}


def layout(cfg: DictConfig, state: State) -> tuple[dict[str, Any], State]:
    """config.json and the tensors of the model that `cfg` describes and whose weights are `state`.

    Raises UserError, with the words that would make it one, where it is neither a GPT-2 nor a Llama.
    """
    target = cfg.model._target_
    if target not in WRITERS:
        raise UserError(
            f"export.format=hf writes model=gpt and model=llama; this run's is {cfg.choices.get('model', target)}",
            "export.format=trainkit takes every model",
        )
    continual = cfg.choices.get("continual", "none")
    if continual != "none":  # it has put layers of its own into the model
        raise UserError(f"export.format=hf: continual={continual} has no layout there", "try export.format=trainkit")
    if cfg.get("to"):
        raise UserError(f"export.format=hf: the form to={cfg.to} has no layout there", "try export.format=trainkit")
    kind, config_of, tensors_of = WRITERS[target]
    config = config_of(cfg)
    # A missing bias is one of zeros.
    words = {key: value for key, value in ARCHITECTURES[kind][0](config, Path()).items() if not key.endswith(".bias")}
    other = differing(words, cfg)
    if other:
        raise UserError(
            f"export.format=hf: only a model trained with {' '.join(other)} has the layout of {kind} there",
            "export.format=trainkit takes every model",
        )
    tensors = tensors_of(state, config)
    return config, {name: tensor.contiguous() for name, tensor in tensors.items()}
