"""compile=true: what is in the menu runs compiled with the same numbers, or says that it cannot."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from tests.menu import build, options
from trainkit.launch.process import compiling
from trainkit.launch.process.compiling import compile_blocks, wanted
from trainkit.measure.modes import evaluating
from trainkit.model.parts.recompute import Recomputed, recompute
from trainkit.model.parts.token_loss import token_loss

SMALL = ["model.depth=3", "model.width=32", "model.heads=2", "model.context=8", "model.vocab=64"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gpt(*words):
    torch.manual_seed(0)
    return build("model", "model=gpt", *SMALL, *words)


def steps(network, inputs, loss, count=3):
    """The losses of a few steps of gradient descent, and the weights that they end at."""
    losses = []
    for _ in range(count):
        found = loss(network(inputs))
        found.backward()
        losses.append(found.item())
        with torch.no_grad():
            for p in network.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
                    p.grad = None
    return losses, [p.detach().clone() for p in network.parameters()]


def same_numbers(make, inputs, loss, backend="aot_eager"):
    plain, compiled = make(), make()
    compile_blocks(compiled, strict=True, backend=backend)
    torch.manual_seed(1)
    wanted_losses, wanted_weights = steps(plain, inputs, loss)
    torch.manual_seed(1)
    losses, weights = steps(compiled, inputs, loss)
    assert losses == pytest.approx(wanted_losses, rel=1e-4)
    for found, want in zip(weights, wanted_weights, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-5)
    assert list(compiled.state_dict()) == list(plain.state_dict())


def tokens():
    return torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(2))


@pytest.mark.slow
@pytest.mark.parametrize("norm", options("norm"))
def test_every_placement(norm):
    x = tokens()
    same_numbers(lambda: gpt(f"norm={norm}"), x, lambda logits: token_loss(logits, x))


@pytest.mark.slow
@pytest.mark.parametrize("layer", options("norm_layer"))
def test_every_norm_layer(layer):
    x = tokens()
    same_numbers(lambda: gpt(f"norm_layer={layer}"), x, lambda logits: token_loss(logits, x))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "vit_tiny", "resnet18", "cnn", "mlp"])
def test_every_model(model):
    words = SMALL if model == "llama" else ["model.image=[3,32,32]", "model.classes=10"]
    x = tokens() if model == "llama" else torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))

    def make():
        torch.manual_seed(0)
        return build("model", f"model={model}", *words)

    same_numbers(make, x, lambda out: token_loss(out, x) if model == "llama" else out.square().mean())


@pytest.mark.slow
def test_kernels_of_a_block_are_made_once_for_all_and_give_the_same_numbers():
    x = tokens()
    torch._dynamo.utils.counters.clear()
    same_numbers(gpt, x, lambda logits: token_loss(logits, x), backend="inductor")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_hooks_inside_a_compiled_block_are_called_while_it_is_looked_at():
    network, seen = gpt(), []
    compile_blocks(network, strict=True, backend="eager")
    network(tokens())
    network.blocks[1].mlp.f.inp.register_forward_hook(lambda *_: seen.append(1))
    with evaluating(network), torch.no_grad():
        network(tokens())
    assert seen == [1]


def test_recomputed_blocks_share_a_class_as_their_kernels_do():
    network = gpt()
    kind = type(network.blocks[0])
    for block in network.blocks:
        recompute(block)
        recompute(block)
    assert len({type(block) for block in network.blocks}) == 1
    assert type(network.blocks[0]).__mro__[1:3] == (Recomputed, kind)


def test_too_many_versions_of_a_block_go_on_without(monkeypatch):
    from torch._dynamo.exc import FailOnRecompileLimitHit

    def limit(*_):
        raise FailOnRecompileLimitHit("too many versions")

    said = []
    monkeypatch.setattr(compiling.log, "warning", lambda *words: said.append(words[0] % words[1:]))
    network, plain = gpt(), gpt()
    compile_blocks(network, strict=False, backend="eager")
    for block in network.blocks:
        block._compiled_call_impl.compiled = limit
    torch.testing.assert_close(network(tokens()), plain(tokens()), rtol=0, atol=0)
    assert len(said) == 1


def broken(graph, inputs):
    raise RuntimeError("no compiler here")


broken_backward = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph), bw_compiler=broken)


@pytest.mark.parametrize("backend", [broken, broken_backward])
def test_what_cannot_be_compiled_goes_on_without_and_says_why(backend, monkeypatch):
    said = []
    monkeypatch.setattr(compiling.log, "warning", lambda *words: said.append(words[0] % words[1:]))
    network, plain = gpt(), gpt()
    compile_blocks(network, strict=False, backend=backend)
    found = network(tokens())
    torch.testing.assert_close(found, plain(tokens()), rtol=0, atol=0)
    found.sum().backward()
    assert len(said) == 1
    assert "no compiler here" in said[0]


def test_what_was_asked_for_is_not_left_out():
    network = gpt()
    compile_blocks(network, strict=True, backend=broken)
    with pytest.raises(Exception, match="no compiler here"):
        network(tokens())


def test_a_model_without_blocks_is_compiled_whole():
    network = nn.Linear(2, 2)
    compile_blocks(network, strict=True, backend="eager")
    assert network._compiled_call_impl is not None


@pytest.mark.parametrize(("setting", "kind", "answer"), [
    (True, "cpu", True), (False, "cuda", False), ("auto", "cpu", False), ("auto", "cuda", True),
])  # fmt: skip
def test_auto_compiles_on_a_cuda_gpu(setting, kind, answer, monkeypatch):
    monkeypatch.setattr(compiling, "device_kind", lambda accelerator: kind)
    monkeypatch.setattr(compiling, "find_spec", lambda name: object())
    assert wanted(setting, "auto") is answer


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["batch", "power", "unified", "rep_batch", "prep_batch", "batch_renorm"])
def test_statistics_of_recomputed_blocks_move_once_per_step(layer):
    x = tokens()

    def make():
        network = gpt(f"norm_layer={layer}")
        for block in network.blocks:
            recompute(block)
        return network

    plain, recomputed, compiled = gpt(f"norm_layer={layer}"), make(), make()
    compile_blocks(compiled, strict=True, backend="aot_eager")
    for network in (plain, recomputed, compiled):
        steps(network, x, lambda logits: token_loss(logits, x))
    for found in (recomputed, compiled):
        for (name, value), (_, want) in zip(found.named_buffers(), plain.named_buffers(), strict=True):
            torch.testing.assert_close(value, want, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
