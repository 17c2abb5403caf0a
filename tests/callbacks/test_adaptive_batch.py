"""A batch that grows: what it is made of, when, and that a cut run goes on as if nothing had happened."""

from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningDataModule
from torch import nn

import trainkit
from callbacks.adaptive_batch import AdaptiveBatch
from callbacks.checkpoint import LastAndBest
from callbacks.throughput import Throughput
from tests.callbacks.test_checkpoint import Cut, Stop, load, same
from tests.callbacks.test_measuring import Clock, Takes
from tests.callbacks.toy import WIDTH, Toy, rows
from tests.test_runs import SMALL, door, losses
from trainkit.data.loader import FixedLoader, GrowingLoader, Share, TrainLoader, train_loader
from trainkit.launch.explain import UserError
from trainkit.launch.loggers import JsonlLogger
from trainkit.launch.trainer import trainer as make_trainer
from trainkit.measure.gradient_variance import norm_test, of_samples
from trainkit.report.metrics_file import read

ITEMS = 50


class Items:
    """Item n is (a vector drawn from seed n, n); epochs are shuffled."""

    def __len__(self):
        return ITEMS

    def epoch(self, seed, epoch):
        order = np.random.default_rng([seed, epoch]).permutation(ITEMS)

        def draw(part):
            items = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(int(n))) for n in order[part]]
            return torch.stack(items), torch.from_numpy(order[part])

        return draw


class Data(LightningDataModule):
    growing = False

    def __init__(self, batch_size):
        super().__init__()
        self.batch_size = batch_size

    def share(self):
        return Share.of(self.trainer, self.batch_size)

    def train_dataloader(self):
        return train_loader(Items(), self.share(), seed=5, trainer=self.trainer, growing=self.growing)

    def val_dataloader(self):
        return FixedLoader(np.arange(8), self.share(), lambda mine: Items().epoch(0, 0)(slice(mine[0], mine[-1] + 1)))


class Regression(Toy):
    """Toy on pairs; it keeps the items that every optimizer step was made of, in micro-batches."""

    def __init__(self, **changed):
        super().__init__(**changed)
        self.taken: dict[int, list[list[int]]] = {}

    def loss(self, model, batch):
        x, number = batch
        return (model(x).squeeze(-1) - x.sum(-1) - 0.3 * torch.sin(number.to(x))).square().mean()

    def training_step(self, batch, batch_idx):
        self.taken.setdefault(self.trainer.global_step + 1, []).append(batch[1].tolist())
        return super().training_step(batch, batch_idx)


def fit(folder, adaptive, *callbacks, task=None, batch_size=4, checkpoint=None, **options):
    options = {"max_steps": 12, "val_check_interval": 4, "log_every_n_steps": 1, "threads": 1} | options
    torch.manual_seed(1)
    trainer = make_trainer(accelerator="cpu", run_dir=folder, callbacks=[adaptive, *callbacks], **options)
    trainer.loggers = [JsonlLogger(folder)]
    task = task or Regression()
    trainer.fit(task, datamodule=Data(batch_size), ckpt_path=checkpoint, weights_only=True)
    return trainer, task


class Grows(AdaptiveBatch):
    """Adaptive, but the outcome of the test is `factor` times the batch whenever the step is in `at`."""

    def __init__(self, *at, factor=1.6, **options):
        super().__init__(**({"max_batch_size": 40} | options))

        def needed(variances):
            step = self.loader.trainer.global_step + 1
            return factor * self.loader.share.batch_size if step in at else 0.0

        self.needed = needed


def flat(lists):
    return list(chain.from_iterable(lists))


def sizes(task):
    return [len(flat(parts)) for parts in task.taken.values()]


# --- what a step is made of ------------------------------------------------------------------------------------------


