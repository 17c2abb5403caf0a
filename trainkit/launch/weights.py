"""Where a task's weights come from, a run or a Hugging Face folder, and the form that its model has: the key `to`."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

from omegaconf import DictConfig
from torch import nn

from trainkit.launch import rundir
from trainkit.launch.check.calls import check_calls
from trainkit.launch.explain import UserError
from trainkit.launch.huggingface import pretrained
from trainkit.launch.runconfig import load_config
from trainkit.launch.sharded_checkpoint import read, whole
from trainkit.surgery import FORMS
from trainkit.task.base import Task

WEIGHTS = "model.safetensors"  # the model's alone, in a directory that mode=export wrote


def give_form(task: Task, form: str | None) -> None:
    """Replaces the task's model by its twin of that form (trainkit.surgery); null: as it was built."""
    if form is not None and form not in FORMS:
        raise UserError(f"to={form}: there is no such form; to is {', '.join(FORMS)} or null")
    if form is not None:
        task.model = FORMS[form](task.model)


def initialize(task: Task, cfg: DictConfig) -> None:
    """The weights that `init_from` names, if it does, in a model of the form that `to` names."""
    folder = Path(cfg.init_from or "").expanduser()
    if cfg.init_from and pretrained.is_folder(folder):
        pretrained.load(task.model, folder, cfg)
    elif cfg.init_from:
        directory = rundir.find(cfg.init_from, cfg.paths.log_dir, key="init_from")
        check_calls(load_config(directory / "config.yaml"), plugins=list(cfg.plugins))
        from_run(task, directory, checkpoint=cfg.checkpoint, form=cfg.to)
        return
    give_form(task, cfg.to)


def from_run(task: Task, directory: Path, *, checkpoint: str, form: str | None) -> None:
    """A run's weights in a model of the given form, converted where the run's has none.

    Raises UserError where the run's model has another form, as there is no way back.
    """
    stored = load_config(directory / "config.yaml").get("to")
    if stored not in (None, form):
        raise UserError(
            f"the model in {str(directory)!r} has the form {stored}, which cannot be undone: add to={stored}"
        )
    give_form(task, stored)
    load_weights(task, directory, checkpoint)
    if stored is None:
        give_form(task, form)


def unreadable(error: Exception) -> str:
    """Why a checkpoint was not loaded, in one sentence: torch's own advice is to trust the file."""
    if isinstance(error, UnpicklingError):
        return "it holds more than tensors and plain values, which could be a program, and nothing of it was run"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def exported(directory: Path) -> bool:
    """Whether a directory is one that mode=export wrote."""
    return (directory / WEIGHTS).is_file()


def load_weights(task: Task, directory: Path, which: str) -> None:
    """Puts a run's weights into a task; UserError where there are none or they are another model's."""
    if exported(directory):
        load_exported(task.model, directory / WEIGHTS)
        return
    path = directory / "checkpoints" / f"{which}.ckpt"
    if not path.is_file():
        raise UserError(f"{str(directory)!r} has no {which}.ckpt: the run ended before its first checkpoint")
    try:
        state = whole(read(path, lazily=True)["state_dict"])
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, UnpicklingError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {unreadable(error)}") from error
    try:
        task.load_state_dict(state)
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        raise UserError(f"the weights in {str(path)!r} are of another model: {first}") from None


def load_exported(model: nn.Module, path: Path) -> None:
    """Puts the tensors of mode=export into a model, where a shared one was written once."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    try:
        load_model(model, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {unreadable(error)}") from error
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        raise UserError(f"the weights in {str(path)!r} are of another model: {first}") from None
