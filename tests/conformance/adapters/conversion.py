"""Pre-LN to Pre-RMSNorm to Pre-CRMSNorm: a small ViT whose patches come as an image of 1 x 1 patches."""

import torch
from torch import Tensor, nn

from trainkit.surgery import to_pre_crms, to_pre_rms

from ..registry import File, Pairs, adapter, build, plugin

# The file's linear layers here; those named in_linear and head have norms before them, the others write to the stream.
OUTSIDE = {"patch_linear": "embed", "cls_head_linear": "head"}
PER_BLOCK = {
    "att_in_linear": "attn.f.qkv",
    "att_out_linear": "attn.f.out",
    "mlp_in_linear": "mlp.f.inp",
    "mlp_out_linear": "mlp.f.out",
}


@adapter("Pre-LN to Pre-RMSNorm to Pre-CRMSNorm weight conversion (tiny ViT forward)")
def conversion(file: File) -> Pairs:
    hyper = file.hyperparameters
    images = file["x/patches"].transpose(1, 2).unsqueeze(-1)  # (B, patch_dim, N, 1)
    sizes = {"depth": hyper["depth"], "width": hyper["dim"], "hidden": hyper["mlp_dim"], "heads": hyper["heads"]}
    norm_layer = plugin("norm_layer", "layer", {"eps": hyper["eps"]})
    settings = {**sizes, "patch": 1, "bias": True, "norm": plugin("norm", "pre")}
    facts = {"image": list(images.shape[1:]), "classes": hyper["num_classes"]}
    model = build("model", "vit", {**settings, **facts}, norm_layer=norm_layer).eval()
    with torch.no_grad():
        for name in file.names("param"):
            for target, value in zip(located(model, name), parts(file[f"param/{name}"], name), strict=True):
                target.copy_(value)
        # The file adds no position to the class token.
        model.position.weight[:1].copy_(torch.zeros_like(model.position.weight[:1]))

        rms, crms = to_pre_rms(model), to_pre_crms(model)
        for form, converted in (("zeromean", rms), ("compressed", crms)):
            for name in file.names(f"expect/{form}"):
                values = located(converted, name)
                stacked = torch.stack(values) if is_stacked(name) else values[0]
                yield f"expect/{form}/{name}", stacked
        for form, converted in (("preln", model), ("prerms", rms), ("precrms", crms)):
            yield f"expect/y/{form}", converted(images)


def is_stacked(name: str) -> bool:
    return name.rpartition("_")[0] in PER_BLOCK


def parts(value: Tensor, name: str) -> list[Tensor]:
    """One tensor per place where the file's belongs."""
    return list(value.unbind()) if is_stacked(name) else [value.squeeze(0) if name == "pos_embedding" else value]


def located(model: nn.Module, name: str) -> list[Tensor]:
    """Where an array of the file stands in the model: in every block, or in one place."""
    if name == "cls_token":
        return [model.class_token]
    if name == "pos_embedding":
        return [model.position.weight[1:]]
    layer, _, kind = name.rpartition("_")
    if layer in OUTSIDE:
        return [getattr(model.get_submodule(OUTSIDE[layer]), kind)]
    return [getattr(block.get_submodule(PER_BLOCK[layer]), kind) for block in model.blocks]
