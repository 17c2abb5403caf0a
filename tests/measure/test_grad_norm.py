"""grad_norm against a loop in float64."""

import math

import pytest
import torch
from torch import nn

from trainkit.measure.grad_norm import grad_norm, grad_norm_l1


def groups(dtype: torch.dtype, *, scale: float = 1.0) -> dict[str, list[nn.Parameter]]:
    """Parameters with gradients of various shapes, one of them without."""
    generator = torch.Generator().manual_seed(0)

    def parameter(*shape: int) -> nn.Parameter:
        made = nn.Parameter(torch.zeros(shape, dtype=dtype))
        made.grad = (torch.randn(shape, generator=generator) * scale).to(dtype)
        return made

    silent = nn.Parameter(torch.zeros(3, dtype=dtype))
    return {
        "embed": [parameter(7, 4)],
        "blocks.0.attn": [parameter(4, 12), parameter(4, 4), silent],
        "blocks.0.norm": [parameter(4)],
        "blocks.1.attn": [parameter(4, 4)],
        "stages.2.blocks.1.mlp": [parameter(4, 16)],
        "head": [silent],
    }


def expected(given: dict[str, list[nn.Parameter]]) -> dict[str, float]:
    """The definition, one number at a time."""
    squares: dict[str, float] = {"global": 0.0}
    for label, parameters in given.items():
        for name in {label, "global", ".".join(label.split(".")[:-1])} - {""}:
            squares.setdefault(name, 0.0)
            for p in parameters:
                squares[name] += 0.0 if p.grad is None else sum(g**2 for g in p.grad.double().flatten().tolist())
    return {name: math.sqrt(value) for name, value in squares.items()}


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)],
)
def test_equals_the_definition(dtype, tolerance):
    given = groups(dtype)
    found = grad_norm(given)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected(given), rel=tolerance)
    assert all(value.ndim == 0 for value in found.values())
    assert {value.dtype for value in found.values()} == {torch.promote_types(dtype, torch.float32)}


def test_half_precision_gradients_do_not_overflow():
    given = groups(torch.float16, scale=1e4)  # 1e8, their square, is beyond fp16
    assert float(grad_norm(given)["global"]) == pytest.approx(expected(given)["global"], rel=1e-6)


def test_mixed_dtypes_are_computed_in_the_widest():
    given = groups(torch.float32) | {"embed": groups(torch.bfloat16)["embed"], "head": groups(torch.float64)["embed"]}
    found = grad_norm(given)
    assert found["global"].dtype == torch.float64
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected(given), rel=1e-6)


def test_the_total_is_that_of_clipping():
    given = groups(torch.float32)
    parameters = [p for group in given.values() for p in group]
    assert float(grad_norm(given)["global"]) == pytest.approx(
        float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    )


def test_a_broken_gradient_shows_in_its_own_part_only():
    given = groups(torch.float32)
    gradient = given["blocks.1.attn"][0].grad
    assert gradient is not None
    gradient[0, 0] = math.nan
    broken = {name for name, value in grad_norm(given).items() if math.isnan(value)}
    assert broken == {"blocks.1.attn", "blocks.1", "global"}


def test_without_gradients_everything_is_zero():
    found = grad_norm({"blocks.0.attn": [nn.Parameter(torch.ones(2))], "head": []})
    assert {name: float(value) for name, value in found.items()} == dict.fromkeys(
        ("blocks.0.attn", "head", "blocks.0", "global"), 0.0
    )


def test_gradients_are_only_read():
    given = groups(torch.float32)
    before = [p.grad.clone() for group in given.values() for p in group if p.grad is not None]
    grad_norm(given)
    after = [p.grad for group in given.values() for p in group if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_the_l1_norm_is_the_sum_of_magnitudes(dtype, tolerance):
    parameters = [p for group in groups(dtype).values() for p in group]
    magnitudes = sum(p.grad.double().abs().sum().item() for p in parameters if p.grad is not None)
    found = grad_norm_l1(parameters)
    assert float(found) == pytest.approx(magnitudes, rel=tolerance)
    assert (found.ndim, found.dtype) == (0, torch.promote_types(dtype, torch.float32))
    assert float(grad_norm_l1([nn.Parameter(torch.ones(2))])) == 0.0


def test_the_l1_norm_of_an_embedding_does_not_lose_its_last_digits():
    """Ten million float32 added one by one are off by parts in a thousand."""
    p = nn.Parameter(torch.zeros(25_000, 400))
    p.grad = torch.full_like(p, 0.1)
    assert float(grad_norm_l1([p])) == pytest.approx(float(p.grad[0, 0].double()) * p.numel(), rel=1e-6)
    p.grad = torch.full((400, 25_000), 0.1).T  # as a tied weight may leave it
    assert float(grad_norm_l1([p])) == pytest.approx(float(p.grad[0, 0].double()) * p.numel(), rel=1e-6)
