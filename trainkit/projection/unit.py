"""Unit weights (nGPT, Loshchilov et al. 2024, arXiv:2410.01131): weight vectors that meet the stream have length 1."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Unit:
    """w <- w / ‖w‖ for the vectors of every embedding and linear layer, in place; a zero vector stays zero.

    Which axis is a vector follows from the layer: the rows of embeddings and of linear layers (head, q, k, v and the
    first of an MLP) lie along the input; a linear layer marked `writes_stream`, the last of a sublayer, has its vectors
    in the columns, along the channels of the stream. Biases and convolutions stay as they are.
    The paper normalizes once before training and after every optimizer step. Raises ValueError where nothing is found.
    """

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        found = False
        for module in model.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                normalize_(module.weight, axis=0 if getattr(module, "writes_stream", False) else -1)
                found = True
        if not found:
            raise ValueError(
                "projection=unit needs embeddings or linear layers, the model has none. Try projection=none"
            )


def normalize_(weight: Tensor, *, axis: int) -> None:
    """Vectors along `axis` to length one, computed in at least float32."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    weight.copy_(F.normalize(wide, dim=axis))
