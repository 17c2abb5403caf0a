"""The property that each paper claims for its placement, in float64."""

from math import e, sqrt

import pytest
import torch
from torch import nn

from trainkit.norm.placement import Site

from .stack import WIDTH, Blocks, Stack, Toy, menu, rms, scatter, toys

pytestmark = pytest.mark.usefixtures("float64")


class Nothing(nn.Module):
    """f(h) = 0."""

    def forward(self, h):
        return 0 * h

    def scale_branch(self, *, first, last):
        pass


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def x():
    return torch.randn(2, 5, WIDTH)


@pytest.mark.parametrize("name", ["pre", "lns", "sandwich", "output", "skipinit", "mix"])
def test_without_sublayers_only_the_last_norm_is_left(name):
    settings = {"alpha": 0.0} if name == "mix" else {}
    h = x()
    close(Stack(menu(name, **settings), lambda i: Nothing())(h), rms(h))


@pytest.mark.parametrize("name", ["post", "deepnorm", "keel"])
def test_without_sublayers_post_norms_equal_one(name):
    h = x()
    close(Stack(menu(name), lambda i: Nothing())(h), rms(h), 1e-5)  # every norm has an eps of its own


@pytest.mark.parametrize("name", ["rezero", "inverse_depth", "fixup"])
def test_without_sublayers_norm_free_stacks_are_the_identity(name):
    h = x()
    close(Stack(menu(name), lambda i: Nothing())(h), h)


@pytest.mark.parametrize("name", ["post", "deepnorm", "keel"])
def test_every_row_of_a_post_stream_has_mean_square_one(name):
    model, h = toys(menu(name)), x()
    for sublayer in model.sublayers:
        h = sublayer(h)
        close(h.square().mean(-1), torch.ones(2, 5), 1e-5)


@pytest.mark.parametrize("name", ["peri", "sandwich", "output"])
def test_an_output_norm_adds_mean_square_one(name):
    model, h = toys(menu(name)), x()
    for sublayer in model.sublayers:
        close((sublayer(h) - h).square().mean(-1), torch.ones(2, 5), 1e-3)


@pytest.mark.parametrize("name", ["peri", "sandwich", "output"])
def test_an_output_norm_cancels_the_scale_of_the_last_weight(name):
    placement = menu(name)
    model, h, c = toys(placement), x(), 1024.0
    weight = model.sublayers[2].f.last.weight
    # Far above eps on both sides, so that the equality is the property's and not eps's.
    with torch.no_grad():
        weight *= 1e4

    def output_and_gradient():
        y = model(h)
        return y, torch.autograd.grad(y.pow(3).sum(), weight)[0]

    y, gradient = output_and_gradient()
    with torch.no_grad():
        weight *= c
    y_scaled, gradient_scaled = output_and_gradient()
    close(y_scaled, y, 1e-9)
    close(gradient_scaled * c, gradient, 1e-7)


def test_peri_normalizes_the_embedding_as_an_option():
    h = x()
    close(menu("peri").before(Site("embed", WIDTH))(h), rms(h))
    close(menu("peri", embed=False).before(Site("embed", WIDTH))(h), h)


def test_sandwich_is_peri_without_the_embedding_norm():
    peri, sandwich, h = toys(menu("peri", embed=False)), toys(menu("sandwich")), x()
    sandwich.load_state_dict(peri.state_dict())
    close(sandwich(h), peri(h), 0)


@pytest.mark.parametrize(("depth", "alpha"), [(8, 2.0), (12, 2.213), (24, 2.632), (32, 2.828)])
def test_deepnorm_alpha_counts_blocks(depth, alpha):
    assert toys(menu("deepnorm"), depth=depth).sublayers[-1].skip == pytest.approx(alpha, abs=5e-4)


