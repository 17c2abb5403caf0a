"""The pictures of a run, drawn when it ends, however it ends."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger

from trainkit.launch.console import log
from trainkit.task.base import Task


class Figures(Callback):
    """Draws <run>/figures/*.png from the run's metrics.jsonl, the numbers as .csv beside each, and shows them to W&B.

    Read from the file, so that a continued run is pictured from its first step on.
    """

    def __init__(self, title: str = ""):
        self.title = title

    def on_fit_end(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: Task, exception: BaseException) -> None:  # type: ignore[override]
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        run = Path(trainer.default_root_dir)
        if not trainer.is_global_zero or not (run / "metrics.jsonl").is_file():
            return
        try:
            from trainkit.report.figures import draw

            pictures = draw(run / "metrics.jsonl", run / "figures", title=self.title)
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    for picture in pictures:
                        logger.log_image(f"figures/{picture.stem}", [str(picture)], step=trainer.global_step)
        except Exception as error:  # a picture must neither fail a run that is done nor hide why another one failed
            log.warning("the figures could not be drawn: %s: %s", type(error).__name__, error)
