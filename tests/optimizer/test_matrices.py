"""What all methods that project matrices share: stacks, state, ranks, precision, and parameters they refuse."""

import pytest
import torch
from torch import nn

from trainkit.optimizer import matrices
from trainkit.optimizer.conda import Conda
from trainkit.optimizer.dct_adamw import DCTAdamW
from trainkit.optimizer.fira import Fira
from trainkit.optimizer.galore import GaLore
from trainkit.optimizer.orthogonal import by_shape
from trainkit.optimizer.trion import Trion

MAKERS = {
    "conda": lambda ps, **k: Conda(ps, lr=0.01, weight_decay=0.1, update_proj_gap=3, **k),
    "conda_left": lambda ps, **k: Conda(ps, lr=0.01, update_proj_gap=3, proj_type="reverse_std", **k),
    "conda_full": lambda ps, **k: Conda(ps, lr=0.01, update_proj_gap=3, proj_type="full", **k),
    "galore": lambda ps, **k: GaLore(ps, lr=0.01, weight_decay=0.1, update_proj_gap=3, rank=3, **k),
    "galore_reverse": lambda ps, **k: GaLore(ps, lr=0.01, rank=3, proj_type="reverse_std", **k),
    "galore_full": lambda ps, **k: GaLore(ps, lr=0.01, rank=3, proj_type="full", **k),
    "fira": lambda ps, **k: Fira(ps, lr=0.01, weight_decay=0.1, update_proj_gap=3, rank=3, **k),
    "dct_adamw": lambda ps, **k: DCTAdamW(ps, lr=0.01, update_proj_gap=2, rank=3, **k),
    "dct_adamw_ef": lambda ps, **k: DCTAdamW(ps, lr=0.01, rank=3, rotate_subspace=False, use_ef=True, **k),
    "dct_adamw_8bit": lambda ps, **k: DCTAdamW(ps, lr=0.01, rank=3, use_ef=True, q_ef=True, **k),
    "trion": lambda ps, **k: Trion(ps, lr=0.01, weight_decay=0.1, rank=3, dtype="parameter", **k),
}
RANKED = ["galore", "fira", "dct_adamw", "trion"]
SHAPES = [(8, 5), (5, 8), (8, 5), (6, 6), (6, 2, 2, 2), (5, 8), (8, 5)]


def parameters(dtype=torch.float64, shapes=SHAPES):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes]


def steps(optimizer, params, count, seed=1, first=0):
    for step in range(first, first + count):
        torch.manual_seed(seed + step)
        for p in params:
            p.grad = torch.randn(p.shape, dtype=torch.float64).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("name", MAKERS)
def test_stacks_are_the_plain_loop(name, monkeypatch):
    """The batched path of accelerators against one matrix at a time."""
    alone, stacked = parameters(), parameters()
    steps(MAKERS[name](alone), alone, 7)
    monkeypatch.setattr(matrices, "together", by_shape)
    assert max(map(len, by_shape(stacked))) == 3
    steps(MAKERS[name](stacked), stacked, 7)
    for a, b in zip(alone, stacked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAKERS)
def test_resumes_bit_for_bit(name, dtype, tmp_path):
    params = parameters(dtype)
    optimizer = MAKERS[name](params)
    steps(optimizer, params, 4)
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, tmp_path / "saved")
    steps(optimizer, params, 4, first=4)

    saved = torch.load(tmp_path / "saved", weights_only=True)
    again = [nn.Parameter(p.detach().clone()) for p in saved["params"]]
    resumed = MAKERS[name](again)
    resumed.load_state_dict(saved["optimizer"])
    steps(resumed, again, 4, first=4)
    for a, b in zip(params, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MAKERS)
