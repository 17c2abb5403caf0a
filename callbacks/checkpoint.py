"""The last checkpoints and the best one, on disk in one piece at any moment."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.preemption import Preemption
from trainkit.data.sync import sync
from trainkit.launch.checkpoints import kept
from trainkit.launch.disk import writing
from trainkit.launch.sharded_checkpoint import clear
from trainkit.task.base import Task, by_rank


class LastAndBest(Checkpoint):
    """<run>/checkpoints/last.ckpt, the ones before it, and best.ckpt: that of the best `monitor` so far.

    A checkpoint is written after every validation, or every `every_n_steps` optimizer steps, at the task's milestones
    (the ends of a stream's tasks), after the last step and when a signal stops the run. The last `keep` are kept:
    last.ckpt, previous.ckpt, previous_2.ckpt, … Each file is written beside its place, flushed to the disk and renamed,
    and the older ones move up only once last.ckpt is the new one; so at any moment last.ckpt is whole, and so is
    another one. Names by age need neither a pointer to the newest file nor a search for it. A file carries checksums
    (trainkit/launch/checkpoints.py); a run that goes on from an older file because last.ckpt was damaged does not move
    that up.

    Between steps only: where a step is followed by a validation the file is made after it, as Lightning takes up a
    checkpoint from before it as if that validation had been done. Holds plain types (torch.load with weights_only=True)
    and the states of the random number generators of all ranks, so a continued run repeats the unbroken one bit for
    bit. Raises ValueError where `monitor` was not validated, DiskError where there is no room.
    """

    def __init__(
        self, *, monitor: str = "val/loss", mode: str = "min", every_n_steps: int | None = None, keep: int = 2
    ):
        if mode not in ("min", "max"):
            raise ValueError(f"callbacks.checkpoint.mode must be min or max; got {mode!r}")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"callbacks.checkpoint.every_n_steps must be at least 1, or null; got {every_n_steps}")
        if keep < 1:
            raise ValueError(f"callbacks.checkpoint.keep must be at least 1; got {keep}")
        self.monitor, self.mode, self.every_n_steps, self.keep = monitor, mode, every_n_steps, keep
        self.best: float | None = None
        self._saved_step = -1
        self._sound = False  # whether this process knows that last.ckpt is: it made it, or goes on from it
        self._generators: list[dict[str, torch.Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: Task, stage: str) -> None:  # type: ignore[override]
        self.folder = Path(trainer.default_root_dir) / "checkpoints"

    @property
    def best_model_path(self) -> str:
        """What ckpt_path="best" means to Lightning."""
        return str(self.folder / "best.ckpt") if (self.folder / "best.ckpt").is_file() else ""

    # --- when -------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        if trainer.is_global_zero:
            clear(self.folder)  # of what did not become a checkpoint
        self._saved_step = trainer.global_step
        self._sound = trainer.ckpt_path is not None and Path(trainer.ckpt_path) == self.folder / "last.ckpt"
        if len(self._generators) == trainer.world_size:
            _set_generators(self._generators[trainer.global_rank])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if self._saved_step == trainer.global_step or trainer.fit_loop._should_accumulate():
            return
        last = trainer.global_step >= pl_module.total_steps and not trainer.enable_validation
        if (last or _stopping(trainer) or pl_module.milestone or self._in_turn(trainer)) and not _validation_follows(
            trainer
        ):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        best = self._improves(trainer)
        last = trainer.global_step >= pl_module.total_steps
        if last or _stopping(trainer) or self.every_n_steps is None or self._in_turn(trainer):
            self._save(trainer, best=best)
        elif best:
            self._save(trainer, last=False, best=True)

    def on_train_end(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        if self._saved_step != trainer.global_step:
            self._save(trainer)

    def _in_turn(self, trainer: Trainer) -> bool:
        return self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0

    def _improves(self, trainer: Trainer) -> bool:
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(name for name in trainer.callback_metrics if name.startswith("val/"))
            raise ValueError(
                f"callbacks.checkpoint.monitor={self.monitor} is not validated; there are: {known or 'none'}"
            )
        value = float(trainer.callback_metrics[self.monitor])
        better = value == value and (
            self.best is None or (value < self.best if self.mode == "min" else value > self.best)
        )
        if better:
            self.best = value
        return better

    # --- how --------------------------------------------------------------------------------------------------------

    def _save(self, trainer: Trainer, *, last: bool = True, best: bool = False) -> None:
        """Every rank takes part, the first one writes."""
        fresh, spare = self.folder / "last.ckpt.part", self.folder / "best.ckpt.part"
        before = self.folder / "previous.ckpt.part"
        try:
            with writing(self.folder / ("last.ckpt" if last else "best.ckpt"), self.folder.parent):
                trainer.save_checkpoint(fresh)
                if trainer.is_global_zero:
                    sync(fresh)
                    if best:
                        _copy(fresh, spare)
                        spare.replace(self.folder / "best.ckpt")
                    if last:
                        self._replace_last(fresh, before, newer=self._saved_step != trainer.global_step)
                    sync(self.folder)
                    clear(self.folder)
        finally:
            if trainer.is_global_zero:
                for path in (fresh, spare, before):
                    with suppress(OSError):  # on a disk that has become read-only
                        path.unlink(missing_ok=True)
        if last:
            self._saved_step, self._sound = trainer.global_step, True

    def _replace_last(self, fresh: Path, before: Path, *, newer: bool) -> None:
        """Puts the new file in the place of last.ckpt, and that in the place of the one before it, and so on."""
        last, *older = kept(self.folder, self.keep)
        move = bool(older) and newer and self._sound and last.is_file()
        if move:
            _copy(last, before)
        fresh.replace(last)
        if move:
            sync(self.folder)  # the order of the renames must be theirs on the disk too
            for place, source in reversed(list(zip(older[1:], older, strict=False))):
                if source.is_file():
                    source.replace(place)
            before.replace(older[0])

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "best": self.best, "generators": by_rank(_generators())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._generators = state_dict["generators"]
        if state_dict["monitor"] == self.monitor:
            self.best = state_dict["best"]


def _stopping(trainer: Trainer) -> bool:
    return any(isinstance(callback, Preemption) and callback.stopping for callback in trainer.callbacks)  # type: ignore[attr-defined]


def _validation_follows(trainer: Trainer) -> bool:
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def _generators() -> dict[str, torch.Tensor]:
    """The states of this process's generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_generators(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _copy(source: Path, target: Path) -> None:
    """The same file under a second name; a real copy where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)
