"""mode=convert: a trained model in another form with the same outputs (trainkit.surgery)."""

from __future__ import annotations

import time

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from trainkit.launch import rundir, versions
from trainkit.launch.console import log, to_file
from trainkit.launch.explain import UserError
from trainkit.launch.job import Result, build_data, build_task, mistakes
from trainkit.launch.mode.earlier import earlier
from trainkit.launch.runconfig import load_config, save_config
from trainkit.launch.weights import from_run
from trainkit.surgery import FORMS

PROBE = 8  # inputs of the validation set that both models are compared on
TOLERANCE = 1e-8  # of the largest output


def convert(cfg: DictConfig, overrides: list[str]) -> Result:
    """Writes <run>/convert/<to>/: the converted weights, and the configuration that builds the model around them.

    Before that the outputs are compared in float64; UserError where the model cannot be converted. The folder is used
    like a run's: trainkit.load(folder), mode=eval resume=FOLDER, init_from=FOLDER to=<to>.
    """
    if cfg.to not in FORMS:
        raise UserError(f"mode=convert needs the form to convert to: add to={' or to='.join(FORMS)}; got to={cfg.to}")
    directory, own = earlier(cfg, overrides)
    form = load_config(directory / "config.yaml").get("to")
    if form:
        raise UserError(f"{str(directory)!r} holds a converted model already ({form}); convert the run it is from")
    with mistakes():
        data = build_data(own)
        task = build_task(own)
        from_run(task, directory, checkpoint=own.checkpoint, form=None)
        data.setup("validate")
        inputs = next(iter(data.val_dataloader()))[0][:PROBE]
        original = task.model.double().eval()
        task.model = FORMS[own.to](original)
        difference, largest = compare(original, task.model.eval(), inputs)
    if not difference <= TOLERANCE * max(1.0, largest):
        raise UserError(
            f"to={own.to}: the outputs would differ by {difference:.3g}, so nothing was written",
            "the model reads or writes its stream other than by linear layers, or its weights are not finite",
        )
    target = directory / "convert" / own.to
    rundir.make(target / "checkpoints")
    with to_file(target / "run.log"):
        task.model.float()
        torch.save({"state_dict": task.state_dict()}, target / "checkpoints" / "last.ckpt")
        own = OmegaConf.merge(own, {"checkpoint": "last", "resume": None})
        save_config(own, target / "config.yaml")
        metrics = {"convert/difference": difference, "convert/largest_output": largest}
        result = {"status": "finished", "run": str(directory), "form": own.to, "overrides": overrides}
        result |= {"metrics": metrics, "ended": time.time(), "versions": versions.versions()}
        rundir.write_json(target / "result.json", result)
        log.info("largest difference %.3g between outputs up to %.3g, in float64", difference, largest)
        log.info("written to %s; load it by trainkit.load(%r)", target, str(target))
    return Result(target, metrics, "finished")


@torch.no_grad()
def compare(a: nn.Module, b: nn.Module, inputs: torch.Tensor) -> tuple[float, float]:
    """The largest difference between the outputs of two float64 models, and the largest output."""
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    expected, actual = a(inputs), b(inputs)
    return (actual - expected).abs().max().item(), expected.abs().max().item()