def test_half_precision_is_float32_rounded_once(name):
    half = parameters(torch.bfloat16)
    optimizer = MAKERS[name](half)
    wide = [nn.Parameter(p.detach().float()) for p in half]
    twin = MAKERS[name](wide)
    torch.manual_seed(2)
    for p, q in zip(half, wide, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.float()
    optimizer.step()
    twin.step()
    for p, q in zip(half, wide, strict=True):
        assert torch.equal(p, q.to(p.dtype))
        for key, value in optimizer.state[p].items():
            assert key == "step" or value.dtype in (torch.float32, torch.int64, torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("name", MAKERS)
def test_zero_and_tiny_gradients_stay_finite(name, dtype):
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    optimizer = MAKERS[name](params)
    for scale in (0.0, 1e-7, 0.0, 1.0):
        for p in params:
            p.grad = torch.full_like(p, scale)
        optimizer.step()
    assert all(p.isfinite().all() and p.abs().max() < 100 for p in params)
    assert any(p.abs().max() > 0 for p in params)


@pytest.mark.parametrize("name", MAKERS)
def test_a_parameter_without_gradient_waits(name):
    params = parameters()
    optimizer = MAKERS[name](params)
    steps(optimizer, params, 2)
    before = params[0].detach().clone()
    params[0].grad = None
    optimizer.step()
    assert torch.equal(params[0], before)
    assert [optimizer.state[p]["step"] for p in params[:2]] == [2, 3]


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_are_left_alone_and_maximize_turns_them(name):
    params, mirrored = parameters(), parameters()
    optimizer, twin = MAKERS[name](params), MAKERS[name](mirrored, maximize=True)
    kept = [torch.randn_like(p) for p in params]
    for p, q, g in zip(params, mirrored, kept, strict=True):
        p.grad, q.grad = g.clone(), -g
    optimizer.step()
    twin.step()
    for p, q, g in zip(params, mirrored, kept, strict=True):
        assert torch.equal(p.grad, g)
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", MAKERS)
def test_memory_layout_does_not_matter(name):
    """Filters in channels_last and transposed matrices move as contiguous ones do."""
    shapes = [(6, 4, 2, 2), (8, 5)]
    plain, odd = parameters(shapes=shapes), parameters(shapes=shapes)
    odd[0].data = odd[0].data.to(memory_format=torch.channels_last)
    odd[1].data = odd[1].data.T.contiguous().T
    steps(MAKERS[name](plain), plain, 4)
    steps(MAKERS[name](odd), odd, 4)
    for a, b in zip(plain, odd, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["conda", *RANKED])
def test_lowers_a_matrix_target(name):
    torch.manual_seed(0)
    target, w = torch.randn(12, 8), nn.Parameter(torch.zeros(12, 8))
    optimizer = MAKERS[name]([{"params": [w], "lr": 0.15, "weight_decay": 0.0}])
    for _ in range(100):
        optimizer.zero_grad()
        (w - target).square().sum().backward()
        optimizer.step()
    assert (w - target).square().sum() < 0.6 * target.square().sum()


@pytest.mark.parametrize(
    ("maker", "expected"),
    [
        (lambda ps, r: GaLore(ps, rank=r), lambda m, n, r: 8 * r / min(m, n) + 4 * r / max(m, n)),
        (lambda ps, r: Fira(ps, rank=r), lambda m, n, r: 8 * r / min(m, n) + 4 * r / max(m, n)),
        (lambda ps, r: Conda(ps), lambda m, n, r: 8 + 4 * min(m, n) ** 2 / (m * n)),
        (lambda ps, r: DCTAdamW(ps, rank=r), lambda m, n, r: 8 * r / min(m, n) + 8 * r / (m * n)),
        (lambda ps, r: DCTAdamW(ps, rank=r, use_ef=True), lambda m, n, r: 4 + 8 * r / min(m, n) + 8 * r / (m * n)),
        (
            lambda ps, r: DCTAdamW(ps, rank=r, use_ef=True, q_ef=True),
            lambda m, n, r: 1 + 8 / n + 8 * r / min(m, n) + 8 * r / (m * n),
        ),
        (lambda ps, r: Trion(ps, rank=r), lambda m, n, r: 4),
    ],
    ids=["galore", "fira", "conda", "dct_adamw", "dct_adamw_ef", "dct_adamw_8bit", "trion"],
)
@pytest.mark.parametrize("shape", [(96, 32), (32, 128), (48, 48)])
def test_state_bytes_per_parameter(maker, expected, shape):
    p = nn.Parameter(torch.randn(shape))
    optimizer = maker([p], 8)
    p.grad = torch.randn_like(p)
    optimizer.step()
    tensors = [t for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
    stored = sum(t.untyped_storage().nbytes() for t in tensors)  # what is really held, not what is looked at
    assert stored / p.numel() == pytest.approx(expected(*shape, 8), rel=0.01)


@pytest.mark.parametrize("rank", [0.25, 1.0, 2, 6])
def test_rank_is_a_number_or_a_share(rank):
    for shape in SHAPES:
        p = torch.empty(shape)
        small = min(matrices.sides(p))
        if isinstance(rank, int) and rank > small:
            continue
        expected = rank if isinstance(rank, int) else max(1, round(rank * small))
        assert matrices.rank_of(p, {"rank": rank}) == expected


@pytest.mark.parametrize("rank", [6, 0, -1, 0.0, 1.5, 2.0])
@pytest.mark.parametrize("name", [GaLore, Fira, DCTAdamW, Trion])
def test_a_rank_that_a_matrix_does_not_have(name, rank):
    with pytest.raises(ValueError, match=r"optimizer\.rank is .* got .* for shape \(8, 5\). Try optimizer\.rank=5"):
        name([nn.Parameter(torch.zeros(8, 5))], rank=rank)


@pytest.mark.parametrize("name", [GaLore, Fira, DCTAdamW, Trion, Conda])
def test_vectors_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name.__name__} steps matrices, .* \(5,\). Try optimizer.takes=\[matrix\]"):
        name([nn.Parameter(torch.zeros(5))])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda ps: GaLore(ps, update_proj_gap=0), r"optimizer\.update_proj_gap counts steps, from 1; got 0"),
        (lambda ps: GaLore(ps, proj_type="up"), r"optimizer\.proj_type is one of std, .*full; got 'up'"),
        (lambda ps: Fira(ps, proj_type="full"), r"optimizer\.proj_type is one of std, .*right; got 'full'"),
        (lambda ps: Conda(ps, lr=-1), r"optimizer\.lr"),
        (lambda ps: Conda(ps, betas=(0.9, 1.0)), r"optimizer\.betas"),
        (lambda ps: DCTAdamW(ps, ell_norm=3), r"optimizer\.ell_norm is 1 or 2; got 3"),
        (lambda ps: DCTAdamW(ps, transform="fft"), r"optimizer\.transform is one of dct3, dct2; got 'fft'"),
        (lambda ps: DCTAdamW(ps, q_ef=True), r"optimizer\.q_ef .* Try optimizer\.use_ef=true"),
        (lambda ps: Trion(ps, scale="kj"), r"optimizer\.scale"),
        (lambda ps: Trion(ps, momentum=1.0), r"optimizer\.momentum"),
        (lambda ps: Trion(ps, dtype="float8"), r"optimizer\.dtype"),
    ],
)
def test_settings_out_of_range(make, words):
    with pytest.raises(ValueError, match=words):
        make([nn.Parameter(torch.zeros(8, 5))])
