"""NaP, normalize and project (Lyle et al., NeurIPS 2024, arXiv:2407.01800), as a strategy for any model."""

from typing import cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainkit.continual.strategy import Strategy
from trainkit.norm.nap import NaP as Placement
from trainkit.norm.placement import Site
from trainkit.norm_layer.dyt import DynamicTanh
from trainkit.norm_layer.identity import Identity
from trainkit.norm_layer.layer import LayerNorm
from trainkit.norm_layer.rms import RMSNorm
from trainkit.norm_layer.seed import SeeDNorm
from trainkit.norm_layer.stateful import Stateful

NORMS = {"layer": LayerNorm, "rms": RMSNorm}
# No norm at all, or one whose output depends on the length of its input, or on the rest of the batch.
REPLACED = (nn.Identity, Identity, DynamicTanh, SeeDNorm, Stateful, _BatchNorm)


class NaP(Strategy):
    """A norm over features before every non-linearity: h = φ(norm(W z) · s + o), and no bias beside W.

    Then f(c W) = f(W), and the projection that the YAML brings, W <- rho W / ‖W‖ after every step (projection/nap.py),
    fixes the effective learning rate without changing the function, so that the network keeps its plasticity over many
    tasks. Costs one more norm per hidden layer where there was none. The norm is that of the placement norm=nap, here
    for every model whose parts say what feeds their activations: `feeds_activation` = the names of a layer and of the
    norm after it. Norms that stand there already stay, except those over the batch: an image's output must not depend
    on the task of its neighbours. Those are replaced, over the channels of each pixel in convolutional networks. Batch
    norm with the projection is norm_layer=batch projection=nap, without this strategy. A ResNet's sum has no norm of
    its own: each convolution that leads to it has one, which makes it as scale invariant.

    norm: layer or rms, what is put in. affine: s and o; none: they stay 1 and 0, without training; joint and to_init
    are the projection's, which gets the same word. Softmax is a non-linearity as well, whose norms are those of
    model.qk_norm=head. Raises ValueError where no part of a model says what feeds its activations.
    """

    def __init__(self, *, norm: str = "layer", affine: str = "to_init"):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"continual.norm is layer or rms, a norm over features; got {norm!r}")
        if affine not in ("none", "joint", "to_init"):
            raise ValueError(f"continual.affine is none, joint or to_init; got {affine!r}")
        self.norm, self.affine = norm, affine

    def convert(self, model: nn.Module) -> nn.Module:
        placement = Placement(NORMS[self.norm])
        feeding = [module for module in model.modules() if hasattr(module, "feeds_activation")]
        if not feeding:
            raise ValueError(
                f"continual=nap needs layers that say what feeds their activations; {type(model).__name__} has none. "
                "Give its parts the attribute feeds_activation, or try model=cnn"
            )
        for module in feeding:
            layer_name, norm_name = cast(tuple[str, str], module.feeds_activation)
            layer, norm = getattr(module, layer_name), getattr(module, norm_name)
            if any(isinstance(part, REPLACED) for part in norm.modules()):
                axis = -1 if isinstance(layer, nn.Linear) else 1
                norm = placement.inside(Site("hidden", len(layer.weight), axis=axis)).to(layer.weight)
                setattr(module, norm_name, norm)
            layer.register_parameter("bias", None)
            if self.affine == "none":
                norm.requires_grad_(False)
        return model
