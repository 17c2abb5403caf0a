"""Norm layers with a memory, counted as in the released codes: every call is an update."""

from ..registry import File, Layer, adapter, build

GAIN = {"weight": "gain"}


def width(file: File) -> int:
    return file["x/1"].shape[-1] if "x/1" in file else file["x_all"].shape[-1]


@adapter("PowerNorm (PN, running quadratic mean, approximate backward)")
def power(file: File) -> Layer:
    hyper = file.hyperparameters
    settings = {
        "eps": hyper["eps"],
        "groups": hyper["group_num"],
        "warmup": hyper["warmup_iters"],
        "forward_decay": hyper["alpha_fwd"],
        "backward_decay": hyper["alpha_bkw"],
        "count": "call",
    }
    return Layer(
        build("norm_layer", "power", settings, width(file)),
        params=GAIN,
        buffers={"running_phi": "running_square", "ema_gz": "running_gradient", "iters": "steps"},
        inputs={"pad_mask": "pad_mask"},
        permute=(1, 0, 2),
    )


@adapter("PN-V (batch quadratic mean, exact backward)")
def power_v(file: File) -> Layer:
    settings = {"eps": file.hyperparameters["eps"], "count": "call"}
    return Layer(build("norm_layer", "power_v", settings, width(file)), params=GAIN)


@adapter("Unified Normalization (UN1d)")
def unified(file: File) -> Layer:
    hyper = file.hyperparameters
    settings = {
        "eps": hyper["eps"],
        "window": hyper["window_size"],
        "warmup": hyper["warmup_iters"],
        "momentum": hyper["momentum"],
        "filtration": hyper["outlier_filtration"],
        "count": "call",
    }
    names = {
        "running_var": "running_square",
        "ema_gz": "running_gradient",
        "buffer_x2": "squares",
        "buffer_gz": "gradients",
        "iters": "steps",
        "skip_counter": "skips",
    }
    norm = build("norm_layer", "unified", settings, width(file))
    return Layer(norm, params=GAIN, buffers=names, inputs={"pad_mask": "pad_mask"})


@adapter("RepBN")
def rep_batch(file: File) -> Layer:
    hyper = file.hyperparameters
    settings = {"eps": hyper["bn_eps"], "momentum": hyper["bn_momentum"], "count": "call"}
    norm = build("norm_layer", "rep_batch", settings, width(file))
    return Layer(norm, inputs={"pad_mask": "pad_mask"})


PARAMS = {"norm1.weight": "first.gain", "norm1.bias": "first.bias", "norm2.alpha": "second.alpha"}
COUNTERS = {"iter": "left", "total_step": "total", "num_step": "calls"}
BATCH = {f"norm2.bn.{name}": f"second.bn.{name}" for name in ("weight", "bias")}
RUNNING = {f"norm2.bn.{name}": f"second.bn.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


@adapter("PRepBN (LinearNorm: LayerNorm to RepBN, linear schedule)")
def prep_batch(file: File) -> Layer:
    hyper = file.hyperparameters
    return prep(file, {"first": "layer", "eps": hyper["ln_eps"], "bn_eps": hyper["bn_eps"]})


@adapter("PRepBN, LLaMA variant (RMSNorm to RepBN; schedule counters move once every 16 training calls)")
def prep_batch_llama(file: File) -> Layer:
    hyper = file.hyperparameters
    settings = {"first": "rms", "eps": hyper["eps"], "bn_eps": hyper["eps"], "period": hyper["period"]}
    return prep(file, {**settings, "init": "llama"})


def prep(file: File, settings: dict) -> Layer:
    hyper = file.hyperparameters
    schedule = {"warm": hyper["warm"], "steps": hyper["step"], "r0": hyper["r0"]}
    settings = {**settings, **schedule, "momentum": hyper["bn_momentum"], "count": "call"}

    def merged(norm):
        if "merged_scale" in file.names("expect"):
            yield from zip(("expect/merged_scale", "expect/merged_shift"), norm.scale_shift(), strict=True)

    return Layer(
        build("norm_layer", "prep_batch", settings, width(file)),
        params=PARAMS | BATCH,
        buffers=COUNTERS | RUNNING,
        inputs={"pad_mask": "pad_mask"},
        extra=merged,
    )