def test_the_batch_grows_and_every_item_comes_once_an_epoch(tmp_path):
    _, task = fit(tmp_path, Grows(1, 3, 4, 8, 9, 20), max_steps=24)
    found = sizes(task)
    assert found == sorted(found)
    assert len(set(found)) >= 5
    for parts in task.taken.values():
        assert len({len(part) for part in parts}) == 1
    assert [row["train/batch_size"] for row in rows(tmp_path, "train/batch_size")] == found
    assert [row["train/samples_seen"] for row in rows(tmp_path)] == np.cumsum(found).tolist()
    # In order: steps take what comes next, or begin the next epoch where too little is left.
    epoch, begin = 0, 0
    for parts in task.taken.values():
        size = len(flat(parts))
        if begin + size > ITEMS:
            epoch, begin = epoch + 1, 0
        expected = np.random.default_rng([5, epoch]).permutation(ITEMS)[begin : begin + size]
        assert flat(parts) == expected.tolist()
        begin += size
    assert epoch >= 2


def test_without_growth_it_is_the_plain_training(tmp_path):
    _, plain = fit(tmp_path / "plain", Callback(), accumulate_grad_batches=2, max_steps=15)
    _, growing = fit(tmp_path / "growing", Grows(), max_steps=15)  # made of two halves on its own
    assert growing.taken == plain.taken
    a, b = ([row["train/loss"] for row in rows(tmp_path / name)] for name in ("plain", "growing"))
    assert a == b


def test_more_samples_go_into_a_pass_up_to_the_limit_and_then_into_more_passes(tmp_path):
    def parts(**options):
        _, task = fit(tmp_path / str(options), Grows(1, 2, 3, 4, factor=1.9, **options), max_steps=5)
        return [(len(step), len(step[0])) for step in task.taken.values()]

    assert parts() == [(2, 2), (2, 4), (4, 4), (8, 4), (10, 4)]  # as many as were configured for a pass
    assert parts(max_micro_batch=8) == [(2, 2), (2, 4), (2, 8), (4, 8), (5, 8)]
    assert parts(estimate="sample") == [(1, 4), (2, 4), (4, 4), (8, 4), (10, 4)]


def test_validation_counts_optimizer_steps(tmp_path):
    fit(tmp_path, Grows(1, 2, 5, 6, 7), max_steps=11)
    assert [row["step"] for row in rows(tmp_path, "val/loss")] == [4, 8, 11]
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 12))


def test_testing_stops_where_the_batch_cannot_grow(tmp_path):
    class Counts(Grows):
        tested = 0

        def _variances(self, trainer, task):
            self.tested += 1
            return super()._variances(trainer, task)

    adaptive = Counts(1, 2, factor=10)
    trainer, task = fit(tmp_path, adaptive)
    assert sizes(task) == [4] + 11 * [40]
    assert adaptive.tested == 1
    assert not adaptive._hooks
    assert trainer.accumulate_grad_batches == 1  # as configured, for whoever builds loaders next

    adaptive = Counts(every=3)
    fit(tmp_path / "seldom", adaptive)
    assert adaptive.tested == 4


def test_the_training_set_is_a_limit(tmp_path):
    _, task = fit(tmp_path, Grows(1, factor=1e9, max_batch_size=10**6))
    assert sizes(task) == [4] + 11 * [48]  # ITEMS, rounded down to whole passes of 4


shares = st.builds(Share, st.integers(1, 9), st.integers(1, 4), st.just(0), st.integers(1, 5))


