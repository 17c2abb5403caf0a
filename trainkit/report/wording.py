"""Metrics in words: what a reader sees in the place of `val/loss` or `grad_norm/blocks.3.attn`, and the units."""

from __future__ import annotations

import re

WORDS = {
    "val/loss": "Validation loss",
    "train/loss": "Training loss",
    "train/current_loss": "Training loss on the new samples",
    "test/loss": "Test loss",
    "lr": "Learning rate",
    "steps_per_second": "Optimizer steps per second",
    "tokens_per_second": "Tokens per second",
    "mfu": "Share of the machine's peak",
    "train/loss_spike": "Loss spike score",
    "train/skipped_steps": "Skipped steps",
    "grad_norm/global": "Gradient norm of the whole model",
    "grad_norm/global_l1": "L1 norm of the whole gradient",
    "grad_norm/clipped": "Gradient norm after its treatment",
    "continual/final_average_accuracy": "Final average accuracy",
}
UNITS = {"loss": "nats", "perplexity": "", "bits_per_byte": "bits per byte", "accuracy": "share", "mfu": "share"}
STAGES = {"train": "Training", "val": "Validation", "test": "Test", "continual": "Stream", "task_il": "Task known"}
KINDS = {
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "effective_lr": "Effective learning rate",
    "weight_norm": "Weight norm",
    "angular_update": "Angular update",
    "grad_rms": "Gradient RMS",
    "exp_avg_rms": "First moment of Adam, RMS",
    "exp_avg_sq_rms": "Second moment of Adam, RMS",
    "attention_entropy_min": "Attention entropy, smallest head",
    "srank": "Rank by the sum of singular values",
    "bn_mean_drift": "Drift of running means",
    "bn_var_drift": "Drift of running variances",
}
KIND_UNITS = {"grad_norm": "L2", "weight_norm": "L2", "angular_update": "radians", "dormant": "share"}
KIND_UNITS |= dict.fromkeys(("attention_entropy", "attention_entropy_min", "deletion_drop"), "nats")
SITES = {
    "": "whole block",
    "attn": "attention weights",
    "mlp": "MLP weights",
    "norm": "norm gains",
    "residual": "residual scalars",
}
BLOCK = re.compile(r"(?P<kind>[^/]+)/(?P<block>(?:.*\.)?blocks\.\d+)(?:\.(?P<site>[^.]+))?$")


def title(name: str) -> str:
    """A metric in words: Validation loss, Gradient norm · embed."""
    if name in WORDS:
        return WORDS[name]
    kind, slash, rest = name.partition("/")
    if not slash:
        return sentence(kind)
    if kind in STAGES:
        return f"{STAGES[kind]} {plain(rest)}"
    return f"{of_kind(kind)} · {rest}"


def unit(name: str) -> str:
    """The unit of a metric, empty where it has none or none is known."""
    kind, _, rest = name.partition("/")
    if kind == "grad_norm" and rest == "global_l1":
        return "L1"
    return UNITS.get(rest.rpartition("/")[2] or kind, KIND_UNITS.get(kind, ""))


def of_kind(kind: str) -> str:
    return KINDS.get(kind) or sentence(kind)


def of_site(site: str) -> str:
    return SITES.get(site, site)


def chapter(name: str) -> str:
    """Under what a metric stands in a list of many."""
    kind, slash, _ = name.partition("/")
    if not slash or kind in STAGES:
        return STAGES.get(kind, "General")
    return of_kind(kind)


def sentence(name: str) -> str:
    text = plain(name)
    return text[:1].upper() + text[1:]


def plain(name: str) -> str:
    return name.replace("_", " ").replace("/", " · ")


def width(value: float) -> str:
    """The half width of an interval, at two digits: 0.063, 1.0, 13."""
    return f"{value:#.2g}".rstrip(".")
