"""Weights from a local Hugging Face folder of GPT-2 or Llama: config.json and safetensors.

The folder says which words of the configuration make its architecture; the run must have been composed with them, since
the tensors alone would also fit models that compute something else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from trainkit.launch.explain import UserError, shown
from trainkit.launch.huggingface.architectures import ARCHITECTURES

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Buffers of older releases, which hold no weights: causal masks and rotary frequencies.
NO_WEIGHTS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder as Hugging Face's libraries write it."""
    return (path / "config.json").is_file()


def load(model: nn.Module, folder: Path, cfg: DictConfig) -> None:
    """Puts the folder's weights into `model`, which was built from `cfg`.

    Raises UserError where the configuration is of another architecture or size, naming the words that it needs; where
    a tensor is missing, left over or of another shape; and for variants that the models here do not have.
    """
    config = _json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(f"init_from={folder}: weights of {' and '.join(ARCHITECTURES)} can be read; this is {kind!r}")
    words, state = ARCHITECTURES[kind]
    _compare(words(config, folder), cfg, folder)
    given = Tensors(folder)
    wanted = model.state_dict()
    for name, value in state(given, config):
        if name not in wanted or wanted[name].shape != value.shape:
            has = tuple(wanted[name].shape) if name in wanted else "nothing"
            raise UserError(
                f"init_from={folder}: {given.last} has the shape {tuple(value.shape)} where the model has {has}"
            )
        with torch.no_grad():
            wanted.pop(name).copy_(value)
    given.expect_none_left()
    assert not wanted, f"not read: {sorted(wanted)}"


class Tensors:
    """The tensors of a folder, in one file or several, each to be taken once."""

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        self.folder, self.last = folder, ""
        if (folder / INDEX).is_file():
            names = {Path(name).name for name in _json(folder / INDEX).get("weight_map", {}).values()}
        else:
            names = {SINGLE}
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing or not names:
            absent = missing[0] if missing else INDEX
            raise UserError(f"init_from={folder}: {absent} is missing; only safetensors are read")
        self._files: dict[str, Any] = {}
        for name in sorted(names):
            try:
                file = safe_open(folder / name, "pt")
            except SafetensorError as error:
                raise UserError(f"init_from={folder}: {name} is damaged ({error})") from None
            keys = file.keys()
            self._files |= dict.fromkeys((key for key in keys if not key.endswith(NO_WEIGHTS)), file)
        # A model without its head was saved without the prefix.
        self.prefix = next((p for p in ("transformer.", "model.") if any(key.startswith(p) for key in self._files)), "")

    def take(self, name: str, *, prefix: bool = True) -> Tensor:
        self.last = self.prefix + name if prefix else name
        if self.last not in self._files:
            raise UserError(f"init_from={self.folder}: the tensor {self.last} is missing")
        return self._files.pop(self.last).get_tensor(self.last)

    def discard(self, name: str) -> None:
        self._files.pop(name, None)

    def expect_none_left(self) -> None:
        if self._files:
            raise UserError(
                f"init_from={self.folder}: {len(self._files)} tensors have no place in the model, such as "
                f"{min(self._files)}"
            )


def _compare(words: dict[str, Any], cfg: DictConfig, folder: Path) -> None:
    """Raises UserError with the words that make the configuration the folder's architecture, unless it is already."""
    missing = differing(words, cfg)
    if not missing:
        return
    tokenizer, hint = folder / "tokenizer.json", ""
    if tokenizer.is_file() and f"model.vocab={words['model.vocab']}" in missing and "tokenizer" in cfg.data:
        hint = f"its own tokenizer: data.tokenizer=file data.tokenizer_file={tokenizer}"
    raise UserError(
        f"init_from={folder} holds a model of another architecture or size; for its weights add",
        " ".join(missing),
        hint,
    )


def differing(words: dict[str, Any], cfg: DictConfig) -> list[str]:
    """Those of an architecture's words, as key=value, that the configuration does not have."""
    found = []
    for key, wanted in words.items():
        if key in ("model", "norm", "norm_layer"):
            same = str(cfg[key]._target_).startswith(f"trainkit.{key}.{wanted}.")
        else:
            same = _effective(cfg, key) == wanted
        if not same:
            found.append(f"{key}={shown(wanted)}")
    return found


def _effective(cfg: DictConfig, key: str) -> Any:
    """A value of the configuration, with what null stands for."""
    value = OmegaConf.select(cfg, key)
    if value is None and key == "model.hidden" and cfg.model.get("width"):
        return 4 * cfg.model.width
    return cfg.model.get("heads") if value is None and key == "model.kv_heads" else value


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"init_from={path.parent}: {path.name} cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"init_from={path.parent}: {path.name} must hold an object; it holds a {type(value).__name__}")
    return value
