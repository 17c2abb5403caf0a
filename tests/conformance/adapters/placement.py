"""Norm placements: a stack of toy sublayers tanh(h W), built as models build theirs."""

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.norm.placement import Placement, Site

from ..registry import File, Layer, adapter, build, plugin

NORMS = {"rms": "rms", "ln": "layer"}
# Where the norms of the file stand here: the end of the module's path in its sublayer, "before" or "after".
IN, OUT, SUM = {"in_norm": "pre"}, {"out_norm": "out"}, {"out_norm": "post"}


class Toy(nn.Sequential):
    """h -> tanh(h W); its weights are loaded from the file, so a placement has nothing to scale at the start."""

    def __init__(self, width: int):
        super().__init__(nn.Linear(width, width, bias=False), nn.Tanh())

    def scale_branch(self, *, first: float, last: float) -> None:
        return None


class Stack(nn.Module):
    """What a model does with a placement. `hidden`: the streams of the last forward with gradients."""

    def __init__(self, placement: Placement, *, width: int, blocks: int, per_block: int):
        super().__init__()
        count = int(blocks) * int(per_block)
        self.before = placement.before(Site("embed", width, depth=blocks, count=count))
        self.sublayers = nn.ModuleList()
        for layer in range(blocks):
            for _, kind in zip(range(per_block), cycle(("attn", "mlp")), strict=False):
                site = Site(kind, width, layer=layer, depth=blocks, index=len(self.sublayers), count=count)
                self.sublayers.append(placement.around(Toy(width), site))
        self.after = placement.after(Site("head", width, depth=blocks, count=count))
        self.hidden: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        stream = self.before(x)
        streams = [stream]
        for sublayer in self.sublayers:
            stream = sublayer(stream)
            streams.append(stream)
        self.hidden = [s[0] if isinstance(s, tuple) else s for s in streams]
        for h in self.hidden:
            h.retain_grad()
        return self.after(stream)


def stack(file: File, name: str, norms: dict[str, str], settings: dict[str, Any] | None = None, **ends: str) -> Layer:
    """The stack of conf/norm/<name>.yaml; norms: the file's names in a sublayer -> ours; ends: those outside of it."""
    hyper = file.hyperparameters
    norm_layer = plugin("norm_layer", NORMS[hyper["norm"]], {"eps": hyper["eps"]})
    placement = build("norm", name, settings, norm_layer=norm_layer)
    module = Stack(placement, width=hyper["C"], blocks=hyper["blocks"], per_block=hyper["sublayers_per_block"])
    parameters = {}
    for parameter in file.names("param"):
        place, *rest = parameter.split(".")
        leaf = {"weight": "gain"}.get(rest[-1], rest[-1])
        if place == "W":
            parameters[parameter] = f"sublayers.{rest[0]}.f.0.weight.T"
        elif place == "scale":
            parameters[parameter] = f"sublayers.{rest[0]}.scale"
        elif place in ends:
            parameters[parameter] = f"{ends[place]}.{leaf}"
        else:
            parameters[parameter] = f"sublayers.{rest[0]}.{norms[place]}.{leaf}"
    return Layer(module, params=parameters, extra=hidden)


