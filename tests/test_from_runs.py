"""What is made of a trained run: its scores, its text, its export; through the user's door."""

import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from torch.nn import functional as F

import trainkit
from trainkit.data.tokenizer import Bytes, load_codec
from trainkit.launch.console import to_terminal
from trainkit.launch.explain import UserError

SMALL = ["model.depth=2", "model.width=16", "model.heads=2", "model.context=16", "data.batch_size=4"]
SMALL += ["data.val_batches=2", "data.test_batches=2", "trainer.threads=1", "trainer.max_steps=3", "logger=none"]
TOKENS = torch.tensor([[76, 105, 110, 101, 32, 55, 58, 32]])


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    root = tmp_path_factory.mktemp("from_runs")
    (root / "corpus.txt").write_text("".join(f"line {i}: the naïve brown fox, {i * i} lazy dogs\n" for i in range(400)))
    places = [f"paths.log_dir={root / 'logs'}", f"paths.cache_dir={root / 'cache'}", f"data.path={root}/corpus.txt"]
    return [*SMALL, "data=text", "~callbacks.figures", *places]


@pytest.fixture(scope="module")
def gpt(words):
    return trainkit.run(words).dir


@pytest.fixture(scope="module")
def subwords(words):
    return trainkit.run([*words, "data.tokenizer=bpe", "data.tokenizer_vocab=300", "norm=peri"]).dir


@pytest.fixture(scope="module")
def llama(words):
    sizes = ["model.hidden=24", "model.kv_heads=1", "model.heads=2"]
    return trainkit.run([*words, "model=llama", *sizes, "trainer.max_steps=1"]).dir


@pytest.fixture
def said():
    """The lines that are logged, as they come."""
    to_terminal()  # which does nothing where there is a handler
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("trainkit").addHandler(handler)
    yield lines
    logging.getLogger("trainkit").removeHandler(handler)


def codec_folder(run):
    """The corpus in the cache that has a tokenizer."""
    cache = yaml.safe_load((run / "config.yaml").read_text())["data"]["cache_dir"]
    (found,) = Path(cache).glob("corpora/*-*/tokenizer.json")
    return found.parent


def sampled(run, *words):
    return trainkit.run(["mode=sample", f"resume={run}", "sample.tokens=20", *words])


def text_of(result, number=1):
    return (result.dir / f"{number}.txt").read_bytes().decode()


# --- mode=eval ---------------------------------------------------------------------------------------------------


