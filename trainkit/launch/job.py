"""One run, from a checked configuration to its result: the modes train and eval, and the door to the others."""

from __future__ import annotations

import os
import secrets
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from trainkit.continual.strategy import Strategy
from trainkit.launch import rundir, versions
from trainkit.launch.checkpoints import newest
from trainkit.launch.console import log, show, to_file, to_terminal
from trainkit.launch.disk import DiskError
from trainkit.launch.explain import UserError
from trainkit.launch.footprint import footprint
from trainkit.launch.mode.earlier import earlier
from trainkit.launch.monitors import check_monitors
from trainkit.launch.process.children import die_with
from trainkit.launch.process.compiling import compile_blocks, wanted
from trainkit.launch.process.interruption import Interrupted, requeue
from trainkit.launch.process.launched import check_interactive, check_launch, launched, mark, requeued
from trainkit.launch.process.ranks import Agreement, supervise, tell_directory, together, told_directory
from trainkit.launch.process.room import check_room, is_out_of_memory, out_of_memory
from trainkit.launch.process.settle import settle
from trainkit.launch.runconfig import continues, plain, save_config
from trainkit.launch.rundir import Run
from trainkit.launch.screens import opening, scores, summary
from trainkit.launch.summary import STAGES
from trainkit.launch.unused import unused_norm_layer
from trainkit.launch.weights import from_run, give_form, initialize, unreadable
from trainkit.measure.look import look
from trainkit.measure.shards import is_sharded
from trainkit.optimizer.partition import describe
from trainkit.report.metrics_file import readable
from trainkit.task.base import Task

PROBE = 8  # validation samples whose activations mode=eval measures


@dataclass(frozen=True)
class Result:
    """What a run left: its directory, its final metrics by name, and how it ended (finished, failed, interrupted)."""

    dir: Path
    metrics: dict[str, float]
    status: str


def execute(cfg: DictConfig, overrides: list[str], typed: Sequence[str]) -> Result:
    """Carries out the configuration's mode. Raises UserError for a mistake that shows only once data are read.

    overrides: all the words behind it; typed: today's, by which a requeued SLURM job knows its run again.
    """
    to_terminal()
    if "accelerator" in cfg.trainer and cfg.mode == "train":
        check_launch(cfg.trainer)
        check_interactive(cfg.trainer)
    if rundir.rank() > 0 and rundir.SHARED_DIR in os.environ:  # so rank 0 started this process
        die_with(rundir.read_json(Path(os.environ[rundir.SHARED_DIR], "result.json"))["pid"])
    try:
        if cfg.mode == "train":
            return train(cfg, overrides, mark(typed))
        if cfg.mode == "eval":
            return evaluate(cfg, overrides)
        # sample(cfg, overrides) of mode/sample.py, and so on: made of the parts below, imported when asked for.
        return getattr(import_module(f"trainkit.launch.mode.{cfg.mode}"), cfg.mode)(cfg, overrides)
    except Interrupted as stopped:
        if rundir.rank() > 0 and rundir.SHARED_DIR in os.environ:
            sys.exit(0)  # rank 0 tells; Lightning would kill it where a process that it started ends with another code
        if rundir.rank() == 0:
            requeue(stopped)
        raise