def hidden(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    streams: list[Tensor] = module.hidden  # type: ignore[assignment]
    yield "expect/hidden", torch.stack(streams)
    yield "expect/grad_hidden", torch.stack([h.grad for h in streams if h.grad is not None])


@adapter("placement:pre")
def pre(file: File) -> Layer:
    return stack(file, "pre", IN, final_norm="after")


@adapter("placement:post", "placement:post_final")
def post(file: File) -> Layer:
    return stack(file, "post", SUM, {"final": file.algorithm == "placement:post_final"}, final_norm="after")


@adapter("placement:peri", "placement:peri_noemb")
def peri(file: File) -> Layer:
    settings = {"embed": file.algorithm == "placement:peri"}
    return stack(file, "peri", {**IN, **OUT}, settings, embed_norm="before", final_norm="after")


@adapter("placement:sandwich")
def sandwich(file: File) -> Layer:
    return stack(file, "sandwich", {**IN, **OUT}, final_norm="after")


@adapter("placement:olmo2_output")
def output(file: File) -> Layer:
    return stack(file, "output", OUT, final_norm="after")


@adapter("placement:mix*")
def mix(file: File) -> Layer:
    alpha = int(file.hyperparameters["post_blocks"]) / int(file.hyperparameters["blocks"])
    return stack(file, "mix", {**IN, **SUM}, {"alpha": alpha}, final_norm="after")


@adapter("placement:lns")
def lns(file: File) -> Layer:
    return stack(file, "lns", {"in_norm": "pre.norm"}, final_norm="after")


@adapter("placement:deepnorm")
def deepnorm(file: File) -> Layer:
    return stack(file, "deepnorm", SUM, {"alpha": file.hyperparameters["alpha"]})


@adapter("placement:keel")
def keel(file: File) -> Layer:
    return stack(file, "keel", {**IN, **SUM}, {"alpha": file.hyperparameters["alpha"]})


@adapter("placement:residual_dual")
def residual_dual(file: File) -> Layer:
    return stack(file, "residual_dual", SUM, final_norm="after.norm")


@adapter("placement:rezero")
def rezero(file: File) -> Layer:
    return stack(file, "rezero", {})


@adapter("placement:prenorm_skipinit")
def skipinit(file: File) -> Layer:
    return stack(file, "skipinit", IN, final_norm="after")


@adapter("placement:invdepth")
def inverse_depth(file: File) -> Layer:
    return stack(file, "inverse_depth", {})


class Interleaved(nn.Module):
    """The file keeps streams as (B S, T, C), the stream fastest; the connection as (B, T, S, C)."""

    def __init__(self, connection: nn.Module, streams: int):
        super().__init__()
        self.connection, self.streams = connection, streams

    def forward(self, x: Tensor) -> Tensor:
        return self.pack(self.connection(self.unpack(x)))

    def unpack(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.streams)).movedim(1, 2)

    def pack(self, x: Tensor) -> Tensor:
        return x.movedim(2, 1).flatten(0, 1)


CONNECTION = {
    "static_alpha": "read_mix_bias",
    "dynamic_alpha_fn": "read_mix",
    "pre_branch_scale": "read_scale",
    "residual_scale": "mix_scale",
    "static_beta": "write_bias",
    "dynamic_beta_fn": "write",
    "h_post_scale": "write_scale",
    "norm.gamma": "gain",
}


@adapter("mHC-lite residual streams around one branch f(h)=tanh(h @ branch_W)")
def mhc_lite(file: File) -> Layer:
    hyper = file.hyperparameters
    streams, index = hyper["num_streams"], hyper["layer_index"]
    # The file's branch has no norm before it.
    placement = build("norm", "hyper", {"streams": streams}, norm_layer=plugin("norm_layer", "none"))
    site = Site("mlp", hyper["dim"], layer=index, depth=int(index) + 1, index=index, count=int(index) + 1)
    f = Toy(hyper["dim"])
    del f[0].weight  # the file gives no gradient for it
    f[0].register_buffer("weight", file["branch_W"].T)
    module = Interleaved(placement.around(f, site), streams)

    def extra(_: nn.Module) -> Iterator[tuple[str, Tensor]]:
        fresh = placement.around(f, site)
        for theirs, ours in CONNECTION.items():
            yield f"expect/init/{theirs}", getattr(fresh, ours)
        connection: Any = module.connection
        yield "expect/permutations", connection.permutations.unflatten(-1, (streams, streams))
        for step in file.names("expect/branch_input"):
            h, mixed, write = connection.route(module.unpack(file[f"x/{step}"]))
            yield f"expect/branch_input/{step}", h
            yield f"expect/mixed_residual/{step}", module.pack(mixed)
            yield f"expect/beta/{step}", write

    return Layer(module, params={theirs: f"connection.{ours}" for theirs, ours in CONNECTION.items()}, extra=extra)
