"""Numbers about a run: accuracy matrices, plasticity, hidden states."""

from trainkit.measure import continual, plasticity, representation

from ..registry import File, Pairs, adapter


@adapter("continual-learning metrics")
def matrix(file: File) -> Pairs:
    acc, zero_shot = file["acc"], file["zero_shot"]
    yield "expect/final_avg_acc", continual.final_average_accuracy(acc)
    yield "expect/bwt", continual.bwt_mammoth(acc)
    yield "expect/bwt_avalanche", continual.bwt_avalanche(acc)
    yield "expect/fwt", continual.fwt(acc, file["random_acc"], zero_shot)
    yield "expect/forgetting_mammoth", continual.forgetting_mammoth(acc, zero_shot)
    yield "expect/forgetting_avalanche", continual.forgetting_avalanche(acc)
    yield "expect/forgetting_chaudhry", continual.forgetting_chaudhry(acc)


# The file's two were computed in float32.
@adapter("plasticity diagnostics", rtol={"expect/dormant_fraction": 1e-7, "expect/active_fraction": 1e-7})
def units(file: File) -> Pairs:
    features, hyper = file["features"], file.hyperparameters
    for name in file.names("expect"):
        if name.startswith("srank"):  # srank_99 for delta = 0.01
            yield f"expect/{name}", plasticity.srank(features, hyper["srank_delta"])
    yield "expect/effective_rank", plasticity.effective_rank(features)
    yield "expect/stable_rank_fro", plasticity.stable_rank(features)
    yield "expect/dormant_fraction", plasticity.dormant_fraction(features, hyper["tau"])
    yield "expect/dead_fraction", plasticity.dead_fraction(features)
    yield "expect/active_fraction", plasticity.active_fraction(features)


@adapter("layer diagnostics")
def layers(file: File) -> Pairs:
    hidden = file["hidden"]
    for name in file.names("expect"):
        kind, _, n = name.rpartition("n")  # angular_all_tokens/n3, block_influence_n1
        if kind.startswith("angular_"):
            tokens = kind.removeprefix("angular_").removesuffix("_tokens/").removesuffix("_token/")
            yield f"expect/{name}", representation.angular_distance(hidden, int(n), tokens=tokens)
        if kind.startswith("block_influence"):
            yield f"expect/{name}", representation.block_influence(hidden, int(n))
        if name.startswith("top"):  # top3_abs
            count = int(name.removeprefix("top").removesuffix("_abs"))
            yield f"expect/{name}", representation.top_abs(hidden, count)
    yield "expect/var_channel_mean", representation.channel_variance(hidden)
    yield "expect/var_all", representation.total_variance(hidden)
    yield "expect/mean_square", representation.mean_square(hidden)
    yield "expect/max_abs", representation.max_abs(hidden)
    yield "expect/median_abs", representation.median_abs(hidden)
