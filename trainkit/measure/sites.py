"""Which part of a network every parameter belongs to, so that measurements compare like with like."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import nn
from torch.nn.modules.conv import _ConvNd

WEIGHTED = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, _ConvNd)
ENDS = {"embed": "embed", "position": "embed", "before": "norm", "after": "norm"}


def sites(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """{label: its trainable parameters}, every parameter once, in the model's order.

        blocks.3.attn, blocks.3.mlp, …   the sublayer's own weights and biases, without norms
        blocks.3.norm                    everything in the norms of block 3, those on q and k included
        blocks.3.residual                what the placement itself learns: scalars and mixing matrices of the residual
        embed, norm, head                token and position embedding, the norms before and after the blocks, the head

    Decided by the module that owns a parameter, so it holds under every placement: below a wrapper's sublayer `f`, a
    vector in a module without children that is no linear, convolution or embedding is a norm's; beside `f`, all is a
    norm's; the wrapper's own parameters are the residual's. A tied weight counts where it is first owned. Parameters
    outside of `blocks.<number>` that none of the names above covers are labelled by the first part of their name.
    """
    owners = [(_path(name), module) for name, module in model.named_modules()]
    wrappers = {path for path, module in owners if isinstance(getattr(module, "f", None), nn.Module)}
    found: dict[str, list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for path, module in owners:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                found.setdefault(_label(path, name, module, parameter, wrappers), []).append(parameter)
    return found


def _path(name: str) -> tuple[str, ...]:
    """The parts of a module's name; wrappers of compile and checkpointing (`_orig_mod`) do not count."""
    return tuple(part for part in name.split(".") if part and not part.startswith("_"))


def _label(
    path: tuple[str, ...], name: str, module: nn.Module, parameter: nn.Parameter, wrappers: Iterable[tuple[str, ...]]
) -> str:
    for start, (part, number) in enumerate(pairwise(path)):
        if part == "blocks" and number.isdigit():
            block, inner = path[: start + 2], path[start + 2 :]
            kind = _kind(inner, module, parameter, wrapped=(*block, *inner[:1]) in wrappers)
            return ".".join((*block, kind))
    first = (*path, name)[0]
    return ENDS.get(first, first)


def _kind(inner: Sequence[str], module: nn.Module, parameter: nn.Parameter, *, wrapped: bool) -> str:
    """What a parameter is to its block; `inner`: the owner's path in the block, ("attn", "f", "qkv")."""
    if len(inner) < (2 if wrapped else 1):
        return "residual"
    if wrapped and inner[1] != "f":
        return "norm"
    has_children = next(module.children(), None) is not None
    own = isinstance(module, WEIGHTED) or parameter.ndim > 1 or has_children
    return inner[0] if own else "norm"