def test_an_evaluation_counts_bits_per_byte_and_shows_a_table(subwords):
    result = trainkit.run(["mode=eval", f"resume={subwords}"])
    measures = json.loads((result.dir / "result.json").read_text())["measures"]
    assert measures["hidden_variance/blocks.0"] > 0
    assert "deletion_drop/blocks.0" in measures
    folder = codec_folder(subwords)
    tokens = torch.from_numpy(np.fromfile(folder / "val.bin", np.uint16).astype(np.int64))
    model = trainkit.load(subwords)
    # The windows of the validation set: 8 of 16 tokens, spread evenly.
    available = (len(tokens) - 1) // 16
    windows = torch.stack([tokens[i * available // 8 * 16 :][:17] for i in range(8)])
    with torch.no_grad():
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1).double(), windows[:, 1:].flatten()).item()
    text = load_codec(folder).decode(tokens.tolist()).replace("<|endoftext|>", "\0")  # which counts as one byte
    assert result.metrics["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert result.metrics["val/perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    bits = loss / math.log(2) * len(tokens) / len(text.encode())
    assert result.metrics["val/bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    shown = (result.dir / "run.log").read_text()
    for name in ("loss", "perplexity", "bits_per_byte"):
        row = next(line for line in shown.splitlines() if f"│ {name} " in line)
        assert all(f"{result.metrics[f'{stage}/{name}']:.6g}" in row for stage in ("val", "test"))


# --- mode=sample -------------------------------------------------------------------------------------------------


def test_text_is_shown_and_written(gpt, capsys, said):
    result = sampled(gpt, "sample.prompt='line 7: '", "sample.count=2", "sample.seed=5")
    assert result.dir.parent == gpt / "samples"
    written = json.loads((result.dir / "result.json").read_text())
    assert (written["status"], written["run"], written["sample"]["seed"]) == ("finished", str(gpt), 5)
    assert result.metrics["sample/cached"] == 1
    texts = [text_of(result, number) for number in (1, 2)]
    assert texts[0].startswith("line 7: ")
    assert texts[0] != texts[1]
    shown = capsys.readouterr().out
    for text in texts:
        assert "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text) in shown
    assert said[-1].endswith(f"per second; written to {result.dir}")
    again = sampled(gpt, "sample.prompt='line 7: '", "sample.seed=6")  # the second text alone
    assert text_of(again) == texts[1]


def test_greedy_text_is_what_the_model_finds_likeliest(gpt):
    text = text_of(sampled(gpt, "sample.prompt='line 7: '", "sample.temperature=0", "sample.tokens=6"))
    model, tokens = trainkit.load(gpt), Bytes().encode("line 7: ")
    for _ in range(6):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert text == Bytes().decode(tokens)


def test_an_empty_prompt_begins_a_document_and_its_end_ends_the_text(gpt, monkeypatch):
    import trainkit.model.parts.generate as generate

    heard = []

    def scripted(logits, generator, **options):
        heard.append(logits)
        return torch.tensor([[104, 105, 0, 104][len(heard) - 1]])

    monkeypatch.setattr(generate, "draw", scripted)
    result = sampled(gpt)
    assert text_of(result) == "hi"
    assert result.metrics["sample/tokens"] == 3
    torch.testing.assert_close(heard[0], trainkit.load(gpt)(torch.zeros(1, 1, dtype=torch.int64))[:, -1])


def test_subwords_are_put_together(subwords, monkeypatch):
    import trainkit.model.parts.generate as generate

    codec = load_codec(codec_folder(subwords))
    wanted = iter([*codec.encode(" naïve 漢字, x"), 0])  # 漢字 is not in the corpus: three bytes each
    monkeypatch.setattr(generate, "draw", lambda *_, **__: torch.tensor([next(wanted)]))
    assert text_of(sampled(subwords, "sample.prompt=line")) == "line naïve 漢字, x"


def test_what_was_written_before_ctrl_c_stays(gpt, monkeypatch):
    import trainkit.model.parts.generate as generate

    drawn = iter([104, 105])

    def interrupted(*_, **__):
        token = next(drawn, None)
        if token is None:
            raise KeyboardInterrupt
        return torch.tensor([token])

    monkeypatch.setattr(generate, "draw", interrupted)
    result = sampled(gpt, "sample.count=3")
    assert (result.status, result.metrics["sample/tokens"]) == ("interrupted", 2)
    assert text_of(result) == "hi"
    assert json.loads((result.dir / "result.json").read_text())["status"] == "interrupted"


@pytest.mark.filterwarnings("ignore:InstanceNorm in a causal model leaks")
def test_a_norm_that_looks_across_the_text_reads_it_again(words, said):
    run = trainkit.run([*words, "norm_layer=instance", "trainer.max_steps=1"]).dir
    assert sampled(run).metrics["sample/cached"] == 0
    assert any(line.startswith("note: InstanceNorm averages over the text, so all of it is read") for line in said)


def test_a_run_of_before_there_were_samples_can_be_sampled(gpt, tmp_path):
    run = shutil.copytree(gpt, tmp_path / "old")
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["sample"], config["export"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "gone").write_text("")
    assert text_of(sampled(run, "sample.prompt='line 7: '", f"data.path={tmp_path}/gone")).startswith("line 7: ")


# --- mode=export -------------------------------------------------------------------------------------------------


def test_an_export_is_the_same_model_bit_for_bit(gpt, words):
    folder = trainkit.run(["mode=export", f"resume={gpt}"]).dir
    assert folder == gpt / "export" / "trainkit"
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "model.safetensors", "result.json"}
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert len(names & {"embed.weight", "head.weight"}) == 1  # tied: written once
    ours, theirs = trainkit.load(gpt), trainkit.load(folder)
    assert theirs.head.weight is theirs.embed.weight
    assert torch.equal(ours(TOKENS), theirs(TOKENS))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert text_of(sampled(folder, "sample.seed=3")) == text_of(sampled(gpt, "sample.seed=3"))
    metrics = trainkit.run(["mode=eval", f"resume={folder}"]).metrics
    assert metrics["val/loss"] == trainkit.run(["mode=eval", f"resume={gpt}"]).metrics["val/loss"]
    further = trainkit.run([*words, f"init_from={folder}", "optimizer.lr=1e-12", "trainer.max_steps=1"])
    assert further.metrics["val/loss"] == pytest.approx(metrics["val/loss"], rel=1e-6)
    with pytest.raises(UserError, match="is not empty, and an export overwrites nothing"):
        trainkit.run(["mode=export", f"resume={gpt}"])
    with pytest.raises(UserError, match=r"holds an exported model without a training state\n.*init_from=[^ ]*$"):
        trainkit.run([f"resume={folder}", "trainer.max_steps=9"])


def test_an_export_of_subwords_needs_no_data(subwords, tmp_path, monkeypatch):
    folder = trainkit.run(["mode=export", f"resume={subwords}", f"export.dir={tmp_path / 'out'}"]).dir
    config = yaml.safe_load((folder / "config.yaml").read_text())
    expected = text_of(sampled(subwords, "sample.prompt=line", "sample.temperature=0"))
    monkeypatch.setattr("trainkit.launch.mode.sample.build_data", lambda cfg: pytest.fail("the data were read"))
    assert config["data"]["tokenizer"] == "bpe"
    assert text_of(sampled(folder, "sample.prompt=line", "sample.temperature=0")) == expected


def hub_words(run, *more):
    """The words of a run's model that a fresh run needs to be built like it."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    model = {key: value for key, value in config["model"].items() if isinstance(value, (int, float, str, bool))}
    return [f"model.{key}={value}" for key, value in model.items() if key not in ("_target_", "vocab")] + list(more)


def test_a_llama_comes_back_from_hugging_faces_layout(llama, words):
    folder = trainkit.run(["mode=export", f"resume={llama}", "export.format=hf"]).dir
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    again = trainkit.run(
        [*words, "model=llama", *hub_words(llama), f"init_from={folder}", "optimizer.lr=1e-30", "trainer.max_steps=1"]
    )
    assert torch.equal(trainkit.load(llama)(TOKENS), trainkit.load(again.dir)(TOKENS))


def test_a_gpt_without_biases_is_a_gpt2_with_zeros(gpt, words, said):
    folder = trainkit.run(["mode=export", f"resume={gpt}", "export.format=hf"]).dir
    config = json.loads((folder / "config.json").read_text())
    assert (config["eos_token_id"], config["n_layer"], config["activation_function"]) == (0, 2, "gelu")
    command = next(line for line in said if "run.py init_from=" in line)
    needed = command.split("run.py ")[1].split()
    assert f"init_from={folder}" in needed
    again = trainkit.run([*words, *needed, "optimizer.lr=1e-30", "trainer.max_steps=1"])
    torch.testing.assert_close(trainkit.load(again.dir)(TOKENS), trainkit.load(gpt)(TOKENS), rtol=1e-5, atol=1e-6)


# --- mistakes ----------------------------------------------------------------------------------------------------

HUB = ["export.format=hf", "export.dir={nowhere}"]
MISTAKES = {
    "no run": (["mode=sample", "resume={nowhere}"], "does not exist"),
    "no run to export": (["mode=export", "resume={nowhere}"], "does not exist"),
    "no layout": (["mode=export", "resume={subwords}", *HUB], "only a model trained with norm=pre has"),
    "a form": (["mode=export", "resume={gpt}", "to=pre_rms", *HUB], "to=pre_rms has no layout there"),
    "another norm": (["mode=export", "resume={gpt}", "norm=post", "export.dir={nowhere}"], "are of another model"),
    "no such checkpoint": (["mode=sample", "resume={gpt}", "checkpoint=first"], "has no first.ckpt"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake, gpt, subwords, tmp_path):
    argv, says = MISTAKES[mistake]
    where = {"gpt": gpt, "subwords": subwords, "nowhere": tmp_path / "nowhere"}
    with pytest.raises(UserError, match=says):
        trainkit.run([word.format(**where) for word in argv])
    assert not (tmp_path / "nowhere").exists()
    assert not list(tmp_path.glob(".*partial"))


def test_images_have_no_text(words):
    sizes = ["model.depth=1", "model.width=8", "trainer.threads=1", "trainer.max_steps=1", "logger=none"]
    run = trainkit.run(["model=mlp", "data=digits", *sizes, "~callbacks.figures", *(w for w in words if "paths" in w)])
    with pytest.raises(UserError, match=r"mode=sample writes text with a language model; .* trained on data=digits"):
        sampled(run.dir)
    with pytest.raises(UserError, match="writes model=gpt and model=llama; this run's is mlp"):
        trainkit.run(["mode=export", f"resume={run.dir}", "export.format=hf"])
    folder = trainkit.run(["mode=export", f"resume={run.dir}"]).dir
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(trainkit.load(folder)(images), trainkit.load(run.dir)(images))


def test_damaged_exports_are_named(gpt, tmp_path):
    folder = trainkit.run(["mode=export", f"resume={gpt}", f"export.dir={tmp_path / 'out'}"]).dir
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors' cannot be read"):
        trainkit.load(folder)


def test_an_export_that_fails_leaves_nothing(gpt, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr("trainkit.launch.mode.export.save_config", fails)
    with pytest.raises(RuntimeError, match="broken"):
        trainkit.run(["mode=export", f"resume={gpt}", f"export.dir={tmp_path / 'out'}"])
    assert list(tmp_path.iterdir()) == []
