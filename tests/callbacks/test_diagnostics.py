"""callbacks=diagnostics through the user's door: everything is logged and pictured, and the weights are the same."""

import torch

import trainkit
from tests.test_runs import corpus, words  # noqa: F401
from trainkit.report.metrics_file import read


def test_the_weights_are_those_of_a_run_without(words):  # noqa: F811
    weights = []
    for callbacks in ("diagnostics", "default"):
        run = trainkit.run([*words, "model.dropout=0.1", f"callbacks={callbacks}"]).dir
        weights.append(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
        if callbacks == "diagnostics":
            names = {name for line in read(run / "metrics.jsonl") for name in line}
            assert {"update_ratio/blocks.1.attn", "exp_avg_sq_rms/embed", "hidden_variance/blocks.1"} <= names
            assert {"attention_entropy/blocks.0", "deletion_drop/blocks.1", "logit_max"} <= names
            drawn = {path.stem for path in (run / "figures").glob("*.png")}
            assert {"angular_distance", "deletion", "hidden_variance", "learning_rate"} <= drawn
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
