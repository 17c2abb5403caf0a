"""mode=export: a trained model as a folder of its own, which needs neither the run nor its data."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

from omegaconf import DictConfig

from trainkit.data.tokenizer import FILE, Bytes, Subwords, byte_tokenizer
from trainkit.launch import rundir, versions
from trainkit.launch.check.ranges import check_empty
from trainkit.launch.console import log
from trainkit.launch.disk import writing
from trainkit.launch.explain import shown
from trainkit.launch.huggingface.architectures import ARCHITECTURES
from trainkit.launch.huggingface.hub import layout
from trainkit.launch.job import Result, build_data, build_task, mistakes
from trainkit.launch.mode.earlier import earlier
from trainkit.launch.mode.sample import end_of_document, reads_text
from trainkit.launch.runconfig import save_config
from trainkit.launch.weights import WEIGHTS, exported, from_run
from trainkit.task.base import Task


def export(cfg: DictConfig, overrides: list[str]) -> Result:
    """Writes export.dir, else <run>/export/<format>, all of it or nothing.

    format=trainkit: model.safetensors, config.yaml, result.json and, of subwords, tokenizer.json. The folder is used
    like a run's: trainkit.load(folder), init_from=, and resume= with mode=eval or mode=sample. format=hf: config.json,
    model.safetensors and tokenizer.json as Hugging Face's libraries have them; init_from= reads it again. UserError for
    a folder that holds something, and in format=hf for a model that has no layout there.
    """
    directory, own = earlier(cfg, overrides)
    form = cfg.export.format
    target = Path(cfg.export.dir).expanduser() if cfg.export.dir else directory / "export" / form
    check_empty(target)
    with mistakes():
        task = build_task(own)
        from_run(task, directory, checkpoint=own.checkpoint, form=own.to)
        tokenizer = _tokenizer(own, directory)
    rundir.make(target.parent)
    with writing(target, directory), _whole(target) as folder:
        hints = {"trainkit": _ours, "hf": _theirs}[form](folder, own, task, tokenizer, directory)
        (folder / WEIGHTS).chmod(0o644)  # safetensors writes what its owner alone may read
    parameters = sum(p.numel() for p in task.model.parameters())
    log.info("written to %s; use it by", target)
    for hint in hints:
        log.info("  %s", hint.format(folder=target))
    return Result(target, {"export/parameters": float(parameters)}, "finished")


def _ours(folder: Path, own: DictConfig, task: Task, tokenizer: Path | None, directory: Path) -> list[str]:
    from safetensors.torch import save_model

    save_model(task.model, str(folder / WEIGHTS), metadata={"format": "pt"})  # writes tied weights once
    own.checkpoint, own.resume = "last", None
    save_config(own, folder / "config.yaml")
    result: dict[str, Any] = {"status": "finished", "run": str(directory), "metrics": {}, "ended": time.time()}
    rundir.write_json(folder / "result.json", result | {"versions": versions.versions()})
    if tokenizer:
        shutil.copyfile(tokenizer, folder / FILE)
    form = f" to={own.to}" if own.get("to") else ""
    return ["trainkit.load('{folder}')", f"python run.py init_from={{folder}}{form}"]


def _theirs(folder: Path, own: DictConfig, task: Task, tokenizer: Path | None, directory: Path) -> list[str]:
    from safetensors.torch import save_file

    config, tensors = layout(own, task.model.state_dict())
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    end = end_of_document(Subwords(tokenizer) if tokenizer else Bytes()) if reads_text(own) else None
    config |= {"bos_token_id": end, "eos_token_id": end, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    source = ""
    if tokenizer:
        shutil.copyfile(tokenizer, folder / FILE)
        source = f" data.tokenizer=file data.tokenizer_file={{folder}}/{FILE}"
    elif reads_text(own):
        byte_tokenizer().save(str(folder / FILE))
    words = ARCHITECTURES[config["model_type"]][0](config, folder)
    needed = " ".join(f"{key}={shown(value)}" for key, value in words.items() if key != "model.vocab")
    return [f"python run.py init_from={{folder}} {needed}{source}"]


def _tokenizer(own: DictConfig, directory: Path) -> Path | None:
    """The tokenizer.json that the model was trained with; None where it reads bytes, or no text."""
    if not reads_text(own) or own.data.get("tokenizer") == "byte":
        return None
    if exported(directory):
        return directory / FILE if (directory / FILE).exists() else None
    return build_data(own).tokenizer_path()  # type: ignore[attr-defined]


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name once all is in it, and is removed where something fails."""
    partial = target.with_name(f".{target.name}.{token_hex(4)}.partial")
    partial.mkdir()
    try:
        yield partial
        check_empty(target)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
