"""A run resumed after any optimizer step sees the batches that the unbroken run saw from there on."""

import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from trainkit.data.loader import FixedLoader, Share, TrainLoader
from trainkit.data.windows import Windows, gather

CONTEXT, BATCH = 8, 4
TOKENS = np.arange(CONTEXT * 22, dtype=np.uint16)  # 21 windows: epochs of 5 steps


class Numbers(LightningDataModule):
    def train_dataloader(self):
        return TrainLoader(Windows(TOKENS, CONTEXT), Share.of(self.trainer, BATCH), seed=3, trainer=self.trainer)

    def val_dataloader(self):
        starts, share = np.arange(8) * CONTEXT, Share.of(self.trainer, BATCH)
        return FixedLoader(starts, share, lambda mine: gather(TOKENS, mine, CONTEXT))


class Recorder(LightningModule):
    """Notes the batches it is trained on; saves after every optimizer step where it is given a folder."""

    def __init__(self, folder=None, *, plan_ahead=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.folder, self.plan_ahead, self.seen = folder, plan_ahead, []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0][:, 0].tolist())
        return self.weight * batch[0].float().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        if self.plan_ahead:  # schedules ask for this; Lightning then makes the loaders before it restores the loops
            assert self.trainer.estimated_stepping_batches == 15
        return torch.optim.SGD(self.parameters(), 1e-6)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.folder and (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.trainer.save_checkpoint(self.folder / f"{self.trainer.global_step}.ckpt", weights_only=False)


def fit(model, accumulation, checkpoint=None, **length):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu",
        accumulate_grad_batches=accumulation,
        val_check_interval=3 * accumulation,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        **quiet,
        **length,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, datamodule=Numbers(), ckpt_path=checkpoint, weights_only=True)
    assert not [w for w in caught if "dataloader" in str(w.message)]
    return model.seen


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("length", ["max_steps", "max_epochs", "limit_train_batches"])
def test_resuming_at_any_step_goes_on_with_the_next_batch(tmp_path, accumulation, length):
    ends = {
        "max_steps": {"max_steps": 13},  # two and a half epochs
        "max_epochs": {"max_epochs": 3},
        "limit_train_batches": {"max_steps": 13, "limit_train_batches": 3 * accumulation},
    }[length]
    plan_ahead = length == "max_epochs"
    whole = fit(Recorder(tmp_path, plan_ahead=plan_ahead), accumulation, **ends)
    steps = 15 if plan_ahead else 13
    assert len(whole) == steps * accumulation
    assert len({tuple(sorted(batch)) for batch in whole}) == len(whole)  # or the comparison below would see nothing
    for step in range(1, steps + 1):
        rest = fit(Recorder(plan_ahead=plan_ahead), accumulation, tmp_path / f"{step}.ckpt", **ends)
        assert rest == whole[step * accumulation :], f"resumed after step {step}"
