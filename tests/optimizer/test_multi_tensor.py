"""What the optimizers share: the pieces a rule is run on, and what the base class keeps to."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.optimizer import toy
from trainkit.optimizer import multi_tensor
from trainkit.optimizer.adagrad_norm import AdaGradNorm
from trainkit.optimizer.adamp import AdamP
from trainkit.optimizer.lion import Lion
from trainkit.optimizer.multi_tensor import Bucket, MultiTensorOptimizer, add, descend, run, zeros_like

SHAPES = [(), (1,), (1, 9), (7,), (30, 40), (3, 500), (8, 3, 5, 5), (0, 4)]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(multi_tensor, "BLOCK", 64)
    monkeypatch.setattr(multi_tensor, "COMPILED_BLOCK", 4000)


def tensors(seed, shapes=SHAPES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def strange():
    """Parameters whose memory is not in the order of their axes."""
    return [
        torch.randn(50, 40).double().t(),
        torch.randn(8, 3, 5, 5).double().to(memory_format=torch.channels_last),
        torch.randn(6, 10).double()[:, :4],
        torch.randn(6, 4, 3, 5).double()[:, :, :, ::2],
        torch.randn(20).double()[::2],
    ]


def twice(w, g, *, lr):
    """w <- w - 2 lr g, in two operations; returns the sums of w."""
    torch._foreach_add_(w, g, alpha=-lr)
    torch._foreach_add_(w, g, alpha=-lr)
    return [t.sum() for t in w]


def normalize(w, g, scale, *, lr):
    """w <- w - lr · scale · g / ‖g‖, row by row, scale: one number per row."""
    for t, d, s in zip(w, g, scale, strict=True):
        t.sub_(lr * s * d / torch.linalg.vector_norm(d, dim=1, keepdim=True))


# --- run ----------------------------------------------------------------------------------------------------------


def test_pieces_add_up(small_blocks):
    w, g = tensors(0), tensors(1)
    expected = [a - 0.2 * b for a, b in zip(w, g, strict=True)]
    sums = run(twice, w, g, now={"lr": 0.1})
    assert len(sums[4]) == 19  # 1200 elements
    for t, e, pieces in zip(w, expected, sums, strict=True):
        torch.testing.assert_close(t, e)
        torch.testing.assert_close(torch.stack(pieces).sum(), e.sum())


def test_pieces_end_between_rows(small_blocks):
    """(3, 500) is cut into rows that are longer than a block."""
    w, g = tensors(0), tensors(1)
    scale = [torch.rand(t.shape[:1], dtype=torch.float64) for t in w]
    expected = []
    for a, b, s in zip(w, g, scale, strict=True):
        rows = b.reshape(len(b), -1) if b.ndim > 1 and b.numel() else b.reshape(-1, 1)
        step = rows / rows.norm(dim=1, keepdim=True) * s.reshape(-1, 1) if b.numel() else rows
        expected.append(a - 0.1 * step.reshape(a.shape))
    run(normalize, w, g, scale, now={"lr": 0.1}, rows=True)
    for t, e in zip(w, expected, strict=True):
        torch.testing.assert_close(t, e)


@pytest.mark.parametrize("layout", ["alike", "gradients contiguous"])
@pytest.mark.parametrize("rows", [False, True])
def test_any_layout(rows, layout, small_blocks):
    w = strange()
    g = [torch.randn_like(t) if layout == "alike" else torch.randn(t.shape).double() for t in w]
    scale = [torch.ones(t.shape[0], dtype=torch.float64) for t in w]
    old = [t.clone() for t in w]
    if rows:
        run(normalize, w, g, scale, now={"lr": 0.1}, rows=True)
    else:
        run(twice, w, g, now={"lr": 0.05})
    for t, a, b in zip(w, old, g, strict=True):
        flat = b.reshape(len(b), -1)
        expected = a - 0.1 * (flat / flat.norm(dim=1, keepdim=True) if rows else flat).reshape(a.shape)
        torch.testing.assert_close(t, expected)


def test_channels_last_is_cut_as_well(small_blocks):
    """In the order of its memory, without a copy."""
    w = torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last)
    assert len(run(twice, [w], [torch.zeros_like(w)], now={"lr": 0.1})[0]) == 10  # 600 elements
    pieces = [block[0][0] for _, block, _ in multi_tensor.blocks([[w]], rows=True, compile=False)]
    assert len(pieces) == 8
    assert pieces[0].data_ptr() == w.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype, small_blocks):
    """Two additions of less than half a unit in the last place, which one by one would both be lost."""
    w, g = [torch.ones(100, dtype=dtype)], [torch.ones(100, dtype=dtype)]
    step = torch.finfo(dtype).eps * 0.3
    run(twice, w, g, now={"lr": -step})
    assert w[0].dtype == dtype
    assert torch.equal(w[0].float(), torch.full((100,), 1 + torch.finfo(dtype).eps))


def share(w, g, *, rate, lr):
    torch._foreach_addcmul_(w, g, rate, value=lr)


def test_a_number_per_parameter_reaches_all_of_its_pieces(small_blocks):
    w, g = tensors(0), tensors(1)
    expected = [a + 0.5 * i * b for i, (a, b) in enumerate(zip(w, g, strict=True))]
    run(share, w, g, each={"rate": torch.arange(len(w)).double().unbind()}, lr=0.5)
    for t, e in zip(w, expected, strict=True):
        torch.testing.assert_close(t, e)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_descend_and_add(decay):
    for w, u in zip([*tensors(0), *strange()], [*tensors(1), *strange()], strict=True):
        expected = w * (1 - 0.1 * decay) - 0.1 * u
        t = w.clone(memory_format=torch.preserve_format)
        descend([t], [u.clone()], 0.1, decay)
        torch.testing.assert_close(t, expected)
        t = w.clone(memory_format=torch.preserve_format)
        add([t], [u], 0.25)
        torch.testing.assert_close(t, w + 0.25 * u)


# --- compiled -----------------------------------------------------------------------------------------------------


def halve(w, g, *, lr, share):
    descend(w, torch._foreach_mul(g, share), lr)


def count(monkeypatch):
    made = []
    original = multi_tensor.compiled

    def compiled(*key):
        made.append(key)
        return original(*key)

    monkeypatch.setattr(multi_tensor, "compiled", compiled)
    return made


def test_a_graph_serves_all_sizes_and_learning_rates(monkeypatch):
    """Only new settings, or sizes that are equal by chance or not, make a new one."""
    monkeypatch.setattr(multi_tensor, "COMPILED_LEAST", 2)
    used = count(monkeypatch)
    torch._dynamo.utils.counters.clear()
    for step in range(1, 4):
        w, g = (
            tensors(0, [(30, 40), (17,), (90, 10), (1,), (6, 1)]),
            tensors(1, [(30, 40), (17,), (90, 10), (1,), (6, 1)]),
        )
        expected = [a - 0.1 * step * 0.5 * b for a, b in zip(w, g, strict=True)]
        run(halve, w, g, now={"lr": 0.1 * step}, compile=True, share=0.5)
        for t, e in zip(w, expected, strict=True):
            torch.testing.assert_close(t, e)
    assert len(used) == 9  # all but those with an axis of one
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    w, g = tensors(0, [(30, 40)]), tensors(1, [(30, 40)])
    expected = w[0] - 0.1 * 0.25 * g[0]
    run(halve, w, g, now={"lr": 0.1}, compile=True, share=0.25)
    torch.testing.assert_close(w[0], expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_a_square_makes_no_graph_for_other_matrices(monkeypatch, small_blocks):
    monkeypatch.setattr(multi_tensor, "COMPILED_LEAST", 2)
    used = count(monkeypatch)
    for shape in ((30, 30), (40, 30), (30, 40), (20, 20), (90, 100)):
        w = [nn.Parameter(t) for t in tensors(0, [shape])]
        g, scale = tensors(1, [shape]), [torch.ones(shape[0], dtype=torch.float64)]
        expected = w[0].detach() - 0.1 * g[0] / g[0].norm(dim=1, keepdim=True)
        with torch.no_grad():
            run(normalize, w, g, scale, now={"lr": 0.1}, rows=True, compile=True)
        torch.testing.assert_close(w[0].detach(), expected)
    assert used


def test_strange_layouts_are_not_compiled(monkeypatch):
    monkeypatch.setattr(multi_tensor, "COMPILED_LEAST", 2)
    used = count(monkeypatch)
    w = [torch.randn(6, 10).double()[:, :4]]
    g, old = [torch.randn(6, 4).double()], w[0].clone()
    run(halve, w, g, now={"lr": 0.1}, compile=True, share=0.5)
    torch.testing.assert_close(w[0], old - 0.05 * g[0])
    assert not used


# --- buckets ------------------------------------------------------------------------------------------------------


def test_a_bucket_is_taken_apart():
    params = tensors(0)
    bucket = Bucket(params, tensors(1), [{"i": torch.tensor(i)} for i in range(len(params))], 3)
    matrices, others = bucket.where(lambda p: p.ndim > 1)
    assert [int(i) for i in matrices.state("i")] == [2, 4, 5, 6, 7]
    assert [int(i) for i in others.state("i")] == [0, 1, 3]
    assert matrices.step == others.step == 3


def test_windows_are_bounded_and_hold_everything(monkeypatch):
    monkeypatch.setattr(multi_tensor, "WINDOW", 100)
    params = tensors(0)
    bucket = Bucket(params, tensors(1), [{} for _ in params], 1)
    windows = list(bucket.windows())
    assert [len(w.params) for w in windows] == [4, 1, 1, 1, 1]  # 18 elements, 1200, 1500, 600, 0
    assert [id(p) for w in windows for p in w.params] == [id(p) for p in params]


# --- the base class -----------------------------------------------------------------------------------------------


class Momentum(MultiTensorOptimizer):
    """b <- b/2 + g, W <- W - lr b."""

    def __init__(self, params, lr=0.1, *, maximize=False, compile=False):
        super().__init__(params, {"lr": lr}, maximize=maximize, compile=compile)
        self.seen = []

    def begin(self, p, group):
        return {"momentum_buffer": zeros_like(p)}

    def update(self, bucket, group):
        self.seen.append((bucket.step, len(bucket.params)))
        run(momentum, bucket.params, bucket.gradients, bucket.state("momentum_buffer"), lr=group["lr"])


def momentum(w, g, b, *, lr):
    torch._foreach_mul_(b, 0.5)
    torch._foreach_add_(b, g)
    torch._foreach_add_(w, b, alpha=-lr)


def test_maximize_turns_the_gradient_round():
    toy.same(
        lambda ps: Momentum(ps, maximize=True),
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.5, maximize=True),
    )


def test_a_parameter_without_a_gradient_does_not_age():
    p, q = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = Momentum([p, q])
    for step in range(3):
        p.grad, q.grad = torch.ones(3), torch.ones(3) if step == 1 else None
        before = q.detach().clone()
        optimizer.step()
        assert step == 1 or torch.equal(q, before)
    assert (optimizer.state[p]["step"], optimizer.state[q]["step"]) == (3, 1)
    assert optimizer.seen == [(1, 1), (2, 1), (1, 1), (3, 1)]


def test_half_precision_state_stays_in_float32_through_a_load():
    p = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = Momentum([p])
    p.grad = torch.full_like(p, 1.1)
    optimizer.step()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    again = Momentum([p])
    again.load_state_dict(saved)
    kept = again.state[p]["momentum_buffer"]
    assert kept.dtype == torch.float32
    assert torch.equal(kept, optimizer.state[p]["momentum_buffer"])
    assert not torch.equal(kept, kept.bfloat16().float())  # a cast to the parameter's dtype would have shown
    assert kept.data_ptr() != saved["state"][0]["momentum_buffer"].data_ptr()


def test_channels_last_state_lies_as_the_parameter_does():
    p = nn.Parameter(torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last))
    assert zeros_like(p).stride() == p.stride()


def test_a_sparse_gradient_is_one_sentence():
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        Lion(table.parameters()).step()


@pytest.mark.parametrize("where", ["defaults", "group"])
def test_settings_are_checked_in_groups_too(where):
    p = nn.Parameter(torch.zeros(2))
    params, settings = ([p], {"lr": -1.0}) if where == "defaults" else ([{"params": [p], "lr": -1.0}], {})
    with pytest.raises(ValueError, match=r"optimizer\.lr must not be negative; got -1"):
        Lion(params, **settings)


def test_the_closure_has_gradients_and_its_loss_is_returned():
    p = nn.Parameter(torch.ones(2))
    optimizer = Momentum([p])

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2.0
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.8))


def test_temporary_memory_is_used_again_and_is_no_state():
    params = toy.parameters([(4, 5), (3,)])
    optimizer = Momentum(params)
    first, second = optimizer.temporary(params), optimizer.temporary(params[:1])
    assert [t.shape for t in first] == [p.shape for p in params]
    assert first[0].data_ptr() == second[0].data_ptr()
    assert optimizer.temporary([nn.Parameter(p.bfloat16()) for p in params])[0].dtype == torch.float32
    assert optimizer.memory is not None
    assert pickle.loads(pickle.dumps(AdamP(params))).memory is None


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_shards(mesh):
    """A method that goes entry by entry steps them as they are; one that needs whole parameters says so."""
    start, g = tensors(0, [(6, 5)])[0], tensors(1, [(6, 5)])[0]
    shard, plain = nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)])), nn.Parameter(start.clone())
    for make in (Lion, Momentum):
        one, two = make([shard]), make([plain])
        for _ in range(2):
            shard.grad, plain.grad = distribute_tensor(g, mesh, [Shard(0)]), g.clone()
            one.step()
            two.step()
        torch.testing.assert_close(shard.full_tensor().detach(), plain.detach())
    with pytest.raises(ValueError, match="AdamP needs whole parameters"):
        AdamP([shard])
    copies = nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Replicate()]))
    for make in (AdamP, AdaGradNorm):
        one, two = make([copies]), make([plain])
        copies.grad, plain.grad = distribute_tensor(g, mesh, [Replicate()]), g.clone()
        one.step()
        two.step()
        torch.testing.assert_close(copies.full_tensor().detach(), plain.detach())
