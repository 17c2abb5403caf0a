"""The interface: sites, and what every placement on the menu owes to a model."""

import pytest
import torch
from torch import nn

from trainkit.norm.placement import Residual, Site, scale_branch

from .stack import PLACEMENTS, WIDTH, Toy, menu, toys


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("wrong", [{"layer": 2, "depth": 2}, {"layer": -1, "depth": 2}, {"index": 4, "count": 4}])
def test_a_site_outside_of_its_network_is_refused(wrong):
    with pytest.raises(ValueError, match=r"counts from 0 and stays below"):
        Site("attn", 8, **wrong)


def test_the_stream_of_a_site_is_its_width_unless_told():
    assert Site("attn", 8).stream == 8
    assert Site("hidden", 32, stream=8).stream == 8


@pytest.mark.parametrize("name", ["deepnorm", "keel", "inverse_depth", "skipinit", "fixup", "hyper"])
def test_a_placement_that_counts_layers_needs_to_be_told(name):
    with pytest.raises(ValueError, match=rf"norm={name} depends on which sublayer of how many .* Pass layer, depth"):
        menu(name).around(Toy(WIDTH), Site("attn", WIDTH))


def test_a_star_needs_to_know_the_first_block():
    with pytest.raises(ValueError, match="depends on which sublayer"):
        menu("hybrid", star=True).around(Toy(WIDTH), Site("attn", WIDTH))


@pytest.mark.parametrize("name", ["deepnorm", "fixup"])
def test_a_sublayer_that_cannot_be_scaled_is_refused(name):
    site = Site("attn", WIDTH, layer=0, depth=1, index=0, count=2)
    with pytest.raises(ValueError, match=rf"norm={name} rescales .* Linear has no method scale_branch"):
        menu(name).around(nn.Linear(WIDTH, WIDTH), site)


def test_scale_branch_multiplies():
    f = Toy(2)
    nn.init.ones_(f.first.weight)
    nn.init.ones_(f.last.weight)
    scale_branch(f, "norm=any", first=0.5, last=3.0)
    assert f.first.weight.eq(0.5).all()
    assert f.last.weight.eq(3.0).all()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("deepnorm", {"alpha": 0.0}, "norm.alpha must be positive"),
        ("deepnorm", {"beta": -1.0}, "norm.beta must be positive"),
        ("keel", {"alpha": float("nan")}, "norm.alpha must be positive"),
        ("inverse_depth", {"power": -1.0}, "norm.power must not be negative"),
        ("residual_dual", {"dual_scale": 0.0}, "norm.dual_scale must be positive"),
        ("fixup", {"layers": 1}, "norm.layers counts"),
        ("ngpt", {"rate": 0.0}, "norm.rate is"),
        ("hyper", {"streams": 7}, "norm.streams must be between 1 and 6"),
        ("hyper", {"streams": 0}, "norm.streams must be between 1 and 6"),
        ("mix", {"alpha": 1.1}, "norm.alpha is the share"),
        ("mix", {"alpha": -0.1}, "norm.alpha is the share"),
    ],
)
def test_a_setting_without_meaning_is_refused(name, settings, message):
    with pytest.raises(Exception, match=message) as caught:
        menu(name, **settings)
    assert isinstance(caught.value.__cause__ or caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "constant"),
    [
        ("deepnorm", "skip=1.56508"),
        ("keel", "skip=6"),
        ("inverse_depth", "scale=0.166667"),
        ("rezero", "scale=learned"),
        ("skipinit", "scale=learned"),
        ("residual_dual", "scale=1"),
        ("hyper", "streams=4, index=5"),
        ("ngpt", "rate=0.05"),
        ("lns", "factor=0.57735"),
    ],
)
def test_print_shows_the_constants(name, constant):
    assert constant in repr(toys(menu(name)))


@pytest.mark.parametrize("name", PLACEMENTS)
class TestContract:
    def test_every_parameter_gets_a_finite_gradient(self, name):
        model = toys(menu(name))
        x = torch.randn(2, 5, WIDTH, requires_grad=True)
        y = model(x)
        assert y.shape == x.shape
        y.square().mean().backward()
        for parameter in (x, *model.parameters()):
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()

    def test_weights_are_called_alike_under_all_of_them(self, name):
        names = dict(toys(menu(name)).named_parameters())
        assert all(f"sublayers.{i}.f.{part}.weight" in names for i in range(6) for part in ("first", "last"))

    def test_scalars_and_vectors_beside_the_sublayers(self, name):
        """Only hyper brings matrices; an optimizer that takes matrices alone must not get a scale of nGPT."""
        own = {k: p for k, p in toys(menu(name)).named_parameters() if ".f." not in k}
        assert {k.rsplit(".", 1)[-1] for k, p in own.items() if p.ndim != 1} <= {"read_mix", "write"}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_dtype_is_kept(self, name, dtype):
        y = toys(menu(name)).to(dtype)(torch.randn(2, 5, WIDTH, dtype=dtype))
        assert y.dtype == dtype
        assert y.isfinite().all()

    def test_half_precision_is_close(self, name):
        model, x = toys(menu(name)), torch.randn(2, 5, WIDTH).bfloat16().float()
        exact, half = model(x), model.bfloat16()(x.bfloat16()).float()
        assert (exact - half).norm() <= 0.05 * exact.norm()

    def test_autocast_keeps_the_stream_in_float32(self, name):
        with torch.autocast("cpu", torch.bfloat16):
            assert toys(menu(name))(torch.randn(2, 5, WIDTH)).dtype == torch.float32

    def test_a_nan_stays_in_its_token_and_is_not_hidden(self, name):
        x = torch.randn(2, 5, WIDTH)
        x[1, 3, 0] = float("nan")
        broken = toys(menu(name))(x).isnan().any(-1)
        assert broken[1, 3]
        assert broken.sum() == 1

    def test_no_tokens(self, name):
        assert toys(menu(name))(torch.randn(2, 0, WIDTH)).shape == (2, 0, WIDTH)

    def test_tokens_are_treated_one_by_one(self, name):
        model, x = toys(menu(name)).double(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
        torch.testing.assert_close(model(x)[:, 2:3], model(x[:, 2:3]), rtol=1e-12, atol=1e-12)

    def test_channels_may_stand_on_another_axis(self, name):
        model = toys(menu(name)).double()
        other = toys(menu(name), axis=1).double()
        other.load_state_dict(model.state_dict())
        x = torch.randn(2, WIDTH, 3, 4, dtype=torch.float64)
        torch.testing.assert_close(other(x), model(x.movedim(1, -1)).movedim(-1, 1), rtol=1e-12, atol=1e-12)

    @pytest.mark.slow
    def test_traces_as_one_graph(self, name):
        model, x = toys(menu(name), depth=1), torch.randn(2, 5, WIDTH)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


def test_residual_multiplies_as_told():
    skip, scale = 2.0, nn.Parameter(torch.tensor([3.0]))
    h = torch.randn(4)
    torch.testing.assert_close(Residual(nn.ReLU(), skip=skip, scale=scale)(h), 2 * h + 3 * h.relu())
