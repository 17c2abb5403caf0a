import pytest
import torch
from torch import nn

from trainkit.norm_layer.qk import qk_norm
from trainkit.norm_layer.rms import RMSNorm

BATCH, HEADS, LENGTH, DIM = 2, 3, 5, 4


def queries() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(BATCH, HEADS, LENGTH, DIM, dtype=torch.float64)


def test_head_has_one_gain_for_all_heads():
    norm, q = qk_norm(RMSNorm, "head", heads=HEADS, head_dim=DIM).double(), queries()
    assert [p.shape for p in norm.parameters()] == [(DIM,)]
    y = norm(q)
    for head in range(HEADS):
        torch.testing.assert_close(y[:, head].square().mean(-1), torch.ones(BATCH, LENGTH).double(), rtol=1e-5, atol=0)


def test_full_is_the_norm_of_the_projection_before_the_head_split():
    norm, q = qk_norm(RMSNorm, "full", heads=HEADS, head_dim=DIM).double(), queries()
    (gain,) = norm.parameters()
    with torch.no_grad():
        gain.copy_(torch.randn(HEADS * DIM))
    projected = q.transpose(1, 2).reshape(BATCH, LENGTH, HEADS * DIM)
    expected = gain * projected / (projected.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = expected.view(BATCH, LENGTH, HEADS, DIM).transpose(1, 2)
    torch.testing.assert_close(norm(q), expected, rtol=1e-12, atol=1e-12)


def test_full_mixes_heads_and_head_does_not():
    q, other = queries(), queries()
    other[:, 0] *= 10
    full, head = (qk_norm(RMSNorm, mode, heads=HEADS, head_dim=DIM).double() for mode in ("full", "head"))
    assert not torch.allclose(full(q)[:, 1], full(other)[:, 1])
    assert torch.equal(head(q)[:, 1], head(other)[:, 1])


def test_none_and_nonsense():
    assert isinstance(qk_norm(RMSNorm, "none", heads=HEADS, head_dim=DIM), nn.Identity)
    with pytest.raises(ValueError, match=r"model\.qk_norm is one of none, head, full; got 'heads'"):
        qk_norm(RMSNorm, "heads", heads=HEADS, head_dim=DIM)
