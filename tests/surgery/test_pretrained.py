"""Hugging Face folders of GPT-2 and Llama give the numbers that those models compute, or one sentence."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tests.surgery.folders import (
    GPT2,
    GPT2_WORDS,
    LLAMA,
    LLAMA_WORDS,
    gpt2,
    gpt2_tensors,
    llama,
    llama_tensors,
    write,
)
from trainkit.launch.compose import compose
from trainkit.launch.explain import UserError
from trainkit.launch.huggingface.pretrained import load

TOKENS = torch.tensor([3, 1, 4, 1, 5, 92, 65, 35, 89])


composed = cache(lambda *words: compose(words))


def loaded(folder, words, vocab=256):
    """The float64 model of these words with the folder's weights."""
    cfg = deepcopy(composed(*words))
    OmegaConf.update(cfg, "data.vocab", vocab)
    model = instantiate(cfg.model).double().eval()
    load(model, folder, cfg)
    return model


def check(folder, words, expected):
    model = loaded(folder, words)
    torch.testing.assert_close(model(TOKENS[None])[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shards", [1, 3])
def test_gpt2(tmp_path, shards):
    tensors = gpt2_tensors()
    check(write(tmp_path / "hf", GPT2, tensors, shards=shards), GPT2_WORDS, gpt2(tensors, TOKENS))


@pytest.mark.parametrize("shards", [1, 3])
def test_llama(tmp_path, shards):
    tensors = llama_tensors()
    check(write(tmp_path / "hf", LLAMA, tensors, shards=shards), LLAMA_WORDS, llama(tensors, TOKENS))


def test_gpt2_without_prefix_and_with_masks(tmp_path):
    """The layout of the first release, whose folder also repeats the tied head."""
    tensors = gpt2_tensors()
    plain = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    head = {"lm_head.weight": plain["wte.weight"].clone()}
    check(write(tmp_path / "hf", GPT2, plain | masks | head), GPT2_WORDS, gpt2(tensors, TOKENS))


def test_a_tied_llama_with_nested_rotary_settings(tmp_path):
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    config = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    config |= {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    check(write(tmp_path / "hf", config, tensors), [*LLAMA_WORDS, "model.tie=true"], llama(tensors, TOKENS))


def test_half_precision_is_widened(tmp_path):
    tensors = {name: value.bfloat16() for name, value in llama_tensors().items()}
    check(write(tmp_path / "hf", LLAMA, tensors), LLAMA_WORDS, llama(tensors, TOKENS))


def test_the_words_that_are_needed_are_named(tmp_path):
    folder = write(tmp_path / "hf", GPT2, gpt2_tensors())
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError) as error:
        loaded(folder, ["norm_layer.eps=1e-6"], vocab=100)
    _, words, tokenizer = str(error.value).splitlines()
    needed = {*GPT2_WORDS[1:], "norm_layer.eps=1e-05", "model.vocab=256", "model.hidden=48"}
    assert set(words.split()) == needed
    assert f"data.tokenizer=file data.tokenizer_file={folder}/tokenizer.json" in tokenizer


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        ([*GPT2_WORDS, "norm=peri"], "norm=pre"),
        ([*GPT2_WORDS, "model.gelu=exact"], "model.gelu=tanh"),
        ([*GPT2_WORDS, "model.tie=false"], "model.tie=true"),
        ([*GPT2_WORDS, "model.heads=2"], "model.heads=3"),
        ([*GPT2_WORDS, "norm_layer=rms"], "norm_layer=layer"),
        (LLAMA_WORDS, "model=gpt"),
    ],
)
def test_another_architecture_is_refused_even_where_the_tensors_would_fit(tmp_path, words, needed):
    folder = write(tmp_path / "hf", GPT2, gpt2_tensors())
    with pytest.raises(UserError, match=f"another architecture or size; for its weights add\n.*{needed}"):
        loaded(folder, words)


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


DEFECTS = {
    "a missing tensor": (
        GPT2,
        lambda t: without(t, "transformer.h.1.ln_2.bias"),
        r"the tensor transformer\.h\.1\.ln_2\.bias is missing",
    ),
    "a tensor too many": (
        GPT2,
        lambda t: t | {"transformer.h.2.ln_2.bias": torch.ones(3)},
        r"1 tensors have no place in the model, such as transformer\.h\.2\.ln_2\.bias",
    ),
    "a tensor of another shape": (
        GPT2,
        lambda t: t | {"transformer.wte.weight": torch.ones(250, 12)},
        r"transformer\.wte\.weight has the shape \(250, 12\) where the model has \(256, 12\)",
    ),
    "another kind": ({"model_type": "bert"}, lambda t: t, "weights of gpt2 and llama can be read; this is 'bert'"),
    "another activation": (GPT2 | {"activation_function": "relu"}, lambda t: t, "this has relu"),
    "another attention": (
        GPT2 | {"scale_attn_by_inverse_layer_idx": True},
        lambda t: t,
        "scale_attn_by_inverse_layer_idx=false, not true",
    ),
    "stretched positions": (
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}},
        lambda t: t,
        "rope_type=default, not linear",
    ),
    "heads of another width": (LLAMA | {"head_dim": 8}, lambda t: t, "head_dim=4, not 8"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_folder_that_does_not_fit_is_one_sentence(tmp_path, defect):
    config, change, says = DEFECTS[defect]
    words = LLAMA_WORDS if config.get("model_type") == "llama" else GPT2_WORDS
    folder = write(tmp_path / "hf", config, change(gpt2_tensors()))
    with pytest.raises(UserError, match=says) as error:
        loaded(folder, words)
    assert "\n" not in str(error.value)


def test_damaged_files_are_named(tmp_path):
    folder = write(tmp_path / "hf", GPT2, gpt2_tensors(), shards=2)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is damaged"):
        loaded(folder, GPT2_WORDS)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is missing; only safetensors are read"):
        loaded(folder, GPT2_WORDS)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        loaded(folder, GPT2_WORDS)
