"""Layers of convolutional networks: norms, standardized kernels, and a batch norm that its convolution takes over."""

from collections import OrderedDict

from torch import nn

from trainkit.model.parts.poincare import PoincareBatchNorm
from trainkit.model.parts.region_norm import LearnedRegionNorm, RegionNorm
from trainkit.model.parts.time_dependent import TimeDependentNorm
from trainkit.norm_layer.estimated_batch import set_speed
from trainkit.surgery.tune import tune_mode
from trainkit.surgery.weight_standardization import scaled_standardize_weights, standardize_weights

from ..registry import File, Layer, adapter, build

GAIN = {"weight": "gain"}


def width(file: File) -> int:
    return file["x/1"].shape[1]


def given(file: File, **names: str) -> dict:
    """{our setting: value} for those of the file's hyperparameters that it states; names: ours -> the file's."""
    return {ours: file.hyperparameters[theirs] for ours, theirs in names.items() if theirs in file.hyperparameters}


@adapter("evonorm_b0", "evonorm_b0_noact")
def evonorm_b0(file: File) -> Layer:
    settings = given(file, eps="eps", momentum="momentum", activation="apply_act")
    return Layer(build("norm_layer", "evonorm_b0", {**settings, "count": "call"}, width(file), axis=1), params=GAIN)


@adapter("evonorm_s0", "evonorm_s0_noact", "evonorm_s0a", "evonorm_s0a_noact")
def evonorm_s(file: File) -> Layer:
    name = file.algorithm.removesuffix("_noact")
    settings = given(file, groups="groups", eps="eps", activation="apply_act")
    return Layer(build("norm_layer", name, settings, width(file), axis=1), params=GAIN)


@adapter("Batch-Channel Normalization (large batch)")
def batch_channel(file: File) -> Layer:
    eps = file.hyperparameters["eps"]
    settings = {"groups": file.hyperparameters["num_groups"], "eps": eps, "eps_channel": eps, "count": "call"}
    settings |= given(file, momentum="momentum")
    norm = build("norm_layer", "batch_channel", settings, width(file), axis=1)
    inner = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {f"pbn.{name}": f"bn.{name}" for name in inner}
    return Layer(norm, params={**GAIN, **names}, buffers=names)


@adapter("Batch-Channel Normalization (micro-batch, estimated statistics)")
def batch_channel_estimated(file: File) -> Layer:
    settings = given(file, groups="num_groups", eps="eps_batch", eps_channel="eps_channel")
    settings |= {"statistics": "estimated", "count": "call"}
    norm = build("norm_layer", "batch_channel", settings, width(file), axis=1)
    speeds = iter(file.hyperparameters["moving_speed"])

    def before_call(module, args):
        if module.training:
            set_speed(module, next(speeds))

    norm.register_forward_pre_hook(before_call)
    return Layer(norm, params=GAIN, buffers={"bn.estbn_moving_speed": "bn.speed"})


@adapter("IBN (IBN-Net-a layer)")
def ibn(file: File) -> Layer:
    settings = given(file, ratio="ratio", eps="eps", momentum="momentum")
    norm = build("norm_layer", "ibn", {**settings, "count": "call"}, width(file), axis=1)
    names = {"IN.weight": "instance.gain", "IN.bias": "instance.bias", "BN.weight": "batch.weight"}
    running = ("running_mean", "running_var", "num_batches_tracked")
    buffers = {f"BN.{name}": f"batch.{name}" for name in running}
    return Layer(norm, params={**names, "BN.bias": "batch.bias"}, buffers=buffers)


DENOMINATORS = {"sqrt(unbiased var + eps)": "bcn", "unbiased std + eps": "readme", "sqrt(biased var + eps)": "bit"}


@adapter("Weight Standardization", "Scaled Weight Standardization")
def weight_standardization(file: File) -> Layer:
    conv = convolution(file, "")
    if "param/gain" in file:
        return Layer(scaled_standardize_weights(conv, **{"gamma": 1.0, **given(file, gamma="gamma", eps="eps")}))
    form = DENOMINATORS[file.hyperparameters["variant"]]
    return Layer(standardize_weights(conv, form=form, **given(file, eps="eps")))


def convolution(file: File, prefix: str) -> nn.Conv2d:
    groups = file.hyperparameters.get("groups", 1)
    outputs, _, height, breadth = file[f"param/{prefix}weight"].shape
    settings = given(file, stride="stride", padding="padding", dilation="dilation")
    bias = f"param/{prefix}bias" in file
    return nn.Conv2d(width(file), outputs, (height, breadth), groups=groups, bias=bias, **settings)


@adapter("ConvBN Tune mode")
def convbn_tune(file: File) -> Layer:
    conv = convolution(file, "conv.")
    norm = nn.BatchNorm2d(conv.out_channels, **given(file, eps="eps"))
    return Layer(tune_mode(nn.Sequential(OrderedDict(conv=conv, bn=norm))))


@adapter("Region Normalization, basic (RN-B)")
def region_norm_b(file: File) -> Layer:
    norm = RegionNorm(width(file), **given(file, eps="eps"))

    def before_eval(module, args, keywords):
        return args, keywords if module.training else {"mask": file["mask/1"]}

    norm.register_forward_pre_hook(before_eval, with_kwargs=True)
    return Layer(norm, inputs={"mask": "mask"})


@adapter("Region Normalization, learnable (RN-L)")
def region_norm_l(file: File) -> Layer:
    norm = LearnedRegionNorm(**given(file, kernel="kernel", threshold="threshold", eps="eps"))
    names = {"sa.conv1": "attend", "sa.gamma_conv": "gamma", "sa.beta_conv": "beta"}
    params = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in names.items() for kind in ("weight", "bias")}
    return Layer(norm, params=params)


@adapter("Time-dependent LayerNorm (TD-LN)", "Time-dependent RMSNorm (TD-RMSN)")
def time_dependent(file: File) -> Layer:
    ours = {"param0": "clean", "param1": "noisy", "nodecay_weight": "slope", "nodecay_bias": "shift"}
    layer = "LayerNorm" in file.algorithm
    parts = {"weight": "gain", "bias": "bias"} if layer else {"scale": "gain"}
    names = {f"{p}.{theirs}": f"{part}.{name}" for p, part in parts.items() for theirs, name in ours.items()}
    settings = given(file, eps="eps", divisor="time_divisor")
    norm = TimeDependentNorm(file["x/1"].shape[-1], kind="layer" if layer else "rms", **settings)
    return Layer(norm, params=names, inputs={"log_snr": "log_snr"})


@adapter("Poincare midpoint batch norm")
def poincare(file: File) -> Layer:
    norm = PoincareBatchNorm(file["x/1"].shape[-1], **given(file, eps="eps_var", margin="project_eps"))
    return Layer(norm, params={"isp_c": "curvature"})
