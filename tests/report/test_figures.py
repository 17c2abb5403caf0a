"""The pictures are there, and their numbers are the metrics'."""

import csv
import math
from itertools import pairwise
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
from lightning.pytorch.loggers import WandbLogger

from callbacks.figures import Figures
from callbacks.grad_norm import GradNorm
from tests.callbacks.toy import Toy, fit
from trainkit.report import layers
from trainkit.report.figures import draw
from trainkit.report.metrics_file import line, read

PICTURES = ["grad_norm_heatmap", "grad_norm_profile", "loss"]


def made_up(steps: int, blocks: int = 3) -> list[dict]:
    """Rows as a run logs them, norms that grow with depth and fall with time."""
    rows = []
    for step in [1, *range(10, steps, 10), steps]:
        row = {"step": step, "train/loss": 5 / step**0.1}
        for b in range(blocks):
            row |= {f"grad_norm/blocks.{b}.{s}": (b + k) / step for k, s in enumerate(("norm", "mlp", "attn"), start=1)}
            row[f"grad_norm/blocks.{b}"] = 2.0
        rows.append(row | {"grad_norm/global": 3.0} | ({"val/loss": 4.0} if step % 50 == 0 else {}))
    return rows


def write(folder: Path, rows: list[dict]) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(map(line, rows)))
    return path


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def is_picture(path: Path) -> bool:
    data = path.read_bytes()
    return data.startswith(b"\x89PNG") and len(data) > 5000


def test_a_run_is_pictured_and_each_picture_has_its_numbers(tmp_path):
    rows = made_up(100)
    pictures = draw(write(tmp_path, rows), tmp_path / "figures", title="toy · norm=pre")
    assert sorted(path.stem for path in pictures) == PICTURES
    assert all(map(is_picture, pictures))

    losses = table(tmp_path / "figures" / "loss.csv")
    assert [(int(t["step"]), float(t["train/loss"])) for t in losses] == [(r["step"], r["train/loss"]) for r in rows]
    assert [t["val/loss"] for t in losses if t["val/loss"]] == ["4.0", "4.0"]

    norms = table(tmp_path / "figures" / "grad_norm_heatmap.csv")
    for found, row in zip(norms, rows, strict=True):
        assert {k: float(v) for k, v in found.items()} == {k: v for k, v in row.items() if k in found}
    assert set(norms[0]) == {"step", *(name for name in rows[0] if name.startswith("grad_norm/"))}

    by_step = {row["step"]: row for row in rows}
    profile = table(tmp_path / "figures" / "grad_norm_profile.csv")
    assert list(dict.fromkeys(int(t["step"]) for t in profile)) == [1, 10, 50, 100]
    for found in profile:
        for site in ("attn", "mlp", "norm"):
            assert float(found[site]) == by_step[int(found["step"])][f"grad_norm/{found['block']}.{site}"]


def test_numbers_that_have_no_logarithm_are_drawn_all_the_same(tmp_path):
    rows = made_up(60)
    rows[2] |= {"grad_norm/blocks.0.attn": math.nan, "grad_norm/blocks.1.attn": math.inf, "train/loss": math.nan}
    rows[3] |= {f"grad_norm/blocks.{b}.norm": 0.0 for b in range(3)}
    assert len(draw(write(tmp_path, rows), tmp_path / "figures")) == 3
    found = table(tmp_path / "figures" / "grad_norm_heatmap.csv")
    assert (found[2]["grad_norm/blocks.0.attn"], found[2]["grad_norm/blocks.1.attn"]) == ("nan", "inf")
    assert found[3]["grad_norm/blocks.2.norm"] == "0.0"


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan])
def test_norms_that_are_all_alike_make_a_scale(tmp_path, value):
    rows = [{"step": s, "grad_norm/blocks.0.attn": value, "grad_norm/blocks.1.attn": value} for s in (1, 2, 3)]
    assert [path.stem for path in draw(write(tmp_path, rows), tmp_path / "figures")] == PICTURES[:2]