def train(cfg: DictConfig, overrides: list[str], slurm: dict[str, Any] | None = None) -> Result:
    """Data, model, fit, test; everything that is learnt on the way lies in the run directory.

    slurm: the mark of the job that this is part of.
    """
    done = rundir.read_json(Path(cfg.resume, "result.json")) if cfg.resume and requeued() else {}
    if done.get("status") == "finished" and done.get("slurm") == slurm:  # the script of the job is at another line
        log.info("%s was finished before the job was requeued", cfg.resume)
        return Result(Path(cfg.resume), done["metrics"], "finished")
    if launched() is not None and rundir.rank() > 0:  # rank 0 prepares the data meanwhile
        os.environ[rundir.SHARED_DIR] = str(told_directory())
    previous = _previous(cfg)
    if previous is not None:
        continues(cfg, previous)
    notes = settle(cfg, previous)
    with mistakes():
        data = build_data(cfg)
        task = build_task(cfg)
        checkpoint, damaged = newest(previous) if previous is not None else (None, [])
        if checkpoint is not None:
            give_form(task, cfg.to)  # the weights come from the checkpoint
        else:
            initialize(task, cfg)
        run = locate(cfg, overrides, previous, slurm)
        trainer = build_trainer(cfg, task, run)
        check_room(task, trainer)
        data.trainer = trainer
        data.setup("fit")  # Lightning does so again; here a batch that cannot be shared out is still a user's mistake
        if not run.primary and run.dir.is_dir():  # a further rank, which is not told what is resumed
            checkpoint, damaged = newest(run.dir)
        if wanted(cfg.compile, cfg.trainer.get("accelerator", "auto")):
            compile_blocks(task.model, strict=cfg.compile is True)
        start = step_of(checkpoint) if checkpoint else 0
        if previous is not None:
            not_finished(previous, checkpoint, start, trainer.max_steps)
    with run, reported(run, trainer, start), to_file(run.dir / "run.log") if run.primary else nullcontext():
        loggers = trainer.loggers = build_loggers(cfg, run, start)
        if run.primary:
            save_config(cfg, run.dir / "config.yaml")
            tell_directory(run.dir)
            show(opening(cfg, run, describe(task.model)))
            for line in notes:
                log.info("%s", line)
            for line in damaged:
                log.warning("%s", line)
            idle = unused_norm_layer(overrides, make(cfg, "norm_layer"), cfg.model.get("width", 64), task.model)
            if idle and type(task.strategy) is Strategy:  # others put layers of their own in the place of norms
                log.warning("warning: %s", idle)
        try:
            began = time.perf_counter()
            with together(run, trainer, lambda: finish_loggers(loggers, failed=True)):
                trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
                run.result["seconds"] = run.before.get("seconds", 0.0) + time.perf_counter() - began
                run.result |= footprint(task, trainer.optimizers, trainer.global_step)
                metrics = _numbers(trainer)
                if trainer.state.finished:
                    trainer.test(task, datamodule=data, verbose=False)
                    metrics |= _numbers(trainer)
        finally:
            finish_loggers(loggers)
        if run.resumed:  # it may have been stopped after its last step, or before it wrote what it knew
            metrics = _logged(run.dir) | metrics
        run.result |= {"status": "finished", "reason": "the run reached its end", "metrics": metrics}
        run.result["figures"] = sorted(str(p.relative_to(run.dir)) for p in run.dir.glob("figures/*.png"))
        if run.primary:
            show(summary(cfg, run, metrics))
    return Result(run.dir, metrics, "finished")


def evaluate(cfg: DictConfig, overrides: list[str]) -> Result:
    """A run's own configuration and weights on its validation and test sets.

    Written to paths.run_dir, else to <run>/eval, or eval_2, eval_3, … where that has been done before.
    """
    directory, own = earlier(cfg, overrides)
    with mistakes():
        data = build_data(own)
        task = build_task(own)
        from_run(task, directory, checkpoint=own.checkpoint, form=own.to)
    primary, target = rundir.rank() == 0, directory / "eval"
    if primary:
        target = rundir.given(cfg.paths.run_dir) if cfg.paths.run_dir else rundir.next_dir(target)
        rundir.make(target)
    with to_file(target / "run.log") if primary else nullcontext():
        with mistakes():
            trainer = make(own, "trainer")(callbacks=[], run_dir=target)
        metrics: dict[str, float] = {}
        with mistakes():
            for evaluation in (trainer.validate, trainer.test):
                evaluation(task, datamodule=data, verbose=False)
                metrics |= _numbers(trainer)
        if primary:
            result = {"status": "finished", "run": str(directory), "overrides": overrides, "metrics": metrics}
            result |= {"ended": time.time(), "versions": versions.versions()}
            rundir.write_json(target / "result.json", result)
            show(scores(metrics))
            # Too many to show. Of a sharded model there are none: a forward is everybody's there.
            sharded = any(is_sharded(p) for p in task.model.parameters())
            result["measures"] = {} if sharded else _activations(task, data, trainer)
            rundir.write_json(target / "result.json", result)
            log.info("written to %s, with %d measures of activations", target / "result.json", len(result["measures"]))
    return Result(target, metrics, "finished")


