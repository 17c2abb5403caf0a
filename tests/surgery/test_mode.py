"""mode=convert, and what becomes of a converted model, through the user's door."""

import json

import pytest
import torch

import trainkit
from tests.surgery.folders import GPT2, GPT2_WORDS, gpt2, gpt2_tensors, write
from trainkit.launch.explain import UserError
from trainkit.norm_layer.crms import CRMSNorm

TOKENS = torch.tensor([3, 1, 4, 1, 5, 92, 65, 35, 89])
STILL = ["optimizer.lr=1e-12", "trainer.max_steps=1"]  # a run that leaves its weights as they were


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    root = tmp_path_factory.mktemp("convert")
    (root / "corpus.txt").write_text("".join(f"line {i}: {i * i} lazy dogs\n" for i in range(400)))
    sizes = ["data.batch_size=4", "data.val_batches=1", "data.test_batches=1", "trainer.threads=1"]
    places = [f"data.path={root}/corpus.txt", f"paths.log_dir={root}/logs", f"paths.cache_dir={root}/cache"]
    return ["data=text", "logger=none", "~callbacks.figures", *sizes, *places]


@pytest.fixture(scope="module")
def tensors():
    return gpt2_tensors()


@pytest.fixture(scope="module")
def run(words, tensors, tmp_path_factory):
    """A run that started from a Hugging Face folder and stayed there."""
    folder = write(tmp_path_factory.mktemp("hub") / "gpt2", GPT2, tensors)
    return trainkit.run([*words, *GPT2_WORDS, f"init_from={folder}", *STILL])


@pytest.fixture(scope="module")
def converted(run):
    return trainkit.run(["mode=convert", f"resume={run.dir}", "to=pre_crms"])


def test_a_hub_model_is_trained_converted_and_loaded_again(run, converted, tensors):
    assert converted.dir == run.dir / "convert" / "pre_crms"
    assert converted.metrics["convert/difference"] < 1e-12 < 0.1 < converted.metrics["convert/largest_output"]
    written = json.loads((converted.dir / "result.json").read_text())
    assert (written["status"], written["form"], written["run"]) == ("finished", "pre_crms", str(run.dir))
    expected = gpt2(tensors, TOKENS)
    for directory in (run.dir, converted.dir):
        model = trainkit.load(directory)
        assert not model.training
        torch.testing.assert_close(model(TOKENS[None])[0].double(), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(model.after, CRMSNorm)
    assert model.embed.weight.shape == (256, 11)


def test_what_is_loaded_is_what_was_written(converted):
    state = torch.load(converted.dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    model = trainkit.load(converted.dir)
    assert model.state_dict().keys() == {name.removeprefix("model.") for name in state if name.startswith("model.")}
    assert all(torch.equal(value, state[f"model.{name}"]) for name, value in model.state_dict().items())


def test_a_converted_model_is_evaluated_like_a_run(run, converted):
    for words in ([f"resume={converted.dir}"], [f"resume={run.dir}", "to=pre_rms"]):
        metrics = trainkit.run(["mode=eval", *words]).metrics
        assert metrics["val/loss"] == pytest.approx(run.metrics["val/loss"], rel=1e-5)


def test_training_goes_on_in_the_new_form(words, run, converted):
    further = trainkit.run([*words, *GPT2_WORDS, f"init_from={converted.dir}", "to=pre_crms", *STILL])
    assert further.metrics["val/loss"] == pytest.approx(run.metrics["val/loss"], rel=1e-5)


def test_a_run_may_be_converted_where_training_starts_and_resumed(words, run):
    further = trainkit.run([*words, *GPT2_WORDS, f"init_from={run.dir}", "to=pre_crms", *STILL])
    resumed = trainkit.run([f"resume={further.dir}", "trainer.max_steps=2"])
    assert isinstance(trainkit.load(further.dir).after, CRMSNorm)
    for result in (further, resumed):
        assert result.metrics["val/loss"] == pytest.approx(run.metrics["val/loss"], rel=1e-5)


MISTAKES = {
    "no form": (["mode=convert", "resume={run}"], "mode=convert needs the form to convert to: add to=pre_rms or"),
    "an unknown form": (["mode=eval", "resume={run}", "to=pre_rmsn"], "to=pre_rmsn: there is no such form"),
    "nothing to fuse": (["mode=convert", "resume={run}", "to=fused"], "fusing folds norms"),
    "dropout": (
        ["mode=convert", "resume={run}", "to=pre_rms", "model.dropout=0.1"],
        r"has dropout 0\.1\. Convert with model\.dropout=0",
    ),
    "converting twice": (["mode=convert", "resume={converted}", "to=pre_rms"], "holds a converted model already"),
    "going back": (["mode=eval", "resume={converted}", "to=null"], "cannot be undone: add to=pre_crms"),
    "continuing it": (["resume={converted}"], "holds a converted model without a training state"),
    "changing the form": (["resume={run}", "to=pre_rms"], "continues a run with to=None, and to=pre_rms"),
    "another model's folder": (["init_from={hub}"], "for its weights add"),
    "no folder at all": (["init_from={hub}/nowhere"], "init_from=.*nowhere: does not exist"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake, words, run, converted, tmp_path):
    argv, says = MISTAKES[mistake]
    hub = write(tmp_path / "hub", GPT2, {})
    where = {"run": run.dir, "converted": converted.dir, "hub": hub}
    argv = [word.format(**where) for word in argv]
    with pytest.raises(UserError, match=says):
        trainkit.run(argv if any(word.startswith("resume") for word in argv) else [*words, *argv])


def test_only_a_run_can_be_loaded(tmp_path):
    with pytest.raises(UserError, match="is no run directory"):
        trainkit.load(tmp_path)