def test_one_step_or_none_or_no_norms(tmp_path):
    assert len(draw(write(tmp_path, made_up(100)[:1]), tmp_path / "one")) == 3
    assert draw(write(tmp_path, []), tmp_path / "none") == []
    assert [path.stem for path in draw(write(tmp_path, [{"step": 1, "train/loss": 2.0}]), tmp_path / "loss")] == [
        "loss"
    ]


def test_other_sites_other_names_and_blocks_that_lack_one(tmp_path):
    norms = {"stages.0.blocks.0.conv": 1.0, "stages.0.blocks.0.norm": 0.1, "stages.1.blocks.0.conv": 2.0}
    norms |= {"stages.1.blocks.10.shortcut": 3.0, "head": 1.0}
    rows = [{"step": s} | {f"grad_norm/{name}": value for name, value in norms.items()} for s in (1, 10, 20)]
    found = layers.collect(rows)
    assert found is not None
    assert found.names() == ["0.0", "1.0", "1.10"]
    assert list(found.values) == ["conv", "shortcut", "norm"]
    draw(write(tmp_path, rows), tmp_path / "figures")
    assert table(tmp_path / "figures" / "grad_norm_profile.csv")[0] == {
        "step": "1", "block": "stages.0.blocks.0", "conv": "1.0", "shortcut": "", "norm": "0.1",
    }  # fmt: skip


def test_a_long_run_is_drawn_in_bins_that_keep_its_spikes():
    rows = made_up(50_000, blocks=2)
    rows[777]["grad_norm/blocks.0.attn"] = 1e6
    found = layers.collect(rows)
    assert found is not None
    edges, bins = layers._bins(found.steps)
    drawn = layers._largest(found.values["attn"], bins)
    assert drawn.shape == (2, layers.COLUMNS)
    assert drawn.max() == 1e6
    assert len(edges) == layers.COLUMNS + 1
    assert all(a < b for a, b in pairwise(edges))


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    draw(write(tmp_path, made_up(30)), tmp_path / "figures")
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == []


# --- the callback -------------------------------------------------------------------------------------------------


class Recorder(WandbLogger):
    """A W&B logger that keeps what it is shown."""

    def __init__(self):
        self._experiment, self.shown = None, []

    experiment = None  # type: ignore[assignment]

    def log_metrics(self, metrics, step=None):
        """Of no interest here."""

    def log_image(self, key, images, step=None, **kwargs):
        self.shown.append((key, Path(images[0]).name, step))

    def finalize(self, status):
        """Nothing to close."""


def test_a_run_ends_with_its_figures_and_wandb_is_shown_them(tmp_path):
    logger = Recorder()
    fit(tmp_path, [GradNorm(), Figures(title="toy")], loggers=[logger])
    assert sorted(path.stem for path in (tmp_path / "figures").glob("*.png")) == PICTURES
    assert sorted(logger.shown) == [(f"figures/{name}", f"{name}.png", 12) for name in PICTURES]
    first = {k: v for k, v in read(tmp_path / "metrics.jsonl")[0].items() if k.startswith("grad_norm/")}
    drawn = {k: float(v) for k, v in table(tmp_path / "figures" / "grad_norm_heatmap.csv")[0].items() if k != "step"}
    assert drawn == first


def test_a_run_that_fails_is_pictured_as_far_as_it_came(tmp_path):
    class Fails(Toy):
        def loss(self, model, batch):
            if self.step == 7:
                raise RuntimeError("broken")
            return super().loss(model, batch)

    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, [GradNorm(), Figures()], task=Fails())
    assert [int(t["step"]) for t in table(tmp_path / "figures" / "loss.csv")] == [1, 2, 4, 6]


def test_a_picture_that_cannot_be_drawn_fails_no_run(tmp_path, monkeypatch):
    (tmp_path / "figures").write_text("a file where the folder should be")
    trainer, _ = fit(tmp_path, [GradNorm(), Figures()])
    assert trainer.state.finished