def test_deepnorm_beta_shrinks_values_outputs_and_mlp_only():
    torch.manual_seed(3)
    usual = Blocks(menu("post"), depth=2).state_dict()
    torch.manual_seed(3)
    ours = Blocks(menu("deepnorm"), depth=2).state_dict()
    beta = (8 * 2) ** -0.25
    assert beta < 1  # the code bases that invert it grow the weights
    for name, weight in usual.items():
        expected = weight.clone()
        if name.endswith("qkv.weight"):
            expected[2 * WIDTH :] *= beta
        elif name.endswith(("inp.weight", "out.weight")):
            expected *= beta
        close(ours[name], expected)


def test_deepnorm_takes_other_constants():
    torch.manual_seed(3)
    sublayer = menu("deepnorm", alpha=3.0, beta=1.0).around(
        f := Toy(WIDTH), Site("mlp", WIDTH, depth=1, count=2, index=1)
    )
    torch.manual_seed(3)
    g, h = Toy(WIDTH), x()
    close(f.last.weight, g.last.weight, 0)
    close(sublayer(h), rms(3 * h + g(h)))


def test_keel_weighs_the_residual_by_the_number_of_sublayers():
    model, h = toys(menu("keel"), depth=3), x()
    assert {sublayer.skip for sublayer in model.sublayers} == {6}
    close(model.sublayers[4](h), rms(6 * h + model.sublayers[4].f(rms(h))))


@pytest.mark.parametrize("depth", [1, 3, 50])
def test_inverse_depth_bounds_identical_sublayers_by_e(depth):
    n, h = 2 * depth, x()
    y = Stack(menu("inverse_depth"), lambda i: nn.Identity(), depth=depth)(h)
    close(y, (1 + 1 / n) ** n * h)
    assert (y / h).max() < e
    close(Stack(menu("inverse_depth", power=0.5), lambda i: nn.Identity(), depth=depth)(h), (1 + 1 / sqrt(n)) ** n * h)
    close(Stack(menu("inverse_depth", power=0), lambda i: nn.Identity(), depth=depth)(h), 2.0**n * h)


def test_rezero_starts_as_the_identity_and_moves_its_scalars_first():
    model, h = toys(menu("rezero")), x()
    y = model(h)
    close(y, h, 0)
    y.pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max().gt(0) == name.endswith("scale")


def test_skipinit_starts_at_one_over_the_root_of_the_blocks():
    h = x()
    for settings, first in (({}, 1 / sqrt(3)), ({"init": 0.0}, 0.0)):
        sublayer = toys(menu("skipinit", **settings), depth=3).sublayers[0]
        close(sublayer.scale, torch.tensor([first]))
        close(sublayer(h), h + first * sublayer.f(rms(h)))


def test_residual_dual_does_not_depend_on_the_scale_of_the_second_stream():
    full, small, h = toys(menu("residual_dual")), toys(menu("residual_dual", dual_scale=0.125)), x()
    small.load_state_dict(full.state_dict())
    close(small(h), full(h), 1e-3)
    assert not torch.equal(small(h), full(h))


def test_residual_dual_is_post_ln_plus_the_norm_of_a_sum():
    model, h = scatter(toys(menu("residual_dual", dual_scale=0.5, output_scale=2.0))), x()
    post, dual = h, 0.5 * h
    for sublayer in model.sublayers:
        u = sublayer.f(post)
        post, dual = rms(post + u, sublayer.post.gain), dual + 0.5 * u
    close(model(h), 2 * post + rms(dual, model.after.norm.gain))


@pytest.mark.parametrize(("depth", "alpha", "post"), [(12, 0.25, 3), (32, 0.0625, 2), (100, 0.29, 29), (5, 0.25, 1)])
def test_mix_counts_blocks_not_sublayers(depth, alpha, post):
    model = toys(menu("mix", alpha=alpha), depth=depth)
    assert [sublayer.post is not None for sublayer in model.sublayers] == [i < 2 * post for i in range(2 * depth)]


def test_lns_divides_by_the_root_of_the_block():
    model, h = toys(menu("lns"), depth=3), x()
    for i, sublayer in enumerate(model.sublayers):
        close(sublayer(h), h + sublayer.f(rms(h) / sqrt(i // 2 + 1)))
