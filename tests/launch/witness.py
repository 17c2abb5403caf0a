"""Plugins for the tests of several processes: what each one reads, and ways to fail."""

import errno
import json
import os
import time
from pathlib import Path

import torch.distributed as dist
from lightning.pytorch import Callback
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook


class Witness(Callback):
    """Notes the windows that each process trains on, in <run>/seen_<rank>.json."""

    def __init__(self):
        self.windows = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.windows.append([tuple(row) for row in batch[0].tolist()])

    def on_train_end(self, trainer, pl_module):
        alive = dist.get_world_size() if dist.is_initialized() else 1
        seen = {"world": trainer.world_size, "group": alive, "pid": os.getpid(), "windows": self.windows}
        Path(trainer.default_root_dir, f"seen_{trainer.global_rank}.json").write_text(json.dumps(seen))


class Fail(Callback):
    """Rank `rank` fails at optimizer step `step`, or after the last one (`step` null), in the way `how`.

    how: raise | exit (at once, without a word) | hang (raises while the others wait where nothing interrupts them)
    """

    def __init__(self, rank=1, step=3, how="raise"):
        self.rank, self.step, self.how = rank, step, how

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self._fail(trainer)

    def on_test_end(self, trainer, pl_module):
        if self.step is None:
            self._fail(trainer)

    def _fail(self, trainer):
        if trainer.global_rank != self.rank:
            if self.how == "hang":
                time.sleep(600)
            return
        if self.how == "exit":
            os._exit(7)
        raise ArithmeticError("boom")


class Sent(Callback):
    """Leaves in <run>/sent_<rank>.json how many buckets of gradients DDP has averaged."""

    def on_train_start(self, trainer, pl_module):
        self.buckets = 0

        def hook(group, bucket):
            self.buckets += 1
            return allreduce_hook(group, bucket)

        trainer.strategy.model.register_comm_hook(None, hook)

    def on_train_end(self, trainer, pl_module):
        Path(trainer.default_root_dir, f"sent_{trainer.global_rank}.json").write_text(json.dumps(self.buckets))


class FullDisk(Callback):
    """From a step on no file of a checkpoint can be written by one of the ranks."""

    def __init__(self, rank, step):
        self.rank, self.step = rank, step

    def on_train_start(self, trainer, pl_module):
        write = trainer.strategy.checkpoint_io.save_checkpoint

        def fail(*args, **kwargs):
            if trainer.global_rank == self.rank and trainer.global_step >= self.step:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(*args, **kwargs)

        trainer.strategy.checkpoint_io.save_checkpoint = fail