def _activations(task: Task, data: LightningDataModule, trainer: Trainer) -> dict[str, float]:
    """The measures of the activations on the first validation samples, on the device of the run."""
    device = trainer.strategy.root_device
    batch = next(iter(data.val_dataloader()))
    few = [part[:PROBE] for part in batch] if isinstance(batch, (list, tuple)) else batch[:PROBE]
    task.to(device)
    try:
        return look(task, [trainer.strategy.batch_to_device(few, device)])
    finally:
        task.cpu()


# --- the parts ---------------------------------------------------------------------------------------------------


def make(cfg: DictConfig, group: str) -> Any:
    """What the node `group` describes; built from a copy, because Hydra resolves the nodes it refers to in place."""
    return instantiate(deepcopy(cfg)[group], _convert_="all")


def build_data(cfg: DictConfig) -> LightningDataModule:
    """The data module, prepared; what only reading the data tells is written into the configuration."""
    seed_everything(cfg.seed, workers=True, verbose=False)
    data = make(cfg, "data")
    data.prepare_data()
    for name, value in data.facts().items():
        OmegaConf.update(cfg, f"data.{name}", value)
    return data


def build_task(cfg: DictConfig) -> Task:
    """The task with model and plugins; seeded, so that the weights depend on the seed and the model alone."""
    seed_everything(cfg.seed, workers=True, verbose=False)
    return make(cfg, "task")


def build_loggers(cfg: DictConfig, run: Run, start: int) -> list[Logger]:
    """metrics.jsonl, and what `logger` chooses; lines beyond the step that is resumed from are dropped."""
    from trainkit.launch.loggers import JsonlLogger

    jsonl = JsonlLogger(run.dir)
    if run.resumed and run.primary:
        jsonl.truncate_after(start)
    made = make(cfg, "logger")
    if not made:
        return [jsonl]
    made = made(
        run_dir=run.dir,
        log_dir=Path(cfg.paths.log_dir),
        run_id=run.id,
        name=run.dir.name if not run.dir.name.isdigit() else f"{run.dir.parent.name}/{run.dir.name}",
        config=plain(cfg),
        group=run.dir.parent.name if run.dir.name.isdigit() else None,
        resumed=run.resumed,
    )
    return [jsonl, *(made if isinstance(made, list) else [made])]


def finish_loggers(loggers: list[Logger], *, failed: bool = False) -> None:
    """Closes every logger, telling those that ask (W&B) how the run ended; failed: even if nothing was raised here."""
    error = sys.exc_info()[1]
    exit_code = int(failed) if error is None else error.code if isinstance(error, Interrupted) else 1
    for logger in loggers:
        logger.finalize("failed" if exit_code else "success")
        if hasattr(logger, "finish"):
            logger.finish(exit_code=exit_code)  # type: ignore[attr-defined]


def build_trainer(cfg: DictConfig, task: Task, run: Run) -> Trainer:
    callbacks = make(cfg, "callbacks") or {}
    check_monitors(callbacks, task)
    trainer = make(cfg, "trainer")(callbacks=[*callbacks.values(), Agreement()], run_dir=run.dir)
    supervise(trainer, run.overrides)
    return trainer