@given(shares, st.integers(1, 500), st.integers(0, 300), st.integers(0, 20))
def test_a_grown_share(share, wanted, room, more):
    most, cap = share.batch_size + room, share.micro_batch + more
    new = share.grown(wanted, most, cap)
    assert share.batch_size <= new.batch_size <= most
    assert new.micro_batch <= cap
    assert new.accumulation >= share.accumulation
    # The reference's rule, wherever that is possible.
    micro, accumulation = -(-wanted // (share.world * share.accumulation)), share.accumulation
    if micro > cap:
        micro, accumulation = cap, -(-wanted // (share.world * cap))
    if share.batch_size < micro * share.world * accumulation <= most:
        assert (new.micro_batch, new.accumulation) == (micro, accumulation)


# --- what the test sees ----------------------------------------------------------------------------------------------


class Spy(AdaptiveBatch):
    """Keeps what it found at every step, and what the same formulas give for gradients computed one group at a time."""

    def __init__(self, **options):
        super().__init__(**options)
        self.found, self.expected = [], []

    def _variances(self, trainer, task):
        found = super()._variances(trainer, task)
        self.found.append(found)
        parts = task.taken[trainer.global_step + 1]
        if self.estimate == "sample":
            parts = [[n] for n in parts[-1]]
        stacks = []
        for part in parts:
            x = torch.stack([torch.randn(WIDTH, generator=torch.Generator().manual_seed(n)) for n in part])
            loss = task.loss(task.model, (x.to(task.dtype), torch.tensor(part)))
            stacks.append(torch.autograd.grad(loss, list(task.model.parameters())))
        size = len(parts[0])
        group_means = of_samples([torch.stack(rows) for rows in zip(*stacks, strict=True)])
        self.expected.append((size, group_means))
        return found


def without_dropout():
    task = Regression()
    for module in task.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return task


@pytest.mark.parametrize("accumulation", [1, 4])
def test_groups_are_the_micro_batches(tmp_path, accumulation):
    spy = Spy(max_batch_size=40, eta=1e9)
    options = {"accumulate_grad_batches": accumulation, "precision": "64-true"}
    fit(tmp_path, spy, task=without_dropout(), batch_size=8, max_steps=4, **options)
    assert len(spy.found) == 4
    for found, (size, means) in zip(spy.found, spy.expected, strict=True):
        assert size == (4 if accumulation == 1 else 2)
        for name in ("total", "along", "across"):  # a mean of n samples varies 1/n as much
            assert getattr(found, name) == pytest.approx(size * getattr(means, name), rel=1e-6)
        assert found.square == pytest.approx(means.square, rel=1e-6)


def test_many_micro_batches_are_joined(tmp_path):
    spy = Spy(max_batch_size=40, groups=3)
    fit(tmp_path, spy, task=without_dropout(), batch_size=8, max_steps=1, accumulate_grad_batches=8)
    assert spy._sizes == [3, 3, 2]


def test_samples_are_samples(tmp_path):
    spy = Spy(max_batch_size=40, estimate="sample", eta=1e9)
    fit(tmp_path, spy, task=without_dropout(), batch_size=8, max_steps=3, precision="64-true")
    for found, (_, expected) in zip(spy.found, spy.expected, strict=True):
        for name in ("total", "along", "across", "square"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6)


def test_looking_at_samples_draws_nothing(tmp_path):
    """Dropout in the extra pass must not move the generator that training draws from."""
    fit(tmp_path / "plain", Callback())
    fit(tmp_path / "tested", AdaptiveBatch(estimate="sample", eta=1e9))
    a, b = ([row["train/loss"] for row in rows(tmp_path / name)] for name in ("plain", "tested"))
    assert a == b


def test_the_noise_of_the_gradient_decides(tmp_path):
    adaptive = Spy(max_batch_size=48, eta=0.5)
    _, task = fit(tmp_path, adaptive, task=without_dropout(), max_steps=12)
    found = sizes(task)
    for variances, (now, after) in zip(adaptive.found, pairwise(found), strict=False):
        needed = norm_test(variances, eta=0.5)
        assert now <= after <= 48
        assert after >= min(needed, 45)
        assert after == now or after < max(needed, now) + 8  # what the passes cannot share evenly
    needed = {row["step"]: row["train/batch_needed"] for row in rows(tmp_path, "train/batch_needed")}
    assert needed[1] == pytest.approx(norm_test(adaptive.found[0], eta=0.5))
    assert len(set(found)) > 1


# --- what else counts tokens -----------------------------------------------------------------------------------------


def test_throughput_counts_the_tokens_of_every_step(tmp_path, monkeypatch):
    class Tokens(Regression):
        tokens_per_step = 8  # 2 per item

    speed, takes = Throughput(), Takes(Clock(monkeypatch))
    _, task = fit(tmp_path, Grows(2, 4, 6), speed, takes, task=Tokens(), max_steps=9, log_every_n_steps=3)
    found = sizes(task)
    for row in rows(tmp_path)[1:]:
        first = 1 if row["step"] == 3 else row["step"] - 3
        steps = range(first, row["step"])  # those since the last log
        seconds = sum(0.5 * len(task.taken[s + 1]) for s in steps)
        assert row["tokens_per_second"] == pytest.approx(2 * sum(found[s] for s in steps) / seconds)
        assert row["steps_per_second"] == pytest.approx(len(steps) / seconds)


# --- cut and continued -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "every",
    [pytest.param(1, id="a checkpoint at every step", marks=pytest.mark.slow), pytest.param(None, id="at validations")],
)
def test_resume_is_the_unbroken_run(tmp_path, every):
    def callbacks():
        return Grows(1, 3, 4, 7, 8), LastAndBest(every_n_steps=every)

    _, whole = fit(tmp_path / "whole", *callbacks())
    assert len(set(sizes(whole))) >= 5
    for cut in range(2, 13) if every else (6, 10):
        folder = tmp_path / f"cut{cut}"
        with pytest.raises(Stop):
            fit(folder, *callbacks(), Cut(cut))
        at = load(folder)["global_step"]
        assert at == (cut - 1 if every else (cut - 1) // 4 * 4)
        logger = JsonlLogger(folder)
        logger.truncate_after(at)
        logger.finalize("success")
        _, rest = fit(folder, *callbacks(), checkpoint=folder / "checkpoints" / "last.ckpt")
        assert rest.taken == {step: parts for step, parts in whole.taken.items() if step > at}
        for name in ("train/loss", "val/loss", "train/samples_seen"):
            a, b = ([(row["step"], row[name]) for row in rows(f, name)] for f in (folder, tmp_path / "whole"))
            assert a == b, f"cut at {cut}"
        a, b = load(folder), load(tmp_path / "whole")
        assert same(a["state_dict"], b["state_dict"])
        assert same(a["optimizer_states"], b["optimizer_states"])


def position():
    """A loader at the beginning of the first epoch."""

    class Trainer:
        global_step = 0

    return GrowingLoader(Items(), Share(4), seed=0, trainer=Trainer())  # type: ignore[arg-type]


def test_the_position_is_the_samples_seen():
    loader, plain = position(), TrainLoader(Items(), Share(4), seed=0)
    passing = iter(loader)
    for step in range(3):
        loader.trainer.global_step = step
        assert next(passing)[1].tolist() == list(plain)[step][1].tolist()
    loader.trainer.global_step = 3
    loader.grow(Share(10, accumulation=2))
    assert loader.state_dict()["ending"]
    assert next(passing, None) is None  # the trainer's epoch ends, and the next one begins where this one stood
    assert loader.position() == (0, 12)
    loader.trainer.global_step = 4
    assert (loader.position(), loader.samples_seen()) == ((1, 0), 32)  # 18 of epoch 0 are too few and left out
    loader.trainer.global_step = 5
    assert (loader.position(), loader.samples_seen()) == ((1, 20), 52)
    loader.trainer.global_step = 8
    assert (loader.position(), loader.samples_seen()) == ((3, 0), 112)

    again = position()
    again.trainer.global_step = 8
    again.load_state_dict(loader.state_dict())
    assert again.state_dict() == loader.state_dict()
    assert next(iter(again))[1].tolist() == next(iter(loader))[1].tolist()


@pytest.mark.parametrize(
    ("change", "says"),
    [({"seed": 1}, "must keep its data, seed"), ({"items": 51}, "must keep its data"), ({"batch_size": 7}, "evenly")],
)
def test_a_checkpoint_of_something_else_is_refused(change, says):
    loader = position()
    state = loader.state_dict() | {"accumulation": 2} | change
    with pytest.raises(ValueError, match=says):
        position().load_state_dict(state)
    with pytest.raises(ValueError, match="whether its batch grows"):
        position().load_state_dict({"epoch": 0, "step": 3, "steps_per_epoch": 12, "seed": 0})


# --- through the user's door -----------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path):
    text = "".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(400))
    (tmp_path / "corpus.txt").write_text(text)
    folders = [f"paths.log_dir={tmp_path / 'logs'}", f"paths.cache_dir={tmp_path / 'cache'}"]
    data = ["data=text", f"data.path={tmp_path / 'corpus.txt'}", "logger=none", *folders, "schedule=constant"]
    settings = [
        "callbacks=adaptive_batch",
        "callbacks.adaptive_batch.max_batch_size=64",
        "trainer.val_check_interval=3",
    ]
    return [*SMALL, *data, *settings, "callbacks.adaptive_batch.eta=0.4", "callbacks.checkpoint.every_n_steps=1"]


@pytest.mark.slow
def test_a_run_that_is_continued_is_the_unbroken_one(words):
    words = [*words, "model.dropout=0.1", "trainer.log_every_n_steps=1"]
    unbroken = trainkit.run([*words, "trainer.max_steps=6"]).dir
    grown = [row["train/batch_size"] for row in read(unbroken / "metrics.jsonl") if "train/batch_size" in row]
    assert len(set(grown)) >= 3
    run = trainkit.run([*words, "trainer.max_steps=2"]).dir
    for steps in (3, 6):
        assert trainkit.run([f"resume={run}", f"trainer.max_steps={steps}"]).dir == run
    assert losses(run) == losses(unbroken)
    a, b = (torch.load(d / "checkpoints" / "last.ckpt", weights_only=True) for d in (run, unbroken))
    assert same(a["state_dict"], b["state_dict"])
    assert (run / "figures" / "loss.png").is_file()


@pytest.mark.slow
def test_two_processes_see_what_two_micro_batches_do(words, tmp_path):
    words = [*words, "trainer.precision=64-true", "trainer.log_every_n_steps=1", "trainer.max_steps=4"]
    alone = trainkit.run([*words, "trainer.accumulate_grad_batches=2"]).dir
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", f"paths.run_dir={tmp_path / 'two'}"]
    done = door(*words, *two)
    assert done.returncode == 0, done.stderr
    for one, other in zip(read(alone / "metrics.jsonl"), read(tmp_path / "two" / "metrics.jsonl"), strict=True):
        for name in ("step", "train/loss", "train/batch_needed", "val/loss"):
            if name in one and one["step"] <= 1:  # then the batches are rounded to other numbers
                assert other[name] == pytest.approx(one[name], rel=1e-6), name
    sizes = [row["train/batch_size"] for row in read(tmp_path / "two" / "metrics.jsonl") if "train/batch_size" in row]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 1


MISTAKES = {
    "a length in epochs": (["trainer.max_epochs=2", "trainer.max_steps=-1"], "told in steps"),
    "a batch that cannot be halved": (["data.batch_size=5"], "must be even; try 6"),
    "a limit below the start": (["callbacks.adaptive_batch.max_batch_size=2"], "max_batch_size=2 is less than"),
    "a pass below the start": (["callbacks.adaptive_batch.max_micro_batch=3"], "max_micro_batch=3 is less than"),
    "part of the data": (["+trainer.limit_train_batches=5"], "limit_train_batches"),
    "an unknown test": (["callbacks.adaptive_batch.test=t"], "test is norm, inner_product or augmented; got 't'"),
    "an unknown estimate": (["callbacks.adaptive_batch.estimate=x"], "estimate is micro or sample; got 'x'"),
    "no tolerance": (["callbacks.adaptive_batch.eta=0"], "eta must be above 0"),
    "no interval": (["callbacks.adaptive_batch.every=0"], "every must be at least 1"),
    "a treatment that halves the batch": (
        ["gradient=agvm", "trainer.accumulate_grad_batches=2"],
        "leave one of them out",
    ),
    "one group": (["callbacks.adaptive_batch.groups=1"], "groups must be at least 2"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence(words, mistake):
    change, says = MISTAKES[mistake]
    with pytest.raises(UserError, match=says):
        trainkit.run([*words, "trainer.max_steps=2", *change])


@pytest.mark.parametrize(("model", "test"), [("gpt", "augmented"), ("vit", "inner_product")])
def test_models_per_sample(words, model, test):
    data = [] if model == "gpt" else ["data=digits", "data.batch_size=4"]
    kept = words if model == "gpt" else [w for w in words if not w.startswith("data") and "context" not in w]
    run = trainkit.run(
        [f"model={model}", *kept, *data, "trainer.max_steps=2", f"callbacks.adaptive_batch.test={test}",
         "callbacks.adaptive_batch.estimate=sample", "callbacks.adaptive_batch.theta=0.4"]
    ).dir  # fmt: skip
    needed = [row["train/batch_needed"] for row in read(run / "metrics.jsonl") if "train/batch_needed" in row]
    assert needed
    assert min(needed) > 0
