"""Weights & Biases that never asks, blocks or fails a run."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from trainkit.launch.console import log

LOOK = "_detect_and_apply_job_inputs"  # of wandb 0.31
STILL = "the run goes on, metrics.jsonl has every number"
Mode = Literal["online", "offline", "disabled"]


class WandB(WandbLogger):
    """A W&B run: online where an API key is configured, else offline below <log_dir>/wandb for `wandb leet`.

    $WANDB_MODE, $WANDB_API_KEY, .netrc and `wandb login` count as usual, but nobody is asked for a key. Where the
    server does not answer within `init_timeout` seconds the run is kept offline, and where W&B itself breaks the run
    goes on without it; either is said once. `finish_timeout` bounds the wait for the last upload; what is left then
    stays on disk for `wandb sync`. A continued run keeps its id; offline, that makes a second fragment of the same id.
    """

    def __init__(
        self,
        *,
        run_dir: Path,
        log_dir: Path,
        run_id: str,
        name: str,
        config: dict[str, Any],
        group: str | None = None,
        job_type: str | None = None,
        resumed: bool = False,
        project: str | None = None,
        entity: str | None = None,
        tags: Sequence[str] = (),
        init_timeout: float = 15.0,
        finish_timeout: float = 60.0,
    ):
        project = project or os.environ.get("WANDB_PROJECT") or "trainkit"
        super().__init__(name=name, save_dir=log_dir, version=run_id, project=project, log_model=False)
        self._options = {
            "dir": str(log_dir),
            "id": run_id,
            "name": name,
            "project": project,
            "entity": entity,
            "group": group,
            "job_type": job_type,
            "tags": list(tags),
            "config": config | {"run_dir": str(run_dir)},
        }
        self.resumed = resumed
        self.init_timeout, self.finish_timeout = init_timeout, finish_timeout
        self._closed = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The wandb Run, started on first use; one that ignores everything where W&B does not work."""
        if self._experiment is None:
            self._attempt("start", self._start)
        if self._experiment is None:
            import wandb

            self._experiment = wandb.init(mode="disabled")
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if not self._closed:
            self._attempt("log", lambda: super(WandB, self).log_metrics(metrics, step))

    @rank_zero_only
    def upload(self, what: str, panels: Mapping[str, Any], artifact: Any) -> None:
        """Shows `panels` of W&B's media types and keeps the artifact with the run."""

        def act() -> None:
            self.experiment.log(dict(panels))
            self.experiment.log_artifact(artifact)

        self._attempt(f"take the {what}", act, still="it is on disk")

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """Ends the W&B run as finished (0) or failed (anything else); what is logged afterwards is dropped."""
        if self._experiment is not None and not self._closed:
            run = self._experiment
            self._attempt("finish", lambda: run.finish(exit_code=exit_code))
        self._closed = True

    def _attempt(self, what: str, act: Callable[[], Any], still: str = STILL) -> None:
        try:
            act()
        except Exception as error:  # whatever W&B raises must not end a training run
            self._closed = True
            log.warning("W&B could not %s (%s); %s", what, _brief(error), still)

    def _start(self) -> None:
        mode = self._mode()
        if mode == "online":
            before = self._fragments()
            try:
                self._experiment = self._init(mode)
            except Exception as error:
                log.warning("W&B cannot go online (%s); this run is kept offline", _brief(error))
                self._forget(before)
                mode = "offline"
        if self._experiment is None:
            self._experiment = self._init(mode)
        self._offline = mode == "offline"
        self._experiment.define_metric("trainer/global_step")
        self._experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)

    def _mode(self) -> Mode:
        """online, offline or disabled: what is asked for, as far as it needs no question."""
        from wandb.sdk.lib.wbauth import read_netrc_auth

        settings = self._settings()
        if settings.mode in ("offline", "dryrun"):
            return "offline"
        if settings.mode == "disabled":
            return "disabled"
        known = settings.api_key or settings.identity_token_file or read_netrc_auth(host=settings.base_url)
        return "online" if known else "offline"

    def _settings(self) -> Any:
        """W&B's settings from the environment and its files, after silencing it."""
        import wandb
        from wandb.sdk import wandb_setup

        # wandb.setup() would start the service here, and W&B 0.31 hangs for good where that fails.
        return wandb_setup._setup(settings=wandb.Settings(silent=True), start_service=False).settings

    def _init(self, mode: Mode) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            reinit="create_new",
            init_timeout=self.init_timeout,
            finish_timeout=self.finish_timeout,
            finish_timeout_raises=True,
        )
        resume = "allow" if self.resumed and mode == "online" else None
        with without_launch():
            return wandb.init(mode=mode, resume=resume, settings=settings, **self._options)

    def _fragments(self) -> set[Path]:
        return set(Path(self._options["dir"], "wandb").glob(f"run-*-{self._options['id']}*"))

    def _forget(self, before: set[Path]) -> None:
        """Undoes a failed online start: its process still holds the id, its folder would look like a crashed run."""
        import wandb

        wandb.teardown()
        for fragment in self._fragments() - before:
            shutil.rmtree(fragment, ignore_errors=True)
        self._settings()


@contextmanager
def without_launch() -> Iterator[None]:
    """Keeps W&B from importing its Launch, a second of work, when a run starts: it asks that for inputs of the run.

    Only Launch itself leaves any, so there are none where it is not there yet.
    """
    from wandb.sdk.wandb_run import Run

    look = getattr(Run, LOOK, None)
    if look is None or "wandb.sdk.launch.inputs.internal" in sys.modules:
        yield
        return
    setattr(Run, LOOK, lambda run: None)
    try:
        yield
    finally:
        setattr(Run, LOOK, look)


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 160 else lines[0][:159] + "…"