def locate(cfg: DictConfig, overrides: list[str], previous: Path | None, slurm: dict[str, Any] | None) -> Run:
    """The run and its directory, not yet on disk: the previous one, the one that was named, or a new one."""
    primary = rundir.rank() == 0
    shared = os.environ.get(rundir.SHARED_DIR)
    if not primary and shared:
        return Run(
            Path(shared), id=rundir.read_json(Path(shared, "result.json"))["id"], overrides=overrides, primary=False
        )
    if previous is not None:
        directory, before = previous, rundir.read_json(previous / "result.json")
    elif cfg.paths.run_dir:
        directory, before = rundir.given(cfg.paths.run_dir), {}
    else:
        directory, before = rundir.new_dir(cfg.paths.log_dir, cfg.name or cfg.choices.model), {}
    # Drawn from the system and not from `random`, which the seed makes the same in every run.
    # W&B's agent knows the run that it started by the id that it gave it.
    drawn = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    run_id = before.get("id") or drawn or secrets.token_hex(4)
    result = before | {"status": "running", "id": run_id, "overrides": overrides, "choices": dict(cfg.choices)}
    result |= {"started": before.get("started", time.time()), "pid": os.getpid(), "versions": versions.versions()}
    result["slurm"] = slurm
    return Run(
        directory, run_id, overrides, resumed=previous is not None, primary=primary, result=result, before=before
    )


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint was made at; UserError where the file is damaged."""
    try:
        return torch.load(checkpoint, weights_only=True, mmap=True)["global_step"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, UnpicklingError) as error:
        raise UserError(
            f"{str(checkpoint)!r} cannot be read: {unreadable(error)}",
            f"remove it to go on from the one before, or start another run: init_from={checkpoint.parents[1]}",
        ) from error


def not_finished(directory: Path, checkpoint: Path | None, step: int, max_steps: int) -> None:
    """Refuses to continue a run that has nothing left to do, or nothing to go on from."""
    finished = rundir.read_json(directory / "result.json").get("status") == "finished"
    if finished and checkpoint is None:
        raise UserError(f"{str(directory)!r} is finished and has no checkpoint to go on from; start a new run")
    if checkpoint is not None and finished and 0 <= max_steps <= step:
        raise UserError(
            f"{str(directory)!r} is finished: it stands at step {step}, and trainer.max_steps is {max_steps}",
            f"to go on, give more: trainer.max_steps={2 * step}",
        )


# --- how it may go wrong -----------------------------------------------------------------------------------------


@contextmanager
def mistakes() -> Iterator[None]:
    """While parts are built, a ValueError or OSError is the user's mistake: its sentence without the traceback."""
    try:
        yield
    except UserError:
        raise
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, (ValueError, OSError, MisconfigurationException)):
            raise UserError(str(cause)) from cause
        raise
    except (ValueError, OSError, MisconfigurationException) as error:
        raise UserError(str(error)) from error


@contextmanager
def reported(run: Run, trainer: Trainer, start: int) -> Iterator[None]:
    """Writes how a run failed into its result and its log, and lets the exception go on.

    A ValueError before the first step is a setting that cannot work, so the user's mistake; a run that was to be
    continued then stays what it was.
    """
    config = (run.dir / "config.yaml").read_text() if run.resumed else ""
    try:
        yield
        run.result["ended"] = time.time()
    except BaseException as error:
        run.result["ended"] = time.time()
        unchanged = isinstance(error, Exception) and trainer.global_step <= start
        if unchanged and run.resumed and run.primary:
            with suppress(OSError):  # in one piece or not at all: the disk may be why it failed
                rundir.write_text(run.dir / "config.yaml", config)
            run.result = run.before
            if isinstance(error, DiskError):
                raise
            raise UserError(f"the run could not be continued: {error}") from error
        if unchanged and isinstance(error, (ValueError, MisconfigurationException)):
            run.result |= {"status": "failed", "reason": str(error)}
            raise UserError(str(error)) from error
        stopped = error.__context__ if isinstance(error, SystemExit) else error  # Lightning's exit after Ctrl-C
        if isinstance(error, Interrupted):
            run.result |= {"status": "interrupted", "reason": str(error)}
            log.info("%s; go on with resume=%s", error, run.dir)
            raise
        status = "interrupted" if isinstance(stopped, KeyboardInterrupt) else "failed"
        short = out_of_memory(error, trainer) if is_out_of_memory(error) else None
        run.result |= {"status": status, "reason": str(short or f"{type(stopped).__name__}: {stopped}")}
        if run.primary:
            with suppress(OSError), (run.dir / "run.log").open("a") as file:  # the disk may be why it failed
                traceback.print_exc(file=file)
        if short is not None:
            raise short from error
        raise


def _previous(cfg: DictConfig) -> Path | None:
    if not cfg.resume or rundir.rank() > 0:
        return None
    return rundir.find(cfg.resume, cfg.paths.log_dir, cfg.name)


def _logged(directory: Path) -> dict[str, float]:
    """The same of what stands in the run's metrics.jsonl, as precise as the trainer keeps it."""
    last = {name: value for row in readable(directory / "metrics.jsonl") for name, value in row.items()}
    return {name: float(torch.tensor(value)) for name, value in last.items() if name != "step" and _is_final(name)}


def _numbers(trainer: Trainer) -> dict[str, float]:
    """The last value of everything logged, per-layer values left out: those are in metrics.jsonl."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if _is_final(name)}


def _is_final(name: str) -> bool:
    return name.startswith(STAGES) or "/" not in name or name.endswith("/mean")
